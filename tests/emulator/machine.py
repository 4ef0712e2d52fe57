"""Threads of many programs in lockstep: their registers, their shared memory, and who is at which instruction."""

from typing import NamedTuple

import numpy as np

from .memory import FaultError
from .numbers import bits_of, decoded, encoded, immediate

WARP = 32
# Each 16 bits of what nobody has written, in registers and in shared memory: NaN as a float of any length.
UNSET = 0x7FFF
SHARED_ALIGNMENT = 64


class Branch(NamedTuple):
    """Where the threads go for which `guard`, a function of the machine, is true; None: all."""

    target: int
    guard: object = None


class Machine:
    """A batch of programs of one kernel; a *lane* is a thread of one of them, in order.

    `programs [count, 3]` are their indices in `grid`, `arguments` the words of the kernel's parameters by name, `steps`
    what each instruction does: a function of the machine, or a `Branch`.
    """

    def __init__(self, kernel, steps, arguments, memory, shared, programs, grid):
        self.kernel, self.steps, self.arguments, self.memory = kernel, steps, arguments, memory
        count = len(programs)
        self.lanes = count * kernel.threads
        self.shared_size = shared
        pitch = -(-shared // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        self.shared = np.full(count * pitch // 2, UNSET, np.uint16).view(np.uint8)
        self.shared_start = np.repeat(np.arange(count) * pitch, kernel.threads)
        """Of each lane's program."""
        self.registers = {"%tid.x": np.tile(np.arange(kernel.threads, dtype=np.uint32), count)}
        for axis, name in enumerate("xyz"):
            own = programs[:, axis].astype(np.uint32)
            self.registers[f"%ctaid.{name}"] = np.repeat(own, kernel.threads)
            self.registers[f"%nctaid.{name}"] = np.full(self.lanes, grid[axis], np.uint32)
        self.active = None
        """The lanes that execute, None for all."""

    def run(self):
        """From the first instruction to the last: those first who are furthest behind, so that lanes meet again."""
        waiting = {0: np.ones(self.lanes, bool)}
        while waiting:
            at = min(waiting)
            lanes = waiting.pop(at)
            self.active = None if lanes.all() else lanes
            while at < len(self.steps) and at not in waiting and not isinstance(self.steps[at], Branch):
                self.steps[at](self)
                at += 1
            if at == len(self.steps):
                continue
            if at in waiting:
                waiting[at] = waiting[at] | lanes
                continue
            target, guard = self.steps[at]
            taken = lanes if guard is None else lanes & guard(self)
            for place, going in ((target, taken), (at + 1, lanes & ~taken)):
                if going.any():
                    waiting[place] = waiting.get(place, False) | going

    def executing(self, where):
        """The lanes of `where`, in which None means all."""
        return np.ones(self.lanes, bool) if where is None else where

    def whole(self, where, threads):
        """Which of the groups of so many adjacent lanes are in `where`; none may be there in part."""
        groups = self.executing(where).reshape(-1, threads)
        if (groups.any(1) != groups.all(1)).any():
            raise FaultError(f"a part of {threads} threads executes what all of them have to")
        return groups[:, 0]

    def type_of(self, register):
        """As it was declared: "pred", "b32", …"""
        types = self.kernel.types
        kind = types.get(register) or types.get(register.rstrip("0123456789"))
        if kind is None:
            raise FaultError(f"there is no register {register}")
        return kind

    def is_register(self, operand):
        return operand[0] == "%" or operand in self.kernel.types

    def predicate(self, operand):
        """Of each lane."""
        if not self.is_register(operand):
            return np.full(self.lanes, operand != "0")
        return self.registers.get(operand, np.zeros(self.lanes, bool))

    def words(self, operand, bits):
        """Of each lane: the lower bits of a register, or a literal."""
        if not self.is_register(operand):
            return np.full(self.lanes, immediate(operand, f"b{bits}"))
        found = self.registers.get(operand)
        if found is None:
            size = bits_of(self.type_of(operand)) // 8
            found = np.full(self.lanes * size // 2, UNSET, np.uint16).view(f"u{size}")
        return found.astype(f"u{bits // 8}", copy=False)

    def numbers(self, operand, kind):
        """Of each lane, as `numbers.decoded`."""
        return decoded(self.words(operand, bits_of(kind)), kind)

    def set(self, register, words, where):
        """Give a register its words in the lanes of `where` (None: all): shorter ones are zero-extended."""
        kind = self.type_of(register)
        if kind != "pred":
            words = words.astype(f"u{bits_of(kind) // 8}", copy=False)
        if where is not None:
            before = self.predicate(register) if kind == "pred" else self.words(register, bits_of(kind))
            words = np.where(where, words, before)
        self.registers[register] = words

    def set_numbers(self, register, values, kind, where):
        """As `set`, of numbers; integers that are shorter than the register keep their sign."""
        words, bits = encoded(values, kind), bits_of(self.type_of(register))
        if kind[0] == "s" and bits > bits_of(kind):
            words = values.astype(f"i{bits // 8}").view(f"u{bits // 8}")
        self.set(register, words, where)
