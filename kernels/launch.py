"""A kernel launch, prepared but not run: so that it can be run, compiled for an absent chip, or counted."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """`kernel[grid](*arguments, **constexprs, **options)`; calling it runs it.

    An argument may be a tuple of tensors, of which the kernel reads each at an address of its own.

    `options` holds num_warps, num_stages and what else the compiler takes; `trips`, how often each run-time loop of the
    kernel runs, in source order, 0 where nobody knows; `kept`, those of the tensors that later launches go on using, at
    the same address.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    trips: tuple[int, ...] = ()
    kept: tuple[Any, ...] = ()

    def __call__(self) -> Any:
        """Run it; returns Triton's compiled kernel, or None from the interpreter."""
        return self.kernel[self.grid](*self.arguments, **self.constexprs, **self.compile_options)

    @property
    def compile_options(self) -> dict[str, Any]:
        """Options for Triton's compiler, on the GPUs that this PyTorch is built for."""
        return self.options_for(is_amd=torch.version.hip is not None)

    def options_for(self, *, is_amd: bool) -> dict[str, Any]:
        """Options for Triton's compiler. Fused multiply-adds are asked for: Triton 3.10 leaves them out by default. For
        AMD's chips a limit of registers is refused."""
        options = {**self.options, "enable_fp_fusion": True}
        if is_amd:
            options.pop("maxnreg", None)
        return options


def flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """A launch's arguments, the members of a tuple one by one."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from argument
        else:
            yield argument
