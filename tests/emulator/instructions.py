"""What each instruction of a kernel does."""

from . import accesses, arithmetic, warps
from .machine import WARP, Branch
from .memory import FaultError

# Threads are in lockstep, and copies done at once.
NOTHING = ("membar", "fence", "cp.async.commit_group", "cp.async.wait_group")


def steps_of(kernel):
    """A function of the machine for each instruction, or a `Branch`."""
    return [_step(instruction, kernel) for instruction in kernel.code]


def _step(instruction, kernel):
    if instruction.parts[0] in ("bra", "ret"):
        is_return = instruction.parts[0] == "ret"
        target = len(kernel.code) if is_return else kernel.labels[instruction.operands[0]]
        return Branch(target, instruction.guard and (lambda machine: _guard(machine, instruction)))
    if instruction.opcode.startswith(NOTHING):
        return lambda machine: None
    act = _factory(instruction)(instruction)

    def step(machine):
        where = machine.active
        if instruction.guard:
            guard = _guard(machine, instruction)
            where = guard if where is None else guard & where
            if not where.any():
                return
        try:
            act(machine, where)
        except FaultError as fault:
            raise FaultError(f"{fault}: {instruction.text}") from None

    return step


def _guard(machine, instruction):
    holds = machine.predicate(instruction.guard)
    return ~holds if instruction.is_negated else holds


def _factory(instruction):
    if instruction.opcode == "bar.sync":
        return _barrier(lambda machine: machine.kernel.threads)
    if instruction.opcode == "bar.warp.sync":
        return _barrier(lambda machine: WARP)
    for beginning, factory in accesses.FACTORIES.items():
        if f"{instruction.opcode}.".startswith(f"{beginning}."):
            return factory
    name = instruction.parts[0]
    found = warps.FACTORIES.get(name) or arithmetic.FACTORIES.get(name)
    if found is None:
        raise NotImplementedError(instruction.text)
    return found


def _barrier(threads_of):
    """All of so many threads have to arrive."""
    return lambda _: lambda machine, where: machine.whole(where, threads_of(machine))
