"""What `sk-triton` returns besides 0."""

FAILED = CLOSED_OUTPUT = 1
BAD_USAGE = MISSING_PACKAGE = 2
INTERRUPTED = 130
