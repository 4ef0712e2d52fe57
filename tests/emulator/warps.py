"""Instructions of whole warps: products on the tensor core, matrices in shared memory, exchanged registers.

Who holds what is as in the PTX ISA, "Warp-level matrix instructions", `mma.sp` included: lane `4 g + t` of a warp has
words of rows g and g + 8 of the left operand, of column g of the right one. Products in TF32 are of fp32, as those of
Triton's interpreter: tests compare them with fp32.
"""

import numpy as np

from .accesses import registers_of, shared_places
from .machine import WARP
from .memory import FaultError
from .numbers import decoded


def _shuffle(instruction):
    """`shfl.sync` over whole warps."""
    mode, (result, source, lane, clamp, members) = instruction.parts[2], instruction.operands
    if mode not in ("bfly", "idx") or clamp != "31" or members not in ("-1", "0xffffffff"):
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        machine.whole(where, WARP)
        words = machine.words(source, 32).reshape(-1, WARP)
        other = (machine.words(lane, 32) % WARP).astype(np.int64).reshape(-1, WARP)
        if mode == "bfly":
            other = np.arange(WARP) ^ other
        machine.set(result, np.take_along_axis(words, other, 1).reshape(-1), where)

    return act


def _matrix_rows(machine, address, count, where):
    """Where the eight rows of each of `count` matrices begin in shared memory, `[warps, count, 8]`; of the warps that
    execute, and which these are."""
    warps = machine.whole(where, WARP)
    lanes = np.zeros((len(warps), WARP), bool)
    lanes[warps, : 8 * count] = True
    return shared_places(machine, address, lanes.reshape(-1), 16).reshape(-1, count, 8), warps


def _load_matrices(instruction):
    registers, address = registers_of(instruction.operands[0]), instruction.operands[1]

    def act(machine, where):
        rows, warps = _matrix_rows(machine, address, len(registers), where)
        matrices = machine.shared.view(np.uint16)[rows[..., None] // 2 + np.arange(8)]
        if "trans" in instruction.parts:
            matrices = matrices.swapaxes(2, 3)
        words = np.zeros((len(warps), len(registers), WARP), np.uint32)
        words[warps] = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(registers), WARP)
        for i, register in enumerate(registers):
            machine.set(register, words[:, i].reshape(-1), where)

    return act


def _store_matrices(instruction):
    address, registers = instruction.operands[0], registers_of(instruction.operands[1])

    def act(machine, where):
        rows, warps = _matrix_rows(machine, address, len(registers), where)
        words = np.stack([machine.words(register, 32).reshape(-1, 8, 4) for register in registers], 1)
        matrices = words[warps].view(np.uint16)
        if "trans" in instruction.parts:
            matrices = matrices.swapaxes(2, 3)
        machine.shared.view(np.uint16)[rows[..., None] // 2 + np.arange(8)] = matrices

    return act


def _fragments(machine, registers, kind):
    """Numbers of registers: `[registers, warps, g, t, 2]` in 16 bits, `[registers, warps, g, t]` of TF32, as fp32."""
    words = np.stack([machine.words(register, 32) for register in registers])
    if kind == "tf32":
        return decoded(words, "f32").reshape(len(registers), -1, 8, 4)
    return decoded(words, kind + "x2").astype(np.float32).reshape(len(registers), -1, 8, 4, 2)


def _left(values):
    """`[2 x halves of K, warps, g, t, …]` as matrices `[warps, 16, K]`."""
    halves, warps = len(values) // 2, values.shape[1]
    # (half of K, half of the rows, warps, g, columns of the half)
    values = values.reshape(halves, 2, warps, 8, -1)
    return values.transpose(2, 1, 3, 0, 4).reshape(warps, 16, -1)


def _right(values):
    """`[pieces of K, warps, g, t, …]` as matrices `[warps, K, 8]`."""
    pieces, warps = values.shape[:2]
    return values.reshape(pieces, warps, 8, -1).transpose(1, 0, 3, 2).reshape(warps, -1, 8)


def _with_zeros(values, metadata):
    """A sparse left operand's fragments `[registers, warps, g, t, 2]` with their zeros, `[…, 4]`.

    `metadata [warps, g, t]`: pairs of bits say where in four columns two entries stand. Which thread's bits are taken
    depends on the shape, so those of a group and of its row's fours have to be the same.
    """
    fours = metadata[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    if (fours != fours[..., :1, :1]).any():
        raise NotImplementedError("metadata that differ within a group of four threads")
    places = fours[:, :, 0, 0, None] >> np.array([0, 2], np.uint32) & np.uint32(3)  # [warps, g, 2]
    if (places[..., 0] >= places[..., 1]).any():
        raise FaultError("metadata are out of order")
    found = np.zeros((*values.shape[:-1], 4), np.float32)
    places = np.broadcast_to(places[None, :, :, None].astype(np.int64), values.shape)
    np.put_along_axis(found, places, values, -1)
    return found


def _multiply(instruction):
    """`mma` and `mma.sp` with fp32 accumulators."""
    parts = instruction.parts
    shape = next(part for part in parts if part.startswith("m16n8k"))
    kind, is_sparse = parts[-2], parts[1].startswith("sp")
    result, left, right, start, *sparsity = instruction.operands
    if [parts[-4], parts[-3], parts[-1]] != ["f32", kind, "f32"] or sparsity[1:] not in ([], ["0x0"]):
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        warps = machine.whole(where, WARP)
        a, b = (_fragments(machine, registers, kind) for registers in (left, right))
        if is_sparse:
            metadata = machine.words(sparsity[0], 32).reshape(-1, 8, 4)
            a = _with_zeros(a, np.where(warps[:, None, None], metadata, metadata[warps][:1]))
        a, b = _left(a), _right(b)
        if a.shape[2] != int(shape[6:]):
            raise NotImplementedError(instruction.text)
        acc = np.stack([machine.numbers(register, "f32") for register in start]).reshape(2, 2, -1, 8, 4)
        acc = acc.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        with np.errstate(all="ignore"):
            acc = (acc + a.astype(np.float64) @ b).astype(np.float32)
        values = acc.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for register, value in zip(result, values, strict=True):
            machine.set_numbers(register, value, "f32", where)

    return act


FACTORIES = {"shfl": _shuffle, "ldmatrix": _load_matrices, "stmatrix": _store_matrices, "mma": _multiply}
