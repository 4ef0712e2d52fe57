"""The kernels of a call, ready to be started again on other tensors, with what the library computes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.launch import Launch
from ..library import LibraryCall
from ..undisturbed import undisturbed
from .places import IN_PLACE, Part, Places, SideBySide, storage_of

# Of a layer; one that meets more kinds of calls forgets them and begins again.
MAX_RECORDINGS = 64


class _Start(NamedTuple):
    """One kernel to start, or one call of the library.

    A kernel takes addresses. `pointers`: (index of an argument, what it points into, by how many bytes); `tuples`:
    (index, the same two for each member) of arguments that are tuples of pointers. The library takes tensors. `views`:
    (index, what holds it, which part of that or None for all).
    """

    run: Callable[..., Sequence[Tensor] | None]
    arguments: list[Any]
    pointers: tuple[tuple[int, int, int], ...] = ()
    tuples: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()
    views: tuple[tuple[int, int, Part | None], ...] = ()


class Recording(NamedTuple):
    """The kernels of one call, and the library's calls between them.

    Attributes:
        workspace_bytes: of memory that they share with one another alone.
        kept: keeps alive what launches name as kept.
        reads: which of the fixed tensors the library reads.
        given: of each output, whether the library makes it, anew every time.
    """

    starts: tuple[_Start, ...]
    workspace_bytes: int
    kept: tuple[Tensor, ...]
    reads: tuple[int, ...]
    given: tuple[bool, ...]

    def start(self, *tensors: Tensor) -> list[Tensor]:
        """Start them on the call's tensors, in the order of recording, but for outputs that the library makes; on its
        workspace; and on the fixed tensors of `reads`. Returns the outputs that the library makes."""
        bases = (*map(Tensor.data_ptr, tensors), 0)  # the last one is that of addresses that stay
        made: list[Tensor] = []
        for run, template, pointers, tuples, views in self.starts:
            arguments = template.copy()
            for index, base, offset in pointers:
                arguments[index] = bases[base] + offset
            for index, members in tuples:
                arguments[index] = tuple([bases[base] + offset for base, offset in members])
            for index, holder, part in views:
                arguments[index] = tensors[holder] if part is None else part.view(tensors[holder])
            found = run(*arguments)
            if found:
                made += found
        return made


def record(
    steps: Sequence[object],
    started: Sequence[Any],
    tensors: Sequence[Tensor | SideBySide],
    fixed: Sequence[Tensor],
    *,
    outputs: int,
) -> Recording | None:
    """The kernels and calls of the library that `steps` have started, `started` being what each gave.

    Args:
        tensors: of the call, each in a storage of its own that another call has elsewhere.
        fixed: others that stay where they are, besides what launches name as kept.
        outputs: how many of the tensors, the last ones, the steps must have written, or the library made.

    Returns:
        None where a step is neither, or is interpreted, where two of the tensors share memory, where no step has met
        one of the outputs, or where the library makes what is no output, or reads a part of what stays.
    """
    made = [t for step, own in zip(steps, started, strict=True) if isinstance(step, LibraryCall) for t in own]
    inputs, results = tensors[: len(tensors) - outputs], tensors[len(tensors) - outputs :]
    given = tuple(any(result is own for own in made) for result in results)
    if [id(result) for result, is_given in zip(results, given, strict=True) if is_given] != [*map(id, made)]:
        return None
    written = [result for result, is_given in zip(results, given, strict=True) if not is_given]
    kept = tuple(tensor for step in steps if isinstance(step, Launch) for tensor in step.kept)
    places = Places([*inputs, *written], fixed, kept)
    if not places.are_apart:
        return None
    starts = []
    for step, own in zip(steps, started, strict=True):
        start = _start_of(step, own, places)
        if start is None:
            return None
        starts.append(start)
    count = len(places.tensors)
    if not places.met.issuperset(range(count - len(written), count)):
        return None
    if places.hold_any(map(storage_of, made)):
        return None
    return Recording(tuple(starts), places.workspace.nbytes, kept, tuple(places.reads), given)


def _start_of(step: object, started: Any, places: Places) -> _Start | None:
    if isinstance(step, LibraryCall):
        return _library_start(step, places)
    if isinstance(step, Launch) and started is not None:
        return _kernel_start(step, started, places)
    return None


def _kernel_start(launch: Launch, compiled: Any, places: Places) -> _Start:
    arguments = [*launch.arguments]
    arguments += [launch.constexprs[name] for name in launch.kernel.arg_names[len(arguments) :]]
    pointers, tuples = [], []
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            base, offset = places.of(argument)
            arguments[index] = offset if base == IN_PLACE else None
            if base != IN_PLACE:
                pointers.append((index, base, offset))
        elif isinstance(argument, tuple) and index < len(launch.arguments):
            members = tuple(map(places.of, argument))
            stay = all(base == IN_PLACE for base, _ in members)
            arguments[index] = tuple(address for _, address in members) if stay else None
            if not stay:
                tuples.append((index, members))
    return _Start(compiled[(*launch.grid, 1, 1)[:3]], arguments, tuple(pointers), tuple(tuples))


def _library_start(call: LibraryCall, places: Places) -> _Start | None:
    views = []
    for index, tensor in enumerate(call.tensors):
        if tensor is None:
            continue
        found = places.view_of(tensor)
        if found is None:
            return None
        views.append((index, *found))
    return _Start(_undisturbed(call.compute), [None] * len(call.tensors), views=tuple(views))


def _undisturbed(compute: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    def run(*tensors: Any) -> Sequence[Tensor]:
        with undisturbed(tensors[0]):
            return compute(*tensors)

    return run
