"""Models: finding, cutting and loading by part, in a type, on a device and in a number of bits."""
