"""Kernels that are started directly on addresses, as recorded calls do it, run by the interpreter all the same."""

import ctypes

import torch


class Compiled:
    """A compiled kernel as Triton's JIT returns it, run by the interpreter on the addresses it is given."""

    def __init__(self, launch, direct):
        self.launch, self.direct = launch, direct

    def __getitem__(self, grid):
        assert grid == (*self.launch.grid, 1, 1)[:3]

        def start(*arguments):
            launch = self.launch
            names = launch.kernel.arg_names
            assert len(arguments) == len(names)
            count = len(launch.arguments)
            assert dict(zip(names[count:], arguments[count:], strict=True)) == launch.constexprs
            tensors = at(arguments[:count], launch.arguments)
            self.direct.append(launch.kernel)
            launch.kernel[launch.grid](*tensors, **launch.constexprs, **launch.compile_options)

        return start


def at(addresses, likes):
    """Tensors at `addresses` that have the dtypes, shapes and strides of others; what is no tensor as it is.

    What shared a storage shares one again: the interpreter copies each storage once.
    """
    pairs = list(pairs_of(addresses, likes))
    shifts, ends = {}, {}
    for address, like in pairs:
        storage = like.untyped_storage().data_ptr()
        shift = address - like.data_ptr()
        assert shifts.setdefault(storage, shift) == shift
        assert address % 16 == like.data_ptr() % 16
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        stop = like.data_ptr() + extent * like.element_size()
        first, last = ends.get(storage, (like.data_ptr(), stop))
        ends[storage] = min(first, like.data_ptr()), max(last, stop)
    buffers = {
        storage: torch.frombuffer(
            (ctypes.c_char * (stop - start)).from_address(start + shifts[storage]), dtype=torch.uint8
        )
        for storage, (start, stop) in ends.items()
    }

    def moved(address, like):
        if isinstance(like, tuple):
            return tuple(map(moved, address, like))
        if not isinstance(like, torch.Tensor):
            return address
        if not like.numel():
            return like
        storage = like.untyped_storage().data_ptr()
        start, _ = ends[storage]
        own = buffers[storage][like.data_ptr() - start :]
        own = own[: own.numel() // like.element_size() * like.element_size()].view(like.dtype)
        return own.as_strided(like.shape, like.stride())

    return [moved(address, like) for address, like in zip(addresses, likes, strict=True)]


def pairs_of(addresses, likes):
    """The tensors that are not empty, members of tuples too, each after its address."""
    for address, like in zip(addresses, likes, strict=True):
        if isinstance(like, tuple):
            yield from pairs_of(address, like)
        elif isinstance(like, torch.Tensor) and like.numel():
            yield address, like
