"""Metrics: further measures of the held-out text beside the loss. One file a metric."""
