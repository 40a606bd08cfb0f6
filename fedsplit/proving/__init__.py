"""Proof that a model's type can be cut exactly, before any weight of the model is loaded."""
