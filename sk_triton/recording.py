"""The kernels of a call, ready to be started again on other tensors: their arguments as addresses into these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .kernels.launch import Launch

# Of a layer; one that meets more kinds of calls forgets them and begins again.
MAX_RECORDINGS = 64
# Bytes; Triton specialises for addresses that 16 divides.
_ALIGNMENT = 256


class _Start(NamedTuple):
    """One kernel to start.

    `pointers`: (index of an argument, what it points into, by how many bytes); `tuples`: (index, the same two for each
    member) of arguments that are tuples of pointers.
    """

    run: Callable[..., object]
    arguments: list[Any]
    pointers: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class Recording(NamedTuple):
    """The kernels of one call.

    Attributes:
        workspace_bytes: of memory that they share with one another alone.
        kept: keeps alive what their launches name as kept.
    """

    starts: tuple[_Start, ...]
    workspace_bytes: int
    kept: tuple[Tensor, ...]

    def start(self, *bases: int) -> None:
        """Start them: `bases` are the addresses of the call's tensors, in the order of recording, and then that of its
        workspace."""
        bases = (*bases, 0)  # the last one is that of addresses that stay
        for run, template, pointers, tuples in self.starts:
            arguments = template.copy()
            for index, base, offset in pointers:
                arguments[index] = bases[base] + offset
            for index, members in tuples:
                arguments[index] = tuple([bases[base] + offset for base, offset in members])
            run(*arguments)


class Packing:
    """Tensors side by side in one piece of memory, each with all of its own storage.

    Attributes:
        nbytes: of that memory.
        offsets: by the address of a storage, where it begins there.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.nbytes = 0
        self.offsets: dict[int, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> int:
        """Where the tensor's storage begins."""
        storage = storage_of(tensor)
        if storage not in self.offsets:
            self.offsets[storage] = self.nbytes
            self.nbytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        return self.offsets[storage]


def record(
    steps: Sequence[object],
    started: Sequence[Any],
    tensors: Sequence[Tensor | Packing],
    fixed: Iterable[Tensor],
    *,
    outputs: int,
) -> Recording | None:
    """The kernels that `steps` have started, `started` being what each gave.

    Args:
        tensors: of the call, each in a storage of its own that another call has elsewhere.
        fixed: others that stay where they are, besides what launches name as kept.
        outputs: how many of the tensors, the last ones, the kernels must have written.

    Returns:
        None where a step is no kernel launch, or is interpreted, where two of the tensors share memory, or where no
        kernel has met one of the outputs.
    """
    kept = tuple(tensor for step in steps if isinstance(step, Launch) for tensor in step.kept)
    stays = {storage_of(tensor) for tensor in (*fixed, *kept)}
    # Of a storage: what holds it, and the address where that would begin.
    origins: dict[int, tuple[int, int]] = {}
    for base, tensor in enumerate(tensors):
        if isinstance(tensor, Packing):
            own = {storage: storage - offset for storage, offset in tensor.offsets.items()}
        else:
            own = {storage_of(tensor): tensor.data_ptr()}
        if own.keys() & (origins.keys() | stays):
            return None
        origins |= {storage: (base, address) for storage, address in own.items()}
    workspace = Packing()
    in_workspace, in_place = len(tensors), len(tensors) + 1
    met = set()

    def place(tensor: Tensor) -> tuple[int, int]:
        """What a tensor's address points into, and by how many bytes."""
        storage = storage_of(tensor)
        if storage in stays:
            return in_place, tensor.data_ptr()
        if storage not in origins:
            return in_workspace, workspace.add(tensor) + tensor.data_ptr() - storage
        base, origin = origins[storage]
        met.add(base)
        return base, tensor.data_ptr() - origin

    starts = []
    for step, compiled in zip(steps, started, strict=True):
        if compiled is None or not isinstance(step, Launch):
            return None
        arguments = [*step.arguments]
        arguments += [step.constexprs[name] for name in step.kernel.arg_names[len(arguments) :]]
        pointers, tuples = [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                base, offset = place(argument)
                arguments[index] = offset if base == in_place else None
                if base != in_place:
                    pointers.append((index, base, offset))
            elif isinstance(argument, tuple) and index < len(step.arguments):
                members = tuple(map(place, argument))
                stay = all(base == in_place for base, _ in members)
                arguments[index] = tuple(address for _, address in members) if stay else None
                if not stay:
                    tuples.append((index, members))
        starts.append(_Start(compiled[(*step.grid, 1, 1)[:3]], arguments, tuple(pointers), tuple(tuples)))
    if not met.issuperset(range(len(tensors) - outputs, len(tensors))):
        return None
    return Recording(tuple(starts), workspace.nbytes, kept)


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()
