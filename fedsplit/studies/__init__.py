"""Studies: grids of settings and seeds, whose runs are compared."""
