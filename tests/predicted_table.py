"""Prints the README's table of predictions: a script of its own, because kernels are compiled in a process that never
interprets."""

from sk_triton.bench.report.predictions import predictions

if __name__ == "__main__":
    print(predictions())
