"""Window kernels by products with sparse left operands: whole units, which tap shares a product with which, and what
the compiler makes of them. Their results launch by launch are among those of `test_kernels_branch_conv.py` and
`test_kernels_merged.py`."""

import copy
from dataclasses import replace

import pytest
import torch

from sk_triton import SelectiveKernel, SKConv, use_backend
from sk_triton.analytic.branch import branch_config, branch_cost
from sk_triton.bench.tuning.shortlist import shortlist
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import WindowConfig
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.merging import lattice_points
from sk_triton.kernels.window_geometry import branch_points, partners, places
from sk_triton.tuning import launches, space, user_file

from .compiling import rows_of
from .packed import pack_branch_weights
from .tolerances import assert_errs_like_eager, assert_typical_errors_like_eager
from .units import randomize_norms
from .versions import needs_configured_compiler, needs_narrow_products

TWO = ConvShape(64, 64, 16, (3, 3), (1, 2))
TARGETS = ("sm_80", "sm_90")


def make_sparse(monkeypatch, tasks=("pool", "select", "store", "train", "measure", "merged")):
    """The window configs that are looked up from now on, sparse for these tasks alone."""
    found = []

    def patch(name, task_of):
        original = getattr(launches, name)

        def lookup(*arguments):
            looked_up = original(*arguments)
            assert isinstance(looked_up.config, WindowConfig)
            found.append(replace(looked_up.config, SPARSE=task_of(*arguments) in tasks))
            return looked_up._replace(config=found[-1])

        monkeypatch.setattr(launches, name, lookup)

    patch("branch_config", lambda workload, shape, task: task)
    patch("merged_config", lambda *_: "merged")
    user_file.changed()
    return found


@pytest.fixture
def chosen(monkeypatch):
    """The window configs that units ran by, made sparse."""
    yield make_sparse(monkeypatch)
    monkeypatch.undo()
    user_file.changed()


def paper(channels, group_channels, device="cpu", dtype=torch.float16):
    layer = SelectiveKernel(channels, groups=channels // group_channels, split_input=False)
    layer = layer.to(device, dtype)
    randomize_norms(layer)
    return layer


def classic(channels, group_channels, device="cpu", dtype=torch.float16):
    return SKConv(channels, M=2, G=channels // group_channels, r=16).to(device, dtype)


def compare_inference(layer, x, schedule):
    layer = layer.eval()
    with torch.no_grad():
        with use_backend("reference"):
            eager, exact = layer(x), copy.deepcopy(layer).double()(x.double())
        with use_backend("triton", schedule=schedule):
            ours = layer(x)
    assert_errs_like_eager(ours, eager, exact)


def step(layer, x, dv, backend):
    """Output and gradients of one step."""
    layer = copy.deepcopy(layer).train()
    x = x.detach().clone().requires_grad_()
    with use_backend(backend):
        v = layer(x)
    v.backward(dv.to(v.dtype))
    return [v.detach(), x.grad, *(p.grad for p in layer.parameters())]


def compare_training(layer, x):
    dv = torch.randn_like(x)
    exact = step(copy.deepcopy(layer).double(), x.double(), dv, "reference")
    eager, ours = step(layer, x, dv, "reference"), step(layer, x, dv, "triton")
    assert_typical_errors_like_eager(list(zip(ours, eager, exact, strict=True)))


def images(*size, device="cpu", dtype=torch.float16):
    return torch.randn(*size, device=device, dtype=dtype).to(memory_format=torch.channels_last)


UNITS = pytest.mark.parametrize(
    ("unit", "schedule"),
    [(paper, "recompute"), (paper, "store"), (classic, "merged")],
    ids=["recompute", "store", "merged"],
)


@needs_narrow_products
@pytest.mark.interpret
@UNITS
@pytest.mark.parametrize("group_channels", [4, 8])
def test_units_err_like_eager(chosen, unit, schedule, group_channels):
    compare_inference(unit(32, group_channels), images(2, 32, 6, 9), schedule)
    assert chosen


@needs_narrow_products
@pytest.mark.interpret
@UNITS
def test_a_layer_packs_weights_for_each_kind_of_products(unit, schedule):
    """As a GPU may take other kinds for other batches: what was packed for one must not serve the other."""
    layer, x, found = unit(32, 4).eval(), images(2, 32, 6, 9), []
    for tasks in ((), ("pool", "store", "merged"), ("select",), ("pool", "select"), ()):
        with pytest.MonkeyPatch.context() as patched:
            make_sparse(patched, tasks)
            with torch.no_grad(), use_backend("triton", schedule=schedule):
                found.append(layer(x))
        user_file.changed()
    for v in found[1:]:
        torch.testing.assert_close(v, found[0], rtol=2e-3, atol=2e-3)
    assert torch.equal(found[-1], found[0])


@needs_narrow_products
@pytest.mark.interpret
@pytest.mark.parametrize("unit", [paper, classic])
def test_training_errs_like_eager(chosen, unit):
    compare_training(unit(32, 4), images(2, 32, 6, 9))
    assert chosen


@needs_narrow_products
@pytest.mark.gpu
@UNITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28)])
def test_units_err_like_eager_on_a_gpu(chosen, unit, schedule, dtype, channels, size):
    layer = unit(channels, channels // 32, "cuda", dtype)
    compare_inference(layer, images(8, channels, size, size, device="cuda", dtype=dtype), schedule)
    assert chosen


@needs_narrow_products
@pytest.mark.gpu
@pytest.mark.parametrize("unit", [paper, classic])
@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28)])
def test_training_errs_like_eager_on_a_gpu(chosen, unit, channels, size):
    compare_training(unit(channels, channels // 32, "cuda"), images(2, channels, size, size, device="cuda"))
    assert chosen


@pytest.mark.parametrize(
    ("shape", "products"),
    [
        # Of each kernel column: rows 1 and 3 of the window and row 2, rows 0 and 2 and row 4.
        (TWO, 6 + 6),
        (ConvShape(64, 64, 16, (5,), (1,)), 15),
        (ConvShape(64, 64, 16, (3,), (1,)), 6),
        (ConvShape(64, 64, 16, (1, 3), (1, 3)), 1 + 9),
    ],
    ids=str,
)
def test_pairs_of_rows_share_products(shape, products):
    count = 0
    for points in branch_points(shape):
        shared = partners(points, shape)
        others = [partner for i, partner in enumerate(shared) if partner not in (-1, i)]
        assert len(set(others)) == len(others)
        for i, partner in enumerate(shared):
            if partner in others or partner == -1:
                continue
            if partner == i:
                assert i in others, "a tap that no product takes"
            else:
                assert shared[partner] == partner
                assert points[partner] == (points[i][0] + 2, points[i][1])
        count += sum(partner != i for i, partner in enumerate(shared))
    assert count == products


def test_places_are_those_of_the_pixels():
    points = [point for point, _ in lattice_points(TWO)]
    window = [(y, x) for y in range(-2, 3) for x in range(-2, 3 + 2)]
    assert [window[place] for place in places(points, TWO, 3)] == points


@pytest.mark.parametrize(
    ("channels", "is_refused"), [(1, False), (2, False), (8, False), (3, True), (16, True)]
)
def test_other_groups_are_refused(channels, is_refused):
    from sk_triton.kernels.branch_conv import branch_pool_fwd

    shape = ConvShape(48, 48, 48 // channels, (3,), (1,))
    config = WindowConfig(16, 16, 1, 8, RUN_H=2, RUN_W=2, SPARSE=True)
    weights = [torch.randn(48, channels, 3, 3).half()]
    x, partial = images(1, 48, 4, 4), torch.empty(1, 2, 48)

    def launch():
        packed = pack_branch_weights(weights, shape, config, x.dtype)
        branch_pool_fwd(x, packed, None, partial, shape=shape, has_relu=True, allow_tf32=False, config=config)

    if is_refused:
        with pytest.raises(ValueError, match=r"config.* groups of 1, 2, 4 or 8"):
            launch()
    else:
        launch()


def test_other_lanes_are_refused():
    from sk_triton.kernels.branch_conv import branch_pool_fwd

    config = WindowConfig(16, 16, BLOCK_H=2, BLOCK_W=2, RUN_H=2, RUN_W=2, SPARSE=True)
    x, partial = images(1, 64, 4, 4), torch.empty(1, 1, 64)
    with pytest.raises(ValueError, match=r"config.* 8 lanes"):
        branch_pool_fwd(x, x, None, partial, shape=TWO, has_relu=True, allow_tf32=False, config=config)


def test_no_weight_is_lost_or_moved_into_another_place():
    """Every weight of a group stands once among what a program holds."""
    for group in (1, 2, 4, 8):
        shape = ConvShape(32, 32, 32 // group, (3, 3), (1, 2))
        config = WindowConfig(16, 16, 1, 8, RUN_H=2, RUN_W=2, SPARSE=True)
        weights = [torch.rand(32, group, 3, 3, dtype=torch.float64) + 1 for _ in range(2)]
        packed = pack_branch_weights(weights, shape, config, torch.float64)
        assert packed.numel() == 2 * 2 * 9 * 128
        held, _ = packed[packed != 0].sort()
        assert torch.equal(held, torch.cat([w.flatten() for w in weights]).sort().values)


@needs_narrow_products
def test_only_tuning_takes_them():
    """Until a GPU has run them."""
    for task in ("pool", "select", "store", "train"):
        analytic = branch_config(TWO, 128, 56, 56, torch.float16, True, CHIPS["sm_90"], task=task)
        assert not analytic.SPARSE
        found = space.branch_configs(TWO, 56, torch.float16, True, CHIPS["sm_90"], task=task)
        assert {config.SPARSE for config in found if isinstance(config, WindowConfig)} == {False, True}
    wide = space.branch_configs(
        ConvShape(512, 512, 32, (3, 3), (1, 2)), 14, torch.float16, True, CHIPS["sm_90"], task="pool"
    )
    assert not any(config.SPARSE for config in wide if isinstance(config, WindowConfig))


@needs_narrow_products
@pytest.mark.parametrize("task", ["pool", "select", "train"])
def test_a_short_search_tries_dense_and_sparse_products(task):
    numbers = torch.float16, True, CHIPS["sm_90"]
    shape = ConvShape(128, 128, 32, (3, 3), (1, 2))
    analytic = branch_config(shape, 128, 56, 56, *numbers, task=task)
    found = shortlist(
        space.branch_configs(shape, 56, *numbers, task=task),
        analytic,
        lambda config: branch_cost(config, shape, 128, 56, 56, CHIPS["sm_90"], task),
        6,
    )
    assert found[0] == analytic
    assert sum(config.SPARSE for config in found) in (2, 3)
    assert any(config.SPARSE and config.num_warps == analytic.num_warps for config in found)


@pytest.fixture(scope="module")
def compiled():
    rows = rows_of("window_resources.py", "sparse", *TARGETS)
    assert {row["chip"] for row in rows} == set(TARGETS)
    assert {row["task"] for row in rows} == {"pool", "select", "store", "train", "measure", "merged"}
    return rows


@needs_configured_compiler
@pytest.mark.compile
def test_no_kernel_spills(compiled):
    assert not [row for row in compiled if row["spills"]]


@needs_narrow_products
@pytest.mark.compile
def test_all_products_are_sparse(compiled):
    for row in compiled:
        assert row["dense"] == 0, row
        # Two 3x3 branches are 6 and 6 products a pixel; of a 5x5 lattice 10 and 5.
        assert row["pairs"] == (2 if row["task"] == "merged" else 1) * row["single"] > 0, row


@needs_narrow_products
@pytest.mark.compile
def test_operands_lie_in_threads_as_the_tensor_core_wants_them(compiled):
    """Element i of a warp's 32 in thread i: the inline instruction sees nothing of Triton's layouts."""
    in_order = (
        "#ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [2], order = [0]}>",
        "#ttg.linear<{register = [], lane = [[1], [2], [4], [8], [16]], warp = [[32]], block = []}>",
    )
    for row in compiled:
        assert row["layouts"], row
        assert set(row["layouts"]) <= set(in_order), row
