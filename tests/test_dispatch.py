"""What runs, why not the rest, and with which configs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sk_triton import (
    SelectiveKernel,
    SKConv,
    can_run_triton,
    dispatch,
    explain,
    planning,
    use_backend,
    workload,
)
from sk_triton.analytic import branch as analytic
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import (
    ColumnConfig,
    DepthwiseConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from sk_triton.kernels.geometry import ConvShape
from sk_triton.precision import allows_tf32
from sk_triton.workload import Workload

from .versions import HAS_NARROW_PRODUCTS, needs_narrow_products

SM_90 = CHIPS["sm_90"]


def layer(**kwargs):
    return SelectiveKernel(16, groups=4, split_input=False, **kwargs).eval()


def reason(module, x):
    can_run, why = can_run_triton(x, module.branches(), module.gate(), module.spec)
    assert can_run == (not why)
    return why


@pytest.fixture
def x():
    return torch.randn(1, 16, 5, 4)


@pytest.mark.interpret
def test_can_run_interpreted(x):
    with torch.no_grad():
        assert reason(layer(), x) == ""


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m, x: (m.double(), x.double()), "x has dtype torch.float64; the kernels take float16"),
        (lambda m, x: (m.bfloat16(), x.bfloat16()), "interpreter multiplies the bit patterns of bfloat16"),
        (lambda m, x: (layer(act_layer=nn.SiLU), x), "branch_act is SiLU; the kernels compute relu and identity"),
        (lambda m, x: (layer(norm_layer=nn.InstanceNorm2d), x), r"branches\[0\].norm is a InstanceNorm2d"),
        (lambda m, x: (layer(drop_layer=nn.Dropout).train(), x), "drop is active"),
        (lambda m, x: (m, x.to("meta")), 'x is on "meta"'),
        (lambda m, x: (m, x.as_subclass(type("Sub", (torch.Tensor,), {}))), "x is a Sub; the kernels take"),
    ],
)  # fmt: skip
def test_reasons(change, why, x):
    module, x = change(layer(), x)
    with torch.no_grad():
        assert reason(module, x)
        with pytest.raises(RuntimeError, match=rf'use_backend\("triton"\) cannot run here: .*{why}'):
            dispatch.choose(x, module.branches(), module.gate(), module.spec, backend="triton")


def test_active_drop_is_refused(x):
    module = layer(drop_layer=nn.Dropout)
    with torch.no_grad():
        assert "drop" not in reason(module, x)
        module.paths[1].drop.train()
        if dispatch.is_interpreted():
            assert (
                reason(module, x)
                == "branches[1].drop is active; the kernels have no random numbers (layer.eval())"
            )


class DoublingReLU(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.interpret
def test_subclasses_are_not_taken_for_their_base(x):
    with torch.no_grad():
        assert reason(layer(act_layer=DoublingReLU), x).startswith("branch_act is DoublingReLU")
        module = layer()
        weight = module.paths[1].conv.weight
        module.paths[1].conv.weight = nn.Parameter(weight.as_subclass(type("Quantized", (torch.Tensor,), {})))
        assert reason(module, x).startswith(
            "a parameter is a Quantized; the kernels take plain strided tensors"
        )


@pytest.mark.interpret
def test_hooks_are_not_skipped(x):
    module = layer()
    norm = module.paths[1].bn
    with torch.no_grad():
        for register in (norm.register_forward_hook, norm.register_full_backward_hook):
            handle = register(lambda *args: None)
            assert reason(module, x) == (
                "branches[1].norm has forward or backward hooks, which the kernels would not run"
            )
            handle.remove()
            assert reason(module, x) == ""


@pytest.mark.interpret
def test_transformations_are_refused_by_triton_and_served_by_auto(x):
    module = layer().requires_grad_(False)
    expected = module(x)

    def traced(x):
        return torch.jit.trace(module, x, check_trace=False)(x)

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, x)))[0]

    for transformed, why in (
        (lambda x: torch.vmap(module)(x[None])[0], "a torch.func transformation is active"),
        (traced, "torch.jit is tracing"),
        (dual, "forward-mode differentiation is active"),
    ):
        torch.testing.assert_close(transformed(x), expected)
        with use_backend("triton"), pytest.raises(RuntimeError, match=why):
            transformed(x)


@pytest.mark.interpret
def test_default_dtype_does_not_matter(x):
    module = SKConv(16, M=2, G=4, r=4).eval()
    with torch.no_grad():
        expected = module(x)
        torch.set_default_dtype(torch.float64)
        try:
            with use_backend("triton"):
                torch.testing.assert_close(module(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.interpret
def test_gradients_take_the_schedule_of_training_and_no_other(x):
    module = layer()
    with use_backend("triton"):
        assert "schedule  train" in str(explain(module, x))
        assert module(x).requires_grad
    why = "schedule 'store' is for inference, but gradients are enabled"
    with use_backend("triton", schedule="store"), pytest.raises(RuntimeError, match=why):
        module(x)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with use_backend("triton"):
        assert "schedule  train" not in str(explain(module, x))
        assert not module(x).requires_grad
        assert module(x.requires_grad_()).requires_grad


@pytest.mark.interpret
def test_explicit_request_runs_the_kernels_and_auto_on_cpu_does_not(x, monkeypatch):
    ran = []
    monkeypatch.setattr("sk_triton.launching.run", lambda *args: ran.append(args))
    module = layer()
    with torch.no_grad():
        module(x)
        with use_backend("reference"):
            module(x)
        assert not ran
        with use_backend("triton"):
            module(x)
        assert len(ran) == 1


@pytest.mark.interpret
def test_auto_takes_the_librarys_convolution_in_wide_groups(x, monkeypatch):
    """On a GPU; here the device is hidden from the choice."""
    wide, narrow = SelectiveKernel(256).eval(), SelectiveKernel(256, groups=32).eval()
    x = torch.randn(1, 256, 3, 3)

    def choose(module, backend):
        with torch.no_grad():
            return dispatch.choose(
                FakeCuda(x), module.branches(), module.gate(), module.spec, backend=backend
            )

    class FakeCuda:
        def __init__(self, tensor):
            self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cuda")
            self.stride = tensor.stride

    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_kernels_reason", lambda *args: ("", False))
    monkeypatch.setattr(workload, "chip_of", lambda device: SM_90)
    for backend in ("auto", "triton"):
        assert choose(wide, backend).schedule == "library"
        assert choose(narrow, backend).schedule == "gated"
    with use_backend("triton", schedule="library"):
        assert choose(narrow, "triton").schedule == "library"


def test_without_triton(x, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert reason(layer(), x) == "Triton is not installed (pip install triton)"


def test_without_interpreter(x, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with torch.no_grad():
        assert reason(layer(), x).startswith('x is on "cpu"; the kernels need a GPU')


def test_explain_reference(x):
    text = str(explain(layer(), x))
    assert "backend   reference" in text
    assert "schedule  eager" in text
    assert 'not triton: x is on "cpu", where "auto" takes no kernels' in text


@pytest.mark.interpret
def test_explain_sees_autocast(x):
    with torch.no_grad(), use_backend("triton"), torch.autocast("cpu", torch.float16):
        plan = explain(layer(), x).plan
    assert plan.dtype == torch.float16


@pytest.mark.interpret
def test_explain_triton(x):
    with torch.no_grad(), use_backend("triton"):
        text = str(explain(SKConv(16, M=3, G=4, r=4).eval(), x))
    assert "backend   triton" in text
    assert "schedule  gated" in text
    assert "passes    10 over one activation tensor (predicted)" in text  # two of them convert NCHW
    assert "store     3x3 g4, 5x5 g4, 7x7 g4" in text
    assert "branch_store: analytic (sm_90)" in text
    assert "gated     GatedSelectConfig(BLOCK_P=" in text
    assert "not reference: the kernels can run; eager takes 25 passes" in text


def test_branches_with_unequal_groups_take_a_launch_each():
    from sk_triton import BranchSpec, SKSpec

    spec = SKSpec(32, 32, (BranchSpec(3, 1, 1), BranchSpec(3, 1, 32), BranchSpec(3, 2, 32)), gate_width=8)
    plan = planning.plan_store(Workload(spec, 8, 14, 14, torch.float16, SM_90, allow_tf32=True))
    assert [(la.start, la.stop, la.shape.groups) for la in plan.branch_launches] == [(0, 1, 1), (1, 3, 32)]
    assert plan.passes == 2 + 2 * 3 + 1
    assert not plan.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_follows_pytorch(allowed, monkeypatch):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        assert allows_tf32() is allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


GROUPED = ConvShape(128, 128, 32, (3, 3), (1, 2))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize(
    ("shape", "dtype", "allow_tf32", "kind"),
    [
        (GROUPED, torch.float16, False, WindowConfig),
        (replace(GROUPED, is_split=True), torch.float16, False, StreamConfig),
        (replace(GROUPED, stride=2), torch.float16, False, ColumnConfig),
        (GROUPED, torch.float32, True, StreamConfig),
        (GROUPED, torch.float32, False, StreamConfig),
        (ConvShape(512, 512, 32, (3, 3), (1, 2)), torch.bfloat16, False, WindowConfig),
        (ConvShape(1024, 1024, 32, (3, 3), (1, 2)), torch.float16, False, ColumnConfig),
        (ConvShape(1024, 1024, 32, (3, 5), (1, 1)), torch.float16, False, ColumnConfig),
        (ConvShape(64, 64, 64, (3,), (1,)), torch.float16, False, WindowConfig),
        (ConvShape(64, 64, 64, (3,), (1,)), torch.float32, True, DepthwiseConfig),
        (ConvShape(64, 64, 1, (3,), (1,)), torch.bfloat16, False, TapConfig),
        (ConvShape(128, 128, 32, (3, 5, 7), (1, 1, 1)), torch.float16, False, TapConfig),
    ],
)
def test_analytic_choice(chip, shape, dtype, allow_tf32, kind):
    if kind is WindowConfig and (chip.is_amd or not HAS_NARROW_PRODUCTS):
        # A window's lanes are products of 8 columns.
        kind = StreamConfig if max(shape.c_in, shape.c_out) // shape.groups <= 8 else ColumnConfig
    if kind is ColumnConfig and not HAS_NARROW_PRODUCTS:
        kind = StreamConfig if max(shape.c_in, shape.c_out) // shape.groups <= 8 else TapConfig
    config = analytic.branch_config(shape, 128, 56, 56, dtype, allow_tf32, chip)
    assert type(config) is kind
    analytic.branch_config.cache_clear()
    assert analytic.branch_config(shape, 128, 56, 56, dtype, allow_tf32, chip) == config


@needs_narrow_products
def test_weights_are_held_over_as_many_tiles_as_leave_no_processor_idle():
    shape = ConvShape(1024, 1024, 32, (3, 3), (1, 2))

    def choice(n, size=7, task="store"):
        return analytic.branch_config(shape, n, size, size, torch.float16, False, SM_90, task=task)

    assert [choice(n).TILES_PER_PROGRAM for n in (64, 128, 256)] == [2, 4, 8]
    for config in (choice(1), choice(128, 14), choice(128, task="train"), choice(128, task="select")):
        assert type(config) is ColumnConfig


def test_small_batches_get_shorter_runs():
    runs = [analytic.branch_config(GROUPED, n, 56, 56, torch.float16, False, SM_90).RUN_H for n in (1, 128)]
    assert runs[0] < runs[1]


def test_amd_needs_triton_3_5(monkeypatch):
    rocm = torch.device("cuda"), torch.float16
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "chip_of", lambda device: CHIPS["gfx942"])
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 4))
    assert dispatch._device_reason(*rocm) == (
        "Triton 3.4 does not compile the kernels for AMD; 3.5 and later do"
    )
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 5))
    assert dispatch._device_reason(*rocm) == ""
    assert not allows_tf32()
