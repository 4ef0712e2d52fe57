"""Competing on this machine: who takes part and how, correctness before time, and what a suite leaves behind."""
