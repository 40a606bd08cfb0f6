"""State that clients and server keep on their disks between rounds."""
