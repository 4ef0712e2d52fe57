"""What the kernels' compiled code says: launches planned, compiled for a chip that need not be present, and read."""
