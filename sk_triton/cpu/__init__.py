"""The CPU's schedules: which of them runs a call, and what they share."""
