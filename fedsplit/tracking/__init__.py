"""Experiment trackers, as sinks of events."""
