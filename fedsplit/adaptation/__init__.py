"""Adapters: PEFT's methods, prompts and heads on a part of a model."""
