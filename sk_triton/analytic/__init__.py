"""Configs from shapes alone: deterministic, and good without tuning; one file for each kind of launch.

The figures behind their limits are the compiled kernels' own (registers, spills, instructions per output), printed by
``sk-triton resources``; those that were measured on a GPU say so.
"""
