"""How often each instruction of a kernel runs: the natural loops of its machine code, weighted by their trips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of SASS: its address, its opcode with modifiers, and the whole text."""

    address: int
    opcode: str
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch goes, or a call, from which ptxas need not return; None of other instructions."""
        found = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\b[^;]*?\b0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        is_conditional = re.search(r"@!?U?P\w+\s+[A-Z]", self.text) is not None
        if self.opcode.startswith("BRA"):
            # A predicate or a register before the target: BRA.U UP0, BRA.DIV UR4, …
            return is_conditional or re.search(r"BRA\S*\s+[^\s0]", self.text) is not None
        return is_conditional or not self.opcode.startswith(("EXIT", "RET", "JMP", "BRX"))


def loop_weights(instructions: Sequence[Instruction], trips: Sequence[int]) -> list[int] | None:
    """How often each instruction runs where loops run `trips` times, in the order in which a program comes to them.

    Loops of one trip may have been unrolled. None where the code's loops are not those of the other trips.
    """
    expected = [trip for trip in trips if trip != 1]
    loops = natural_loops(instructions)
    if loops is None or (loops and len(loops) != len(expected)):
        return None
    weights = [1] * len(instructions)
    for loop, trip in zip(loops, expected, strict=False):
        for i in loop:
            weights[i] *= max(1, trip)
    return weights


def natural_loops(instructions: Sequence[Instruction]) -> list[set[int]] | None:
    """The indices of the instructions of each loop, in the order in which a program comes to the loops; None where a
    loop can be entered in more than one place.

    A jump backwards alone makes no loop: code that is rarely run stands behind the rest and jumps back into it.
    """
    blocks = _blocks(instructions)
    successors = _successors(instructions, blocks)
    order = _reverse_postorder(successors)
    place = {block: i for i, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominator = _dominators(order, place, predecessors)

    def dominates(above: int, block: int) -> bool:
        while place[block] > place[above]:
            block = dominator[block]
        return block == above

    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if place[header] <= place[block]:
                if not dominates(header, block):
                    return None
                body = bodies.setdefault(header, {header})
                pending = [block]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending.extend(predecessors[member])
    return [
        {i for block in bodies[header] for i in blocks[block]}
        for header in sorted(bodies, key=place.__getitem__)
    ]


def _blocks(instructions: Sequence[Instruction]) -> list[range]:
    """Runs of instructions that are entered at their first and left at their last one only."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    starts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.target in index:
            starts.add(index[instruction.target])
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _successors(instructions: Sequence[Instruction], blocks: list[range]) -> list[list[int]]:
    """The blocks that may follow each block, a branch's target first."""
    block_at = {instructions[block.start].address: i for i, block in enumerate(blocks)}
    found = []
    for i, block in enumerate(blocks):
        last = instructions[block.stop - 1]
        following = [block_at[last.target]] if last.target in block_at else []
        if last.falls_through and i + 1 < len(blocks):
            following.append(i + 1)
        found.append(following)
    return found


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    """The blocks that can be reached, each after all that lead to it but for loops, the straight way first."""
    seen, finished = {0}, []
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((successor for successor in rest if successor not in seen), None)
        if following is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return finished[::-1]


def _dominators(
    order: list[int], place: dict[int, int], predecessors: dict[int, list[int]]
) -> dict[int, int]:
    """The last block that every way to a block goes through (Cooper, Harvey, Kennedy, 2001)."""
    dominator = {order[0]: order[0]}
    has_changed = True
    while has_changed:
        has_changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if place[common] > place[other]:
                        common = dominator[common]
                    else:
                        other = dominator[other]
            if dominator.get(block) != common:
                dominator[block] = common
                has_changed = True
    return dominator
