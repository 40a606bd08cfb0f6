"""A client: its steps of split learning, its line to the trunk, its held-out text."""
