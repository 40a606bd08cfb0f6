"""A client: steps of split learning, the link to the trunk, and measurements of held-out text."""
