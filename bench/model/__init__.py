"""The least time that a schedule can take on a GPU that need not be present, and how it compares with measured ones."""
