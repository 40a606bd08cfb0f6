"""The rounds: Flower's two sides, how a strategy is run, what is stored and measured."""
