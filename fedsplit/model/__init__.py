"""What a model is: found, cut, loaded by part, held in a type, on a device and in so many bits."""
