"""The trunk: the service behind all doors, its schedules, adapters, workers and memory."""
