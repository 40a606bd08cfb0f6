"""Contracts: what a strategy, an objective or a metric of the user's must keep, tried without a model."""
