"""What Triton's interpreter counts while it runs the kernels."""
