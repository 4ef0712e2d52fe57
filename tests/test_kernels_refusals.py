"""Configs whose kernel does not do what a launch asks for."""

import pytest
import torch

from sk_triton.kernels.config import (
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    MergedConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from sk_triton.kernels.geometry import ConvShape

GROUPED = ConvShape(32, 32, 8, (3, 3), (1, 2))
WIDE = ConvShape(64, 64, 2, (3, 3), (1, 2))
STREAM = StreamConfig(16, 16, 2, 8, RUN_H=2, RUN_W=2)
WINDOW = WindowConfig(16, 16, 2, 4, RUN_H=2, RUN_W=2)
DEPTHWISE = DepthwiseConfig(32, 4, 8)
SETTINGS = {
    "store": {"has_relu": True},
    "train": {},
    "measure": {},
    "pool": {"has_relu": True},
    "select": {"has_relu": True},
}
MERGED = MergedConfig(16, 16, 2, 8, RUN_H=2, RUN_W=2)
REFUSED = [
    ("pool", GROUPED, MERGED, "a MergedConfig is of another kernel"),
    ("store", GROUPED, DEPTHWISE, "a DepthwiseConfig takes groups of one channel"),
    ("train", ConvShape(32, 32, 32, (3,), (1,)), DEPTHWISE, "nothing but store, asked to train"),
    ("pool", ConvShape(32, 32, 32, (3,), (1,)), DEPTHWISE, "nothing but store, asked to pool"),
    ("pool", WIDE, TapConfig(16, 16, 4, 4), "a TapConfig stores and trains, asked to pool"),
    ("measure", WIDE, TapConfig(16, 16, 4, 4), "a TapConfig stores and trains, asked to measure"),
    ("select", WIDE, HeldConfig(32, 32, 1, 8, RUN_H=4), "a HeldConfig stores and pools, asked to select"),
    ("train", WIDE, HeldConfig(32, 32, 1, 8, RUN_H=4), "a HeldConfig stores and pools, asked to train"),
    ("select", ConvShape(32, 32, 8, (3, 3), (1, 3)), STREAM, "BLOCK_W 8 and spacings (1, 3)"),
    ("store", ConvShape(32, 32, 8, (3, 3), (1, 2), stride=2), WINDOW, "a window of rows takes stride 1"),
    ("store", ConvShape(32, 32, 8, (3, 3), (1, 2), is_split=True), WINDOW, "branches of the same channels"),
    ("store", GROUPED, WindowConfig(8, 8, 2, 4, 2, 2), "8 lanes and blocks of 16 channels"),
    ("store", GROUPED, WindowConfig(16, 16, 4, 4, 2, 2), "8 lanes and blocks of 16 channels"),
    (
        "pool",
        ConvShape(32, 32, 2, (3,), (1,)),
        WindowConfig(16, 16, 2, 4, 2, 2, SPARSE=True),
        "groups of 1, 2, 4 or 8",
    ),
]


def launch(task, shape, config, dtype=torch.float16, narrower=0):
    from sk_triton.kernels import branch_conv

    n, h, w, m = 1, 9, 7, len(shape.kernels)
    channels = shape.c_in * (m if shape.is_split else 1)
    x = torch.empty(n, channels, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out_h, out_w = shape.output_size(h, w - narrower)
    sums = torch.empty(n, 64, shape.c_out)
    moments = torch.empty(m, 3, 64, shape.c_out)
    u = torch.empty(m, n, out_h, out_w, shape.c_out, dtype=dtype)
    v = torch.empty(n, shape.c_out, out_h, out_w, dtype=dtype)
    attention = torch.empty(n, m, shape.c_out)
    outputs = {
        "store": (u, sums),
        "train": (u, moments),
        "measure": (moments,),
        "pool": (sums,),
        "select": (attention, v),
    }
    name = "branch_conv_fwd" if task == "store" else f"branch_{task}_fwd"
    packed = torch.empty(1, dtype=dtype)
    return getattr(branch_conv, name)(
        x, packed, None, *outputs[task], shape=shape, allow_tf32=False, config=config, **SETTINGS[task]
    )


@pytest.mark.parametrize(("task", "shape", "config", "reason"), REFUSED, ids=str)
def test_what_a_kernel_does_not_do_is_refused(task, shape, config, reason):
    with pytest.raises(ValueError, match=r"^config: ") as raised:
        launch(task, shape, config)
    assert reason in str(raised.value)


@pytest.mark.parametrize("task", SETTINGS)
@pytest.mark.parametrize("config", [STREAM, WINDOW, ColumnConfig(16, 16, 2, 8, RUN_H=2)], ids=str)
def test_kernels_of_narrow_groups_do_everything(task, config):
    assert launch(task, GROUPED, config).constexprs["TASK"] == task


def test_a_window_takes_16_bits():
    with pytest.raises(ValueError, match=r"config: a window of rows takes inputs of 16 bits, got 32"):
        launch("store", GROUPED, WINDOW, torch.float32)


@pytest.mark.parametrize(("task", "name"), [("store", "u"), ("train", "y"), ("select", "v")])
def test_an_output_of_another_size_is_refused(task, name):
    with pytest.raises(ValueError, match=rf"{name} must have \(9, 7\) pixels for an x of .*, got \(9, 6\)"):
        launch(task, GROUPED, STREAM, narrower=1)
