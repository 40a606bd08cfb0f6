"""What crosses between client and trunk, and how many bytes that is."""
