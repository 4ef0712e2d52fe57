"""`python -m sk_triton.bench` is `sk-triton bench`."""

import sys

from sk_triton.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
