"""A federation with an aggregation, a loss and data of its own."""
