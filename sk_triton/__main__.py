"""`python -m sk_triton` is the `sk-triton` command."""

import sys

from .cli import main

sys.exit(main())
