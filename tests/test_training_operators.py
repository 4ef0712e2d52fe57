"""What a training step runs besides kernels: small operators, each of which costs the host and the GPU a launch."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sk_triton
from sk_triton import SelectiveKernel, SKConv, use_backend
from sk_triton.bench.host import stubbed_launches
from sk_triton.schedules import train

pytestmark = pytest.mark.interpret

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


LAYERS = {
    "paper": lambda: SelectiveKernel(16, groups=4, split_input=False),
    "seed": lambda: SKConv(16, M=2, G=4, r=4, L=8),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_runs_at_most_45_small_operators(name, dtype, monkeypatch):
    layer = LAYERS[name]().train().to(dtype)
    x = torch.randn(2, 16, 8, 8).half().to(memory_format=torch.channels_last).requires_grad_()
    dv = torch.randn(2, 16, 8, 8).half().to(memory_format=torch.channels_last)
    counting = Counting()

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            v = layer(x)
        v.backward(dv)

    def counted(run):
        # Autograd hides what a function of ours runs from a mode outside of it.
        def inside(*args, **kwargs):
            with counting:
                return run(*args, **kwargs)

        return inside

    with stubbed_launches(sk_triton) as started, use_backend("triton"):
        step()  # plans and packs
        monkeypatch.setattr(train, "forward", counted(train.forward))
        monkeypatch.setattr(train, "backward", counted(train.backward))
        started.clear()
        with counting:
            step()
    assert started
    assert 0 < counting.counts.total() <= 45, counting.counts.most_common()
