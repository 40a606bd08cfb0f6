"""Text generation with the split model, token by token through bottom, trunk and top."""
