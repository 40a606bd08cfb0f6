"""Settings of a run: their values, their checks, and their forms as flags and as TOML."""
