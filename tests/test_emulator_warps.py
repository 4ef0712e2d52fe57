"""What the emulator makes of instructions of whole warps: who holds what of a matrix is spelt out as in the PTX ISA."""

import itertools

import numpy as np
import pytest
import torch

from .ptx_by_hand import start


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
