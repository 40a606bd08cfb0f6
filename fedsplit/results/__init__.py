"""Runs that are finished: opened whole, merged into ordinary models."""
