"""Triton's interpreter, with bfloat16 mended, and without what it repeats for nothing.

As of Triton 3.9 it multiplies the bit patterns of bfloat16 in `tl.dot`, casts integers to bit patterns, and truncates
where the hardware rounds to nearest even. Kernels are judged in bfloat16 under these replacements.

Until Triton 3.8 it takes masks of any type, where 3.9 wants bools, which it does not make of a scalar's comparison.

It also looks through all of `triton.language` at every call of a device function, works out every type anew at every
operation, and does every sum and product of 32-bit integers once more in 64 bits: five sixths of its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .interpreter_types import remember_types, remembered


def quicken() -> None:
    """Replaces the language once per launch and module, works out types once per launch, and looks for overflow under
    `checked_overflow` alone."""
    from triton.runtime import interpreter

    patch, call, wrap = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._patch_attr
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(fn)

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            with remembered():
                call(self, *args, **kwargs)
        finally:
            patched.clear()

    def wrap_bare(obj: Any, name: str, member: Any, *rest: Any) -> None:
        # Without the check that it is called from a kernel.
        wrap(obj, name, getattr(member, "__wrapped__", member), *rest)

    interpreter._patch_attr = wrap_bare
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, start
    _check_overflow(False)
    remember_types()
    _refuse_masks_of_numbers()


def _refuse_masks_of_numbers() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _require_bools(mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _require_bools(mask)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _require_bools(mask: Any) -> None:
    if mask.data.dtype != np.bool_:
        raise TypeError(f"mask must be of bools, got {mask.data.dtype}: Triton 3.9 would refuse it")


@contextlib.contextmanager
def checked_overflow() -> Iterator[None]:
    """Sums and products of 32-bit integers that overflow are errors."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)


def _check_overflow(is_checked: bool) -> None:
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(
        interpreter_builder.options, sanitize_overflow=is_checked, debug=is_checked
    )


@contextlib.contextmanager
def exact_bfloat16() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_widen(src.data), target)
        if target == tl.bfloat16 and (source == tl.float32 or not source.is_floating()):
            return TensorHandle(_round(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a = TensorHandle(_widen(a.data), tl.float32)
            b = TensorHandle(_widen(b.data), tl.float32)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
