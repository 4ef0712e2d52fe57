"""What Triton's language finds out anew at every operation of an interpreted kernel, found out once per launch.

It makes every type and shape from its parts, compares them by parts, and works out for every pair of operands how to
cast and broadcast them. All of that follows from types, never from the numbers of a tensor, and takes more than half of
a kernel's time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Remembered:
    """What one launch found out. Keys name objects by `id`, so each value holds the objects of its key."""

    def __init__(self) -> None:
        self.blocks: dict[tuple, Any] = {}
        """Block types, by element type and shape: equal types are one object."""
        self.fields: dict[int, dict[str, Any]] = {}
        """The fields of a tensor besides its numbers, by type."""
        self.answers: dict[tuple, tuple] = {}
        """What a function answered about types, by its name and the types."""


_now: Remembered | None = None


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside, what follows from types is found out once."""
    global _now
    before, _now = _now, Remembered()
    try:
        yield
    finally:
        _now = before


def remember_types() -> None:
    """Replaces functions of Triton's language by ones that answer the same; for good, for use under `remembered`."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    _make_blocks_once(core)
    _convert_blocks_once(core.block_type)
    _derive_fields_once(core.tensor)
    _look_at_values_less(core)
    _check_operands_once(core.tensor, semantic.TritonSemantic)
    _broadcast_by_types(semantic.TritonSemantic)
    _promote_once(semantic.TritonSemantic)
    _remember_numpy_types(interpreter)


def _make_blocks_once(core: Any) -> None:
    block_type, constexpr, language_tuple = core.block_type, core.constexpr, core.tuple
    initialise = block_type.__init__

    def key(element_ty: Any, shape: Any) -> tuple:
        sizes = shape.values if type(shape) is language_tuple else shape
        return (id(element_ty), *[size.value if type(size) is constexpr else size for size in sizes])

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _now is not None and cls is block_type and len(args) == 2:
            found = _now.blocks.get(key(*args))
            if found is not None:
                return found
        return object.__new__(cls)

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if type(self) is not block_type or not self.__dict__:
            initialise(self, element_ty, shape)
            if _now is not None and type(self) is block_type:
                _now.blocks[key(element_ty, shape)] = self

    block_type.__new__, block_type.__init__ = new, init


def _convert_blocks_once(block_type: Any) -> None:
    translate, exchange = block_type.to_ir, block_type.with_element_ty

    def to_ir(self: Any, builder: Any) -> Any:
        if _now is None:
            return translate(self, builder)
        key = ("to_ir", id(self))
        if key not in _now.answers:
            _now.answers[key] = (translate(self, builder), self)
        return _now.answers[key][0]

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        if _now is None:
            return exchange(self, scalar_ty)
        key = ("with_element_ty", id(self), id(scalar_ty))
        if key not in _now.answers:
            _now.answers[key] = (exchange(self, scalar_ty), self, scalar_ty)
        return _now.answers[key][0]

    block_type.to_ir, block_type.with_element_ty = to_ir, with_element_ty


def _derive_fields_once(tensor: Any) -> None:
    initialise = tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        fields = None if _now is None else _now.fields.get(id(type))
        if fields is None:
            initialise(self, handle, type)
            if _now is not None:
                _now.fields[id(type)] = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.__dict__.update(fields)
            self.handle = handle

    tensor.__init__ = init


def _look_at_values_less(core: Any) -> None:
    """Most values are no constants, most types compared are one object, and most indices are plain numbers."""
    unwrap, equal, item = core._unwrap_if_constexpr, core.dtype.__eq__, core.tuple.__getitem__
    constexpr = core.constexpr
    types = (core.dtype, core.block_type, core.pointer_type)
    plain = {int, float, bool, str, type(None), core.tensor, *types}

    def unwrap_if_constexpr(o: Any) -> Any:
        kind = type(o)
        if kind in plain:
            return o
        return o.value if kind is constexpr else unwrap(o)

    def is_equal(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def get_item(self: Any, index: Any) -> Any:
        return self.values[index] if type(index) is int else item(self, index)

    core._unwrap_if_constexpr = unwrap_if_constexpr
    core.dtype.__eq__, core.tuple.__getitem__ = is_equal, get_item


def _check_operands_once(tensor: Any, semantic: Any) -> None:
    """Types say which operands are cast. Where none is, tensors are broadcast at most, and a number becomes a tensor
    that depends on the number and the other operand's type."""
    check = semantic.binary_op_type_checking_impl
    known = (tensor, int, float)

    def check_types(self: Any, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> Any:
        left_is, right_is = type(lhs), type(rhs)
        if _now is None or left_is not in known or right_is not in known:
            return check(self, lhs, rhs, *flags, **named)
        # Numbers by their text: 1, 1.0, 0.0 and -0.0 differ.
        left_key = id(lhs.type) if left_is is tensor else repr(lhs)
        right_key = id(rhs.type) if right_is is tensor else repr(rhs)
        key = ("check", left_key, right_key, flags, *named.items())
        found = _now.answers.get(key)
        if found is not None:
            if left_is is right_is:
                return self.broadcast_impl_value(lhs, rhs)
            return (lhs, found[0]) if left_is is tensor else (found[0], rhs)
        left, right = check(self, lhs, rhs, *flags, **named)
        if left_is is right_is is tensor:
            if left.dtype is lhs.dtype and right.dtype is rhs.dtype:
                _now.answers[key] = (lhs.type, rhs.type)
        elif left is lhs:
            _now.answers[key] = (right, lhs.type)
        elif right is rhs:
            _now.answers[key] = (left, rhs.type)
        return left, right

    semantic.binary_op_type_checking_impl = check_types


def _broadcast_by_types(semantic: Any) -> None:
    broadcast = semantic.broadcast_impl_value

    def spread(self: Any, value: Any, to: Any) -> Any:
        if value.type is to:
            return value
        if value.type.is_block():
            return self.tensor(self.builder.create_broadcast(value.handle, to.shape.values), to)
        return self.tensor(self.builder.create_splat(to, value.handle), to)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type is rhs.type:
            return lhs, rhs
        if _now is None:
            return broadcast(self, lhs, rhs)
        key = ("broadcast", id(lhs.type), id(rhs.type))
        found = _now.answers.get(key)
        if found is not None:
            return spread(self, lhs, found[0]), spread(self, rhs, found[1])
        left, right = broadcast(self, lhs, rhs)
        # Not where a block got new axes: that is more than one step.
        if all(len(old.shape) in (0, len(new.shape)) for old, new in ((lhs, left), (rhs, right))):
            _now.answers[key] = (left.type, right.type, lhs.type, rhs.type)
        return left, right

    semantic.broadcast_impl_value = broadcast_impl_value


def _promote_once(semantic: Any) -> None:
    promote = semantic.computation_type_impl

    def computation_type_impl(
        self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, *flags: bool
    ) -> Any:
        if _now is None:
            return promote(self, a_ty, a_is_scalar, b_ty, b_is_scalar, *flags)
        key = ("promote", id(a_ty), a_is_scalar, id(b_ty), b_is_scalar, *flags)
        if key not in _now.answers:
            _now.answers[key] = (promote(self, a_ty, a_is_scalar, b_ty, b_is_scalar, *flags), a_ty, b_ty)
        return _now.answers[key][0]

    semantic.computation_type_impl = computation_type_impl


def _remember_numpy_types(interpreter: Any) -> None:
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def get_np_dtype(tt_dtype: Any) -> Any:
        name = tt_dtype.name
        if name not in found:
            found[name] = find(tt_dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype
