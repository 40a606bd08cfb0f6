"""The trunk: what is computed when and by which version, in how much memory, in a process of its own."""
