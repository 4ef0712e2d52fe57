"""Instructions that touch memory: factories of what they do, by the beginning of their opcodes."""

import numpy as np

from .memory import FaultError
from .numbers import TYPES, bits_of, decoded


def registers_of(operand):
    """A vector's, or the one that there is."""
    return operand if isinstance(operand, tuple) else (operand,)


def _addresses(machine, address, where):
    """Of the lanes of `where`, in global memory."""
    found = machine.words(address.base, 64) + np.uint64(address.offset % 2**64)
    return found if where is None else found[where]


def shared_places(machine, address, where, size):
    """Where the `size` bytes at an address are in shared memory, of the lanes of `where`."""
    offsets = machine.numbers(address.base, "s32").astype(np.int64) + address.offset
    starts = machine.shared_start
    if where is not None:
        offsets, starts = offsets[where], starts[where]
    if (offsets % size).any():
        raise FaultError(f"an access of {size} bytes of shared memory is misaligned")
    if ((offsets < 0) | (offsets + size > machine.shared_size)).any():
        raise FaultError("an access lies outside of shared memory")
    return starts + offsets


def _all_lanes(machine, words, where):
    """Words of the lanes of `where`, with anything for the others."""
    if where is None:
        return words
    found = np.zeros(machine.lanes, words.dtype)
    found[where] = words
    return found


def _parameter(instruction):
    kind, (result, address) = instruction.parts[-1], instruction.operands

    def act(machine, where):
        value = np.frombuffer(machine.arguments[address.base], TYPES[kind], 1, address.offset)
        machine.set_numbers(result, np.repeat(value, machine.lanes), kind, where)

    return act


def _load(instruction):
    registers, address = registers_of(instruction.operands[0]), instruction.operands[1]
    kind, is_shared = instruction.parts[-1], _is_shared(instruction)
    size = bits_of(kind) // 8

    def act(machine, where):
        source, places = _located(machine, address, where, size, len(registers), is_shared, is_write=False)
        for i, register in enumerate(registers):
            values = decoded(_all_lanes(machine, source[places + i], where), kind)
            machine.set_numbers(register, values, kind, where)

    return act


def _store(instruction):
    address, registers = instruction.operands[0], registers_of(instruction.operands[1])
    size, is_shared = bits_of(instruction.parts[-1]) // 8, _is_shared(instruction)

    def act(machine, where):
        target, places = _located(machine, address, where, size, len(registers), is_shared, is_write=True)
        for i, register in enumerate(registers):
            words = machine.words(register, 8 * size)
            target[places + i] = words if where is None else words[where]

    return act


def _is_shared(instruction):
    return any(part.startswith("shared") for part in instruction.parts)


def _located(machine, address, where, size, count, is_shared, *, is_write):
    """Memory as words of `size` bytes, and where in it each lane's `count` words begin."""
    if is_shared:
        return machine.shared.view(f"u{size}"), shared_places(machine, address, where, size * count) // size
    places = machine.memory.locate(_addresses(machine, address, where), size * count, is_write=is_write)
    return machine.memory.words(size), places // size


def _copy(instruction):
    """`cp.async`, at once: bytes of global memory into shared memory, or zeros."""
    target, source, size, *present = instruction.operands
    size = int(size, 0)

    def act(machine, where):
        wanted = there = machine.executing(where)
        if present:
            count = machine.words(present[0], 32)
            there = wanted & (count > 0)
            if not np.isin(count[wanted], (0, size)).all():
                raise NotImplementedError(f"a part of {size} bytes")
        copied = np.zeros((machine.lanes, size), np.uint8)
        places = machine.memory.locate(_addresses(machine, source, there), size, is_write=False)
        copied[there] = machine.memory.bytes[places[:, None] + np.arange(size)]
        places = shared_places(machine, target, wanted, size)
        machine.shared[places[:, None] + np.arange(size)] = copied[wanted]

    return act


def _prefetch(instruction):
    """Nothing but a look at the addresses: of a byte each, or of as many as are said, in multiples of 16."""
    address, *sizes = instruction.operands

    def act(machine, where):
        addresses, size = _addresses(machine, address, where), np.uint64(1)
        if sizes:
            size = machine.words(sizes[0], 32).astype(np.uint64)
            size = size if where is None else size[where]
            if ((addresses | size) % np.uint64(16)).any():
                raise FaultError("a prefetched piece of memory is misaligned")
        outside = ~machine.memory.holds(addresses, size)
        if outside.any():
            raise FaultError(f"{outside.sum()} of {len(addresses)} prefetches lie outside of every tensor")

    return act


def _atomic(instruction):
    """One lane after the other."""
    *_, what, kind = instruction.parts
    result, address, operand = instruction.operands
    size = bits_of(kind) // 8
    if what not in ("add", "exch") or kind[0] not in "bus":
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        lanes = np.arange(machine.lanes) if where is None else np.flatnonzero(where)
        target, places = _located(machine, address, where, size, 1, False, is_write=True)
        values, before = machine.words(operand, 8 * size), np.zeros(machine.lanes, f"u{size}")
        for lane, place in zip(lanes, places, strict=True):
            before[lane] = target[place]
            if what == "add":
                target[place : place + 1] += values[lane]
            else:
                target[place] = values[lane]
        machine.set(result, before, where)

    return act


FACTORIES = {
    "ld.param": _parameter,
    "ld": _load,
    "st": _store,
    "cp.async.ca.shared": _copy,
    "cp.async.cg.shared": _copy,
    "cp.async.bulk.prefetch": _prefetch,
    "prefetch": _prefetch,
    "atom": _atomic,
}
