"""The subcommands of `sk-triton` that measure, predict and draw: their options, what they run, what they print."""
