"""Text generation with the split model, token by token through its three parts."""
