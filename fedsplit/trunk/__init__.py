"""The trunk: the service behind all doors, with schedules, adapters, workers and memory."""
