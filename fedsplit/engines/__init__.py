"""Engines: where the parties of a federation run, and how messages reach them."""
