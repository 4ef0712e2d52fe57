"""`sk-triton report`: all that can be known of sk_triton on this machine, step by step, in one folder."""
