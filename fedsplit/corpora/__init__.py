"""The clients' text: read, turned into tokens, partitioned among clients, cut into sequences."""
