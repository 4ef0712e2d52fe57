"""Orders in which the kernels compute a unit; none of them imports another."""
