"""The wire between client and trunk: packets, codecs, transports, and counts of bytes."""
