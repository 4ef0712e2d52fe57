"""The emulator of compiled kernels, on PTX by hand: instructions of a thread, programs, faults."""

import importlib
import pkgutil
import re

import numpy as np
import pytest
import torch

from .emulator import FaultError, observed_accesses, run
from .emulator.launching import LANES
from .ptx_by_hand import HEAD, results, start


def whole(*values):
    """A warp's integers: these, then zeros."""
    return torch.tensor(values + (0,) * (32 - len(values)), dtype=torch.int64).to(torch.int32)


def floats(*values):
    return torch.tensor(values + (0.0,) * (32 - len(values)))


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        ("shl.b32 %r9, %r0, %r1;", [(1, 1, 1), (3, 31, 32)], [8, -(2**31), 0]),
        ("shr.u32 %r9, %r0, %r1;", [(-1, -1), (31, 32)], [1, 0]),
        ("shr.s32 %r9, %r0, %r1;", [(-8, -8), (1, 40)], [-4, -1]),
        ("div.s32 %r9, %r0, %r1;", [(7, -7, 7, -7), (2, 2, -2, -2)], [3, -3, -3, 3]),
        ("rem.s32 %r9, %r0, %r1;", [(7, -7, 7, -7), (2, 2, -2, -2)], [1, -1, 1, -1]),
        ("mul.hi.s32 %r9, %r0, %r1;", [(2**30, -(2**30)), (8, 8)], [2, -2]),
        ("mad.lo.s32 %r9, %r0, %r1, 5;", [(2**31 - 1,), (2,)], [3]),
        ("bfe.u32 %r9, %r0, 4, 8;", [(0x12345678, -1)], [0x67, 0xFF]),
        ("bfe.s32 %r9, %r0, 4, 4;", [(0x80, 0x70)], [-8, 7]),
        ("prmt.b32 %r9, %r0, %r1, 0x7810;", [(0x443322F1,), (0x8899AABB,)], [0x88FF22F1 - 2**32]),
        ("mov.b32 {%rs0, %rs1}, %r0;\nmov.b32 %r9, {%rs1, %rs0};", [(0x12345678,)], [0x56781234]),
        ("mov.b32 {%rs0, _}, %r0;\ncvt.s32.s8 %r9, %rs0;", [(0x1FF, 0x17F)], [-1, 127]),
        ("setp.lt.s32 %p1, %r0, 0;\nselp.b32 %r9, 7, %r0, %p1;", [(-5, 5)], [7, 5]),
        (
            "setp.eq.s32 %p1, %r0, 3;\nsetp.gt.and.u32 %p2, %r0, 2, %p1;\nselp.b32 %r9, 1, 0, %p2;",
            [(3, 4, 2)],
            [1, 0, 0],
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_integers(body, inputs, expected):
    assert results(body, *(whole(*values) for values in inputs))[: len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("max.f32 %r9, %r0, %r1;", [2.0, 1.0, 5.0]),
        ("max.NaN.f32 %r9, %r0, %r1;", [2.0, np.nan, np.nan]),
        ("setp.ne.f32 %p1, %r0, %r1;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [1.0, 0.0, 0.0]),
        ("setp.gtu.f32 %p1, %r0, %r1;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [0.0, 1.0, 1.0]),
        ("fma.rn.f32 %r9, %r0, %r1, 0f3F800000;", [3.0, np.nan, np.nan]),
        ("cvt.rn.bf16x2.f32 %r8, %r0, %r1;\nand.b32 %r9, %r8, 0xFFFF0000;", [1.0, np.nan, 5.0]),
        ("cvt.rn.f16x2.f32 %r8, %r1, %r0;\nmov.b32 {%rs0, %rs1}, %r8;\ncvt.f32.f16 %r9, %rs0;", [1.0, np.nan, 5.0]),
        ("cvt.rzi.s32.f32 %r8, %r1;\ncvt.rn.f32.s32 %r9, %r8;", [2.0, 1.0, 0.0]),
        ("setp.nan.f32 %p1, %r0, %r1;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [0.0, 1.0, 1.0]),
        ("mov.b32 %r9, %r0;\nsetp.gt.f32 %p1, %r1, %r0;\n@%p1 add.f32 %r9, %r0, %r1;", [3.0, np.nan, 5.0]),
        ("cvt.rn.f16.f32 %rs0, %r0;\nadd.f32.f16 %r9, %rs0, %r1;", [3.0, np.nan, np.nan]),
        (
            "cvt.rn.f16x2.f32 %r7, %r0, %r1;\ncvt.rn.f16x2.f32 %r8, %r1, %r0;\nmax.NaN.f16x2 %r7, %r7, %r8;\n"
            "mov.b32 {%rs0, %rs1}, %r7;\ncvt.f32.f16 %r9, %rs1;",
            [2.0, np.nan, np.nan],
        ),
        (
            "cvt.rn.f16x2.f32 %r7, %r0, %r1;\ncvt.rn.f16x2.f32 %r8, %r1, %r0;\nsetp.gt.f16x2 %p1|%p2, %r7, %r8;\n"
            "selp.f32 %r9, 0f3F800000, 0f00000000, %p1;\n@%p2 mov.b32 %r9, 0f40000000;",
            [1.0, 0.0, 0.0],
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_floats(body, expected):
    found = results(body, floats(1.0, np.nan, 5.0), floats(2.0, 1.0, np.nan), dtype=torch.float32)
    torch.testing.assert_close(found[: len(expected)], torch.tensor(expected), equal_nan=True)


def test_bfloat16_is_rounded_to_nearest_even():
    x = torch.randn(32)
    body = "cvt.rn.bf16.f32 %rs0, %r0;\ncvt.f32.bf16 %r9, %rs0;"
    assert torch.equal(results(body, x, dtype=torch.float32), x.bfloat16().float())


def test_large_floats_become_the_largest_integers():
    x = floats(3e9, -3e9)
    assert results("cvt.rzi.s32.f32 %r9, %r0;", x)[:2].tolist() == [2**31 - 1, -(2**31)]


def test_short_integers_keep_their_sign():
    x, out = torch.tensor([-1, 127, -128], dtype=torch.int8), torch.zeros(3, dtype=torch.int32)
    start(
        "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p1, %r0, 3;\ncvt.u64.u32 %rd2, %r0;\nadd.s64 %rd3, %rd1, %rd2;\n"
        "shl.b64 %rd2, %rd2, 2;\nadd.s64 %rd4, %rd0, %rd2;\n"
        "@%p1 ld.global.s8 %r1, [%rd3];\n@%p1 st.global.b32 [%rd4], %r1;", out, x,
    )  # fmt: skip
    assert out.tolist() == x.tolist()


def test_atomic_sums_hand_out_what_was_there():
    """More programs than run in lockstep at a time."""
    count = 3 * LANES // 32
    total, before = torch.zeros(1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    start(
        "mov.u32 %r0, %tid.x;\nsetp.eq.u32 %p1, %r0, 7;\nmov.u32 %r1, %ctaid.x;\nmul.wide.u32 %rd2, %r1, 4;\n"
        "add.s64 %rd2, %rd1, %rd2;\n@%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd0], 2;\n"
        "@%p1 st.global.b32 [%rd2], %r2;", total, before, grid=(count,),
    )  # fmt: skip
    assert total.item() == 2 * count
    assert sorted(before.tolist()) == list(range(0, 2 * count, 2))


def test_copies_into_shared_memory():
    """Of 16 bytes a thread; every second one gets zeros, and asks for no memory."""
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    start(
        "mov.u32 %r0, %tid.x;\nshl.b32 %r1, %r0, 4;\nmul.wide.u32 %rd2, %r0, 16;\nadd.s64 %rd3, %rd1, %rd2;\n"
        "and.b32 %r2, %r0, 1;\nsetp.eq.u32 %p1, %r2, 1;\nselp.b32 %r2, 0, 16, %p1;\nselp.b64 %rd3, 0, %rd3, %p1;\n"
        "cp.async.cg.shared.global [%r1+0], [%rd3+0], 0x10, %r2;\ncp.async.wait_group 0;\nbar.sync 0;\n"
        "ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1];\nadd.s64 %rd3, %rd0, %rd2;\n"
        "st.global.v4.b32 [%rd3], {%r3, %r4, %r5, %r6};", out, x, shared=512,
    )  # fmt: skip
    assert torch.equal(out.reshape(16, 2, 4)[:, 0], x.reshape(16, 2, 4)[:, 0])
    assert not out.reshape(16, 2, 4)[:, 1].any()


def test_lanes_part_and_meet_again():
    """Each thread loops as often as its number says, then all add what the others have."""
    body = """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        $loop:
        setp.ge.s32 %p1, %r1, %r0;
        @%p1 bra $done;
        add.s32 %r1, %r1, 1;
        add.s32 %r2, %r2, %r1;
        bra.uni $loop;
        $done:
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        add.s32 %r9, %r2, %r3;
    """
    own = torch.arange(32) * (torch.arange(32) + 1) // 2
    assert (
        results(body, torch.arange(32, dtype=torch.int32)).tolist()
        == (own + own.reshape(16, 2).flip(1).reshape(-1)).tolist()
    )


def test_programs_have_their_own_shared_memory():
    """Each thread of 3 x 2 programs of two warps hands a word to the thread 40 further on."""
    out = torch.zeros(6 * 64, dtype=torch.int32)
    body = """
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ctaid.y;
        mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1;
        mad.lo.s32 %r5, %r4, 64, %r0;
        mov.b32 %r6, global_smem;
        add.s32 %r7, %r0, 40;
        and.b32 %r7, %r7, 63;
        shl.b32 %r7, %r7, 2;
        add.s32 %r7, %r7, %r6;
        st.shared.b32 [%r7], %r5;
        bar.sync 0;
        shl.b32 %r7, %r0, 2;
        ld.shared.b32 %r8, [%r7+0];
        mul.wide.s32 %rd1, %r5, 4;
        add.s64 %rd2, %rd0, %rd1;
        st.global.b32 [%rd2], %r8;
    """
    start(body, out, threads=64, grid=(3, 2), shared=256)
    thread = torch.arange(64)
    assert torch.equal(out.reshape(6, 64), (torch.arange(6)[:, None] * 64 + (thread - 40) % 64).int())


# What follows, to the label `$end`, is for nine threads.
FEW = "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p1, %r0, 9;\n@!%p1 bra $end;\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r0, [%rd0+64];", "outside of every tensor"),
        ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0+56];", "misaligned"),
        ("st.global.b32 [%rd0+-4], %r0;", "outside of every tensor"),
        ("mov.b32 %r0, 60;\nld.shared.v2.b32 {%r1, %r2}, [%r0];", "misaligned"),
        ("mov.b32 %r0, 64;\nst.shared.b32 [%r0], %r1;", "outside of shared memory"),
        ("mov.b32 %r0, 62;\nst.shared.b16 [%r0+4], %rs1;", "outside of shared memory"),
        ("mov.b64 %rd1, -4;\nld.global.b32 %r0, [%rd1];", "outside of every tensor"),
        ("cp.async.bulk.prefetch.L2.global [%rd0], 80;", "prefetches lie outside"),
        ("cp.async.bulk.prefetch.L2.global [%rd0+8], 16;", "misaligned"),
        (f"{FEW}bar.sync 0;\n$end:", "a part of 32 threads"),
        (f"{FEW}shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;\n$end:", "a part of 32 threads"),
        (f"{FEW}mov.b32 %r1, 0;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r2}}, [%r1];\n$end:", "a part of 32"),
        (
            f"{FEW}mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%r0, %r1, %r2, %r3}, {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1, %r2, %r3};\n$end:",
            "a part of 32 threads",
        ),
        (
            "mov.b32 %r5, 0x11111111;\nmma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1}, {%r0, %r1, %r2, %r3}, %r5, 0x0;",
            "out of order",
        ),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(FaultError, match=message):
        start(body, torch.zeros(16), shared=64)


@pytest.mark.parametrize(
    "instruction",
    [
        "popc.b32 %r1, %r0", "setp.foo.f32 %p1, %r0, %r0", "cvt.rmi.f32.f32 %r1, %r0",
        "fma.rn.relu.f16x2 %r1, %r0, %r0, %r0",
        "fma.rn.f32.f16 %r1, %rs0, %rs0, %r0", "atom.global.gpu.relaxed.add.f32 %r1, [%rd0], %r0",
        "bfe.u32 %r1, %r0, %r2, 3", "shfl.sync.up.b32 %r1, %r0, 1, 0, -1",
    ],
)  # fmt: skip
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(NotImplementedError, match=re.escape(instruction)):
        start(f"{instruction};", torch.zeros(1))


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        ("st.global.b32 [%rd0], %r5;", torch.float32),
        ("st.global.b16 [%rd0], %rs5;", torch.float16),
        ("st.global.b16 [%rd0], %rs5;", torch.bfloat16),
        ("mov.b32 %r0, 8;\nld.shared.b16 %rs1, [%r0];\nst.global.b16 [%rd0], %rs1;", torch.float16),
        ("mov.b32 %r0, 8;\nld.shared.b32 %r1, [%r0];\nst.global.b32 [%rd0], %r1;", torch.float32),
    ],
)
def test_what_is_not_written_is_not_finite(body, dtype):
    out = torch.zeros(1, dtype=dtype)
    start(body, out, shared=16)
    assert out.isnan()


def test_arguments_that_are_missing_are_an_error():
    parameters = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(3))
    with pytest.raises(ValueError, match="0 arguments for"):
        run(f"{HEAD}.visible .entry k(\n{parameters}\n)\n.reqntid 32\n{{\nret;\n}}\n", [], (1,), 0, [])


def test_all_kernels_that_fetch_ahead_do_so_when_emulated():
    from sk_triton import kernels

    from .emulator.session import PREFETCHING

    names = [info.name for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".prefetch")]
    assert {module for module in modules if hasattr(module, "can_prefetch")} == set(PREFETCHING)


def test_accesses_are_told_of():
    x, told = torch.zeros(32), []
    with observed_accesses(
        lambda addresses, size, is_write: told.append((addresses.tolist(), size, is_write))
    ):
        start(
            "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p1, %r0, 2;\nmul.wide.u32 %rd1, %r0, 8;\nadd.s64 %rd1, %rd0, %rd1;\n"
            "@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1];\n@%p1 st.global.b32 [%rd1+4], %r1;", x,
        )  # fmt: skip
    first = x.data_ptr()
    assert told == [([first, first + 8], 8, False), ([first + 4, first + 12], 4, True)]
