"""Objectives: losses for training. One file an objective."""
