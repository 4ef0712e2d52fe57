"""Schedule "train": a training step by kernels, and how it becomes a part of autograd.

From the call down: `run` takes the operators of `operators`, or past them `function` with its `call`; `replay` and
`operator_replay` start steps again; `passes` plans a pass (`plan`) and runs `schedule`, on a `tape`; that is made of
`branches`, `forward`, `gate` and `gradients`, and of `library` for what the kernels do not take. Parameters and norms
come as `tensors` and `norms`; `distributed` shares statistics.
"""
