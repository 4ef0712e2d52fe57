"""What kernels fetch ahead. It is a hint, which no result shows: the interpreter hands out its addresses."""

import contextlib
import math

import numpy as np
import pytest
import torch

from sk_triton.analytic.grad import grad_config
from sk_triton.analytic.window import merged_window_candidates, window_candidates
from sk_triton.bench.interpreted.meter import Meter
from sk_triton.chips import CHIPS, PREFETCHING
from sk_triton.kernels.config import GradWideConfig, WindowConfig
from sk_triton.kernels.geometry import ConvShape

from .grad_cases import make, terms_of
from .packed import pack_branch_weights

TWO = ConvShape(128, 128, 32, (3, 3), (1, 2))
# name: (branches, config, N, H, W): tiles that overhang images, several samples and strips to a tile, few channels
WINDOWS = {
    "one row of lanes": (TWO, WindowConfig(16, 16, 1, 8, RUN_H=5, RUN_W=2), 2, 10, 16),
    "strips": (TWO, WindowConfig(16, 16, 2, 4, RUN_H=4, RUN_W=2), 1, 7, 13),
    "samples": (TWO, WindowConfig(16, 16, 1, 2, RUN_H=6, RUN_W=3, BLOCK_N=4), 3, 6, 5),
    "short strips": (TWO, WindowConfig(16, 16, 4, 2, RUN_H=1, RUN_W=2), 2, 6, 4),
    "two channel blocks": (ConvShape(32, 32, 8, (3, 5), (1, 1)), WindowConfig(16, 16, 2, 4, 3, 2), 1, 9, 11),
    "more strips than channel blocks": (
        ConvShape(32, 32, 8, (3, 3), (1, 2)),
        WindowConfig(16, 16, 4, 2, 2, 2),
        1,
        8,
        4,
    ),
    "two warps": (
        ConvShape(32, 32, 8, (3, 5), (1, 1)),
        WindowConfig(16, 16, 2, 4, 3, 2, num_warps=2),
        1,
        9,
        11,
    ),
    "four warps": (TWO, WindowConfig(16, 16, 4, 2, RUN_H=2, RUN_W=2, num_warps=4), 1, 7, 5),
    "a warp without channels": (
        ConvShape(48, 48, 12, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=2, num_warps=4),
        1,
        5,
        9,
    ),
    "fifteen channels a block": (
        ConvShape(120, 120, 24, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=2, num_warps=4),
        1,
        5,
        9,
    ),
    "twelve channels a block": (
        ConvShape(48, 48, 4, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=2, num_warps=4),
        1,
        5,
        9,
    ),
}
GRADS = {
    "wide": (ConvShape(128, 128, 8, (3, 3), (1, 2)), GradWideConfig(2, 3), 2, 7, 20),
    "wide, 5x5": (ConvShape(128, 128, 32, (3, 5), (1, 1)), GradWideConfig(4, 2), 1, 9, 30),
    "wide, whole images": (ConvShape(128, 128, 8, (3, 3), (1, 2)), GradWideConfig(4, 2), 3, 4, 5),
}


def images(n, h, w, channels=128):
    """A crop of larger ones."""
    whole = torch.randn(n, channels, h + 3, w + 2).half().to(memory_format=torch.channels_last)
    return whole[:, :, 1:-2, 1:-1]


@contextlib.contextmanager
def asked_for(module, name):
    """What programs prefetch by `module.name`: (address, bytes)."""
    found = []

    def record_piece(ptr, size, is_wanted):
        if bool(is_wanted):
            found.append((int(ptr.handle.data.item()), int(size)))

    def record_sectors(ptrs, is_wanted):
        addresses, wanted = np.broadcast_arrays(ptrs.handle.data, is_wanted.handle.data)
        found.extend((int(address) // 32 * 32, 32) for address in addresses[wanted.astype(bool)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, {"prefetch_l1": record_sectors, "prefetch_l2": record_piece}[name])
        yield found


def marked(pieces, tensor):
    """Whether each byte of `tensor`'s memory is among the pieces, all of which lie in it."""
    found = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    for address, size in pieces:
        start = address - tensor.untyped_storage().data_ptr()
        assert 0 < size <= len(found) - start
        assert start >= 0
        assert start % 16 == 0
        assert size % 16 == 0
        found[start : start + size] = True
    return found


def bytes_of(tensor):
    """Whether each byte of `tensor`'s memory belongs to it."""
    own = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=torch.bool)
    own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return own.repeat_interleave(tensor.element_size())


def sectors_of(own):
    """Whether each byte lies in a sector that holds one of `own`."""
    whole = torch.nn.functional.pad(own, (0, -len(own) % 32)).view(-1, 32)
    return whole.any(1).repeat_interleave(32)[: len(own)]


def in_memory_of(tensor, pieces):
    start = tensor.untyped_storage().data_ptr()
    return [piece for piece in pieces if start <= piece[0] < start + tensor.untyped_storage().nbytes()]


@pytest.mark.interpret
@pytest.mark.interpreter_only
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_of_rows_prefetches_all_that_it_loads(name):
    from sk_triton.kernels import window
    from sk_triton.kernels.branch_conv import branch_pool_fwd
    from sk_triton.kernels.geometry import tiles

    shape, config, n, h, w = WINDOWS[name]
    x = images(n, h, w, shape.c_in)
    weights = [torch.randn(shape.c_out, shape.c_in // shape.groups, k, k).half() for k in shape.kernels]
    partial = torch.empty(n, math.prod(tiles(shape, config, h, w)), shape.c_out)
    launch = branch_pool_fwd(
        x, pack_branch_weights(weights, shape, config, x.dtype), None, partial,
        shape=shape, has_relu=True, allow_tf32=False, config=config,
    )  # fmt: skip
    assert not launch.constexprs["PREFETCH"], "the interpreter has no caches"
    launch.constexprs["PREFETCH"] = True
    with asked_for(window, "prefetch_l1" if config.num_warps > 1 else "prefetch_l2") as pieces:
        launch()
    # Two channel blocks prefetch for two of the four strips, each with what its kernels reach beyond it.
    loaded = x[:, :, :6] if name == "more strips than channel blocks" else x
    wanted = bytes_of(loaded)
    if config.num_warps > 1:
        wanted = sectors_of(wanted)
    assert torch.equal(marked(pieces, x), wanted)


@pytest.mark.interpret
@pytest.mark.interpreter_only
@pytest.mark.parametrize("num_warps", [1, 4])
def test_the_merged_convolution_prefetches_all_that_it_loads(num_warps):
    from sk_triton.kernels import window
    from sk_triton.kernels.merged_conv import merged_conv_fwd

    shape = ConvShape(128, 128, 32, (3, 5), (1, 1))
    config = WindowConfig(16, 16, 2, 4, RUN_H=3, RUN_W=2, num_warps=num_warps)
    x = images(2, 7, 9)
    weights = [torch.randn(128, 4, k, k).half() for k in shape.kernels]
    launch = merged_conv_fwd(
        x, pack_branch_weights(weights, shape, config, x.dtype), None, None, torch.rand(2, 2, 128),
        torch.empty_like(x), branches=shape, allow_tf32=False, config=config,
    )  # fmt: skip
    launch.constexprs["PREFETCH"] = True
    with asked_for(window, "prefetch_l1" if num_warps > 1 else "prefetch_l2") as pieces:
        launch()
    assert torch.equal(marked(pieces, x), bytes_of(x))


@pytest.mark.interpret
@pytest.mark.interpreter_only
@pytest.mark.parametrize("name", GRADS)
def test_weight_gradients_prefetch_what_the_next_tile_loads(name):
    from sk_triton.kernels import prefetch
    from sk_triton.kernels.branch_grad import branch_grad
    from sk_triton.kernels.grad_geometry import partial_shape

    from .packed import pack_grad_weights

    shape, config, n, h, w = GRADS[name]
    x, dv, y, weights, *coefficients = make(shape, n, h, w, torch.float16)
    terms = terms_of(*coefficients, has_norm=True)
    partial = torch.empty(partial_shape(shape, config, n, h, w))
    launches = branch_grad(
        x, dv, y, terms, pack_grad_weights(weights, shape, config, x.dtype), torch.empty_like(x), partial,
        shape=shape, has_relu=True, config=config,
    )  # fmt: skip
    for launch in launches[1:]:
        launch.constexprs["PREFETCH"] = True
        read = {"x": x, "dv": dv, "y": y}
        meter = Meter(
            read | {str(i): t for i, t in enumerate(launch.arguments) if isinstance(t, torch.Tensor)}
        )
        with asked_for(prefetch, "prefetch_l2") as pieces, meter.watch():
            launch()
        # The next tile of an image column, of which there is none in images as high as a tile.
        is_last = h <= config.RUN_H
        assert bool(pieces) != is_last
        of_each = {image: in_memory_of(tensor, pieces) for image, tensor in read.items()}
        assert sum(map(len, of_each.values())) == len(pieces)
        for image, tensor in read.items():
            touched = meter._touched.get(tensor.untyped_storage().data_ptr())
            is_read = touched is not None
            wanted = marked(of_each[image], tensor)
            assert wanted.any() == (is_read and not is_last)
            assert not wanted.any() or (wanted <= torch.from_numpy(touched)).all()


def test_on_the_chips_that_have_the_instruction():
    for name, chip in CHIPS.items():
        configs = window_candidates(TWO, 56, torch.float16, "select", chip)
        merged = merged_window_candidates(TWO, 56, chip)
        configs += [config for config in merged if config.RUN_H >= 8]
        assert not any(config.PREFETCH for config in merged if config.RUN_H < 8)
        wide = ConvShape(128, 128, 8, (3, 3), (1, 2))
        configs.append(grad_config(wide, 128, 56, 56, torch.float16, chip))
        assert {config.PREFETCH for config in configs} == {name in PREFETCHING}


@pytest.mark.interpret
@pytest.mark.interpreter_only
def test_only_pixels_that_are_one_aligned_piece_of_memory():
    from sk_triton.kernels.prefetch import can_prefetch

    x = torch.empty(2, 16, 5, 5, device="meta", dtype=torch.float16, memory_format=torch.channels_last)
    assert can_prefetch(x)
    assert not can_prefetch(x[:, :8]), "channels of others lie between"
    assert not can_prefetch(x.contiguous())
    odd = torch.empty(2, 12, 5, 5, device="meta", dtype=torch.float16, memory_format=torch.channels_last)
    assert not can_prefetch(odd), "24 bytes a pixel"
    assert not can_prefetch(images(1, 2, 2)), "the interpreter"
