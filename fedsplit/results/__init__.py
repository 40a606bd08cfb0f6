"""Finished runs: opened as the unsplit model, measured, merged into ordinary models."""
