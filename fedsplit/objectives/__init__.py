"""Objectives: what training minimises. One file an objective."""
