"""The emulator of compiled kernels, on PTX by hand: who holds what of a matrix is spelt out as in the PTX ISA."""

import importlib
import itertools
import pkgutil
import re

import numpy as np
import pytest
import torch

from .emulator import FaultError, observed_accesses, run
from .emulator.launching import LANES

HEAD = ".version 8.7\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
PARAMETERS = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(3))
REGISTERS = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<9>;\n"


def start(body, *values, threads=32, grid=(1,), shared=0):
    """Run `body`; a tensor of `values` is given by its address, in `%rd0` and so on, a number in `%rd` likewise."""
    names = [f"k_param_{i}" for i in range(len(values))]
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "".join(f"ld.param.b64 %rd{i}, [{name}];\n" for i, name in enumerate(names))
    text = f"{HEAD}.visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n{{\n{REGISTERS}{loads}{body}\nret;\n}}\n"
    given = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
    run(text, given, grid, shared, [value for value in values if isinstance(value, torch.Tensor)])


def results(body, *inputs, dtype=torch.int32):
    """`%r9` of a warp's threads after `body`; `%r0` and so on are the threads' entries of `inputs`, in 32 bits each."""
    out = torch.zeros(32, dtype=dtype)
    loads = "".join(
        f"add.s64 %rd8, %rd{i + 1}, %rd7;\nld.global.b32 %r{i}, [%rd8];\n" for i in range(len(inputs))
    )
    lane = "mov.u32 %r98, %tid.x;\nmul.wide.u32 %rd7, %r98, 4;\n"
    start(f"{lane}{loads}{body}\nadd.s64 %rd8, %rd0, %rd7;\nst.global.b32 [%rd8], %r9;", out, *inputs)
    return out


def threads():
    return torch.arange(32, dtype=torch.int32)


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
        ("lop3.b32 %r9, %r0, %r1, %r2, 0x96;", [(12,), (10,), (6,)], [12 ^ 10 ^ 6]),
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
    assert results(body, threads()).tolist() == (own + own.reshape(16, 2).flip(1).reshape(-1)).tolist()


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


def lanes_words(values, dtype):
    """`values [32, words, 2]`, or `[32, words]` in 32 bits, as a thread's adjacent words."""
    return torch.tensor(np.ascontiguousarray(values), dtype=dtype).reshape(32, -1)


def multiply(opcode, left, right, start_values, metadata=None):
    """What a product makes of each thread's words: `[32, 4]`."""
    out = torch.zeros(32, 4)
    sizes = [t.shape[1] * t.element_size() for t in (left, right, start_values)]
    body, register, vectors = "mov.u32 %r98, %tid.x;\n", 0, []
    for i, size in enumerate(sizes):
        names = [f"%r{register + k}" for k in range(size // 4)]
        register += len(names)
        vectors.append(f"{{{', '.join(names)}}}")
        body += f"mul.wide.u32 %rd7, %r98, {size};\nadd.s64 %rd8, %rd{i + 1}, %rd7;\n"
        body += "".join(f"ld.global.b32 {name}, [%rd8+{4 * k}];\n" for k, name in enumerate(names))
    sparsity = ""
    if metadata is not None:
        body += "mul.wide.u32 %rd7, %r98, 4;\nadd.s64 %rd8, %rd4, %rd7;\nld.global.b32 %r97, [%rd8];\n"
        sparsity = ", %r97, 0x0"
    result = "{%r90, %r91, %r92, %r93}"
    body += f"{opcode} {result}, {', '.join(vectors)}{sparsity};\n"
    body += f"mul.wide.u32 %rd7, %r98, 16;\nadd.s64 %rd8, %rd0, %rd7;\nst.global.v4.b32 [%rd8], {result};"
    start(body, out, left, right, start_values, *([] if metadata is None else [metadata]))
    return out


def accumulators(matrix):
    """c0 to c3: row g for i < 2, else g + 8; column 2 t + i % 2."""
    found = np.zeros((32, 4), np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        found[lane, i] = matrix[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
    return found


def right_operand(matrix):
    """b0, b1, …: row 2 t + i % 2 + 8 (i // 2), column g."""
    found = np.zeros((32, len(matrix) // 4), np.float32)
    for lane, i in itertools.product(range(32), range(len(matrix) // 4)):
        found[lane, i] = matrix[2 * (lane % 4) + i % 2 + 8 * (i // 2), lane // 4]
    return found


def small_integers(*shape):
    """Of which products are exact in every type."""
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(dtype):
    a, b, c = small_integers(16, 16), small_integers(16, 8), small_integers(16, 8)
    left = np.zeros((32, 8), np.float32)
    for lane, i in itertools.product(range(32), range(8)):
        # a0 to a7: row g for i in 0, 1, 4, 5, else g + 8; column 2 t + i % 2, for i >= 4 plus 8
        left[lane, i] = a[lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)]
    kind = "f16" if dtype == torch.float16 else "bf16"
    found = multiply(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
        lanes_words(left, dtype), lanes_words(right_operand(b), dtype), torch.tensor(accumulators(c)),
    )  # fmt: skip
    assert np.array_equal(found.numpy(), accumulators(a @ b + c))


def test_products_in_tf32():
    a, b, c = small_integers(16, 8), small_integers(8, 8), small_integers(16, 8)
    left, right = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        # a0 to a3: row g for i = 0, 2, else g + 8; column t, for i >= 2 plus 4
        left[lane, i] = a[lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)]
    for lane, i in itertools.product(range(32), range(2)):
        right[lane, i] = b[lane % 4 + 4 * i, lane // 4]
    found = multiply(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        lanes_words(left, torch.float32), lanes_words(right, torch.float32),
        torch.tensor(accumulators(c)),
    )  # fmt: skip
    assert np.array_equal(found.numpy(), accumulators(a @ b + c))


@pytest.mark.parametrize("columns", [16, 32])
def test_sparse_products(columns):
    """Rows of a group of four threads have the same pattern; in others it differs."""
    patterns = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0, 1), (1, 3)]
    entries = small_integers(16, columns // 2)
    a, metadata = np.zeros((16, columns), np.float32), np.zeros(32, np.uint32)
    for row, four, k in itertools.product(range(16), range(columns // 4), range(2)):
        a[row, 4 * four + patterns[row % 8][k]] = entries[row, 2 * four + k]
    for lane in range(32):
        first, second = patterns[lane // 4]
        metadata[lane] = 0x11111111 * (first + 4 * second)
    b, c = small_integers(columns, 8), small_integers(16, 8)
    left = np.zeros((32, columns // 4), np.float32)
    for lane, i in itertools.product(range(32), range(columns // 4)):
        # Two entries of four columns, from 4 t on, for i >= 4 from 4 t + 16; rows as of dense operands
        left[lane, i] = entries[lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)]
    found = multiply(
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{columns}.row.col.f32.f16.f16.f32",
        lanes_words(left, torch.float16), lanes_words(right_operand(b), torch.float16),
        torch.tensor(accumulators(c)), torch.tensor(metadata.view(np.int32)),
    )  # fmt: skip
    assert np.array_equal(found.numpy(), accumulators(a @ b + c))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_in_shared_memory(transposed):
    """Thread i names row i % 8 of matrix i // 8; lane 4 g + t gets row g, columns 2 t and 2 t + 1 of each."""
    words = torch.arange(4 * 8 * 8, dtype=torch.int16)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    body = f"""
        mov.u32 %r98, %tid.x;
        shl.b32 %r1, %r98, 4;
        mul.wide.u32 %rd7, %r98, 16;
        add.s64 %rd8, %rd1, %rd7;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd8];
        st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{".trans" * transposed}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {{%r2, %r3, %r4, %r5}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
        add.s64 %rd8, %rd0, %rd7;
        st.global.v4.b32 [%rd8], {{%r2, %r3, %r4, %r5}};
    """
    start(body, out, words, shared=512)
    matrices = words.reshape(4, 8, 8)
    matrices = matrices.transpose(1, 2) if transposed else matrices
    expected = [
        [matrices[i, lane // 4, 2 * (lane % 4) :][:2].tolist() for i in range(4)] for lane in range(32)
    ]
    assert out.tolist() == expected


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
    with pytest.raises(ValueError, match="0 arguments for"):
        run(f"{HEAD}.visible .entry k(\n{PARAMETERS}\n)\n.reqntid 32\n{{\nret;\n}}\n", [], (1,), 0, [])


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
