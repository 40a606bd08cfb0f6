"""Text from the split model: token by token through all its parts."""
