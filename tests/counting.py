"""Which of PyTorch's operators run."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Of views and of memory that is not written: nothing runs on the GPU.
FREE = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal",
    "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "numpy_T", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "sym_size", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts the operators that run inside, but for `FREE` and casts to the dtype that a tensor has."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_same = name == "to" and any(a == args[0].dtype for a in args[1:] if isinstance(a, torch.dtype))
        if function.namespace == "aten" and name not in FREE and not is_same:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
