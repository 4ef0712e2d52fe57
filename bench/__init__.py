"""Benchmarks of the SK layer against its peers: `sk-triton bench` or `python -m sk_triton.bench`."""
