"""What a run would cost: bytes, operations, memory and seconds, from a model's configuration alone."""
