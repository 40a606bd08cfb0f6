"""How weights change: optimisers, rates, clipping, when to stop."""
