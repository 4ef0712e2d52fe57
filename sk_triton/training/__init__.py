"""Schedule "train": a training step by kernels, and how it becomes a part of autograd.

From the call down: `run` (an operator or a function of autograd), `operators` and `function`, `replay` and
`operator_replay` (steps that are started again), `passes` (planned and run), `schedule` (what a step computes), and its
parts: `branches`, `forward`, `gate`, `gradients`, and `library` for what the kernels do not take.
"""
