"""Settings of a run: values, checks, flags and TOML files."""
