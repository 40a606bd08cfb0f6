"""Optimisation: optimisers, learning rates, clipping and gradient stages."""
