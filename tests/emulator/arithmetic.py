"""Instructions of one thread that touch no memory: factories of what they do, by name."""

import numpy as np

from .numbers import PACKED, TYPES, bits_of, immediate, is_float

COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip

JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

# Those that change no result, or that the functions see.
MODIFIERS = {"rn", "full", "approx", "ftz", "lo", "hi", "wide", "NaN"}


def _by_numbers(function):
    """An instruction whose result is `function(modifiers, *numbers)`, of the type that it names last."""

    def factory(instruction):
        parts, (result, *operands) = instruction.parts, instruction.operands
        kind = parts[-1]
        if not MODIFIERS.issuperset(parts[1:-1]):
            raise NotImplementedError(instruction.text)

        def act(machine, where):
            values = [machine.numbers(operand, kind) for operand in operands]
            with np.errstate(all="ignore"):
                machine.set_numbers(result, function(parts, *values), kind, where)

        return act

    return factory


def _wide(function):
    """Of `mul.wide` and `mad.wide`: products of twice the length, to which a number of that length is added."""

    def factory(instruction):
        parts, (result, a, b, *rest) = instruction.parts, instruction.operands
        kind = parts[-1]
        longer = f"{kind[0]}{2 * bits_of(kind)}"

        def act(machine, where):
            values = [machine.numbers(operand, kind).astype(TYPES[longer]) for operand in (a, b)]
            values += [machine.numbers(operand, longer) for operand in rest]
            machine.set_numbers(result, function(parts, *values), longer, where)

        return act

    return factory


def _mixed(function):
    """Of `add.f32.f16`: a short number and one of fp32."""

    def factory(instruction):
        (result, a, b), short = instruction.operands, instruction.parts[-1]
        if not MODIFIERS.issuperset(instruction.parts[1:-2]):
            raise NotImplementedError(instruction.text)

        def act(machine, where):
            values = machine.numbers(a, short).astype(np.float32), machine.numbers(b, "f32")
            machine.set_numbers(result, function(instruction.parts, *values), "f32", where)

        return act

    return factory


def _multiplication(function):
    plain, wide = _by_numbers(function), _wide(function)
    return lambda instruction: (wide if "wide" in instruction.parts else plain)(instruction)


def _addition(function):
    plain, mixed = _by_numbers(function), _mixed(function)
    is_mixed = ["f32", "f16"], ["f32", "bf16"]
    return lambda instruction: (mixed if instruction.parts[-2:] in is_mixed else plain)(instruction)


def _multiplied(parts, a, b):
    if "hi" not in parts:
        return a * b
    if a.itemsize > 4:
        raise NotImplementedError(".".join(parts))
    longer = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(longer) * b.astype(longer) >> longer(8 * a.itemsize)).astype(a.dtype)


def _multiplied_and_added(parts, a, b, c):
    if a.dtype.kind == "f" and a.itemsize < 8:  # the product is exact
        return (a.astype(np.float64) * b + c).astype(a.dtype)
    return _multiplied(parts, a, b) + c


def _divided(parts, a, b):
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))  # towards zero


def _remainder(parts, a, b):
    b = np.where(b == 0, b.dtype.type(1), b)
    return a - _divided(parts, a, b) * b


def _extreme(propagating, quiet):
    """min or max: NaN loses, but where `.NaN` is asked for."""
    return lambda parts, a, b: (propagating if "NaN" in parts or a.dtype.kind != "f" else quiet)(a, b)


def _logic(function):
    """Of words, or of predicates."""

    def factory(instruction):
        kind, (result, *operands) = instruction.parts[-1], instruction.operands

        def act(machine, where):
            if kind == "pred":
                words = function(*map(machine.predicate, operands))
            else:
                words = function(*(machine.words(operand, bits_of(kind)) for operand in operands))
            machine.set(result, words, where)

        return act

    return factory


def _move(instruction):
    """`mov`, also of a register's parts: `{…}` on either side."""
    kind, (result, source) = instruction.parts[-1], instruction.operands

    def act(machine, where):
        if kind == "pred":
            machine.set(result, machine.predicate(source), where)
        elif isinstance(result, tuple):
            size = bits_of(kind) // 8 // len(result)
            pieces = np.ascontiguousarray(machine.words(source, bits_of(kind))).view(f"u{size}")
            for i, name in enumerate(result):
                if name != "_":
                    machine.set(name, pieces[i :: len(result)], where)
        elif isinstance(source, tuple):
            pieces = np.stack([machine.words(name, bits_of(kind) // len(source)) for name in source], 1)
            machine.set(result, pieces.view(f"u{bits_of(kind) // 8}")[:, 0], where)
        else:
            machine.set(result, machine.words(source, bits_of(kind)), where)

    return act


def _shift(instruction):
    """Beyond the register's length nothing is left but the sign."""
    left, kind = instruction.parts[0] == "shl", instruction.parts[-1]
    result, source, by = instruction.operands
    bits = bits_of(kind)

    def act(machine, where):
        values, count = machine.numbers(source, kind), machine.words(by, 32)
        within = np.minimum(count, bits - 1).astype(values.dtype)
        shifted = values << within if left else values >> within
        if left or kind[0] != "s":
            shifted = np.where(count < bits, shifted, values.dtype.type(0))
        machine.set_numbers(result, shifted, kind, where)

    return act


def _bit_field(instruction):
    kind, (result, source, first, length) = instruction.parts[-1], instruction.operands
    if first.startswith("%") or length.startswith("%"):
        raise NotImplementedError(instruction.text)
    first, length = (int(immediate(operand, "b32")) for operand in (first, length))
    bits = bits_of(kind)
    if not 0 < length <= bits - first:
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        values = machine.numbers(source, kind)
        lifted = values << values.dtype.type(bits - first - length)
        machine.set_numbers(result, lifted >> values.dtype.type(bits - length), kind, where)

    return act


def _compare(instruction):
    """`setp`: with NaN only `nan` and comparisons that end in "u" hold, and `.ne` of fp32 does not. Of packed numbers,
    a predicate each, `p|q`."""
    _, name, *join, kind = instruction.parts
    result, a, b, *other = instruction.operands
    unordered = is_float(kind) and name[-1] == "u"
    compare = COMPARED.get(name[:-1] if unordered else name)
    if name == "nan":
        unordered, compare = True, lambda a, b: a != a
    results = result.split("|")
    if compare is None or len(results) != (2 if kind in PACKED else 1) or (join and kind in PACKED):
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        values = machine.numbers(a, kind), machine.numbers(b, kind)
        holds = compare(*values)
        if is_float(kind):
            has_nan = np.isnan(values[0]) | np.isnan(values[1])
            holds = holds | has_nan if unordered else holds & ~has_nan
        if join:
            holds = JOINED[join[0]](holds, machine.predicate(other[0]))
        for i, predicate in enumerate(results):
            machine.set(predicate, holds[i :: len(results)], where)

    return act


def _select(instruction):
    bits, (result, a, b, predicate) = bits_of(instruction.parts[-1]), instruction.operands

    def act(machine, where):
        chosen = np.where(machine.predicate(predicate), machine.words(a, bits), machine.words(b, bits))
        machine.set(result, chosen, where)

    return act


def _convert(instruction):
    """Floats to nearest even; to integers towards zero, NaN to 0, what is too large to the largest."""
    _, *modifiers, to, source = instruction.parts
    result, *operands = instruction.operands
    is_truncated = is_float(source) and not is_float(to)
    if not {"rn", "relu"}.issuperset(modifiers) and not (is_truncated and modifiers == ["rzi"]):
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        values = [machine.numbers(operand, source) for operand in operands]
        if len(values) == 2:  # the first becomes the upper half
            values = [np.stack(values[::-1], 1).reshape(-1)]
        values = values[0]
        with np.errstate(all="ignore"):
            if "relu" in modifiers:
                values = np.maximum(values, values.dtype.type(0))
            if is_truncated:
                limits = np.iinfo(TYPES[to])
                values = np.nan_to_num(
                    np.trunc(values.astype(np.float64)), posinf=limits.max, neginf=limits.min
                )
                is_largest = values >= limits.max
                values = np.maximum(values, limits.min).astype(TYPES[to])
                values[is_largest] = limits.max
            machine.set_numbers(result, values if is_float(to) else values.astype(TYPES[to]), to, where)

    return act


def _permute_bytes(instruction):
    """`prmt`: each byte of the result is one of eight, or its sign eight times."""
    result, *operands = instruction.operands
    if instruction.parts != ["prmt", "b32"]:
        raise NotImplementedError(instruction.text)

    def act(machine, where):
        a, b, selection = (machine.words(operand, 32) for operand in operands)
        source = np.stack([a, b], 1).view(np.uint8)  # [lanes, 8]
        choice = selection[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(source, (choice & np.uint32(7)).astype(np.int64), 1)
        chosen = np.where(choice & np.uint32(8), (chosen.view(np.int8) >> 7).view(np.uint8), chosen)
        machine.set(result, np.ascontiguousarray(chosen).view(np.uint32)[:, 0], where)

    return act


FACTORIES = {
    "mov": _move,
    "add": _addition(lambda _, a, b: a + b),
    "sub": _addition(lambda _, a, b: a - b),
    "mul": _multiplication(_multiplied),
    "mad": _multiplication(_multiplied_and_added),
    "fma": _by_numbers(_multiplied_and_added),
    "div": _by_numbers(_divided),
    "rem": _by_numbers(_remainder),
    "min": _by_numbers(_extreme(np.minimum, np.fmin)),
    "max": _by_numbers(_extreme(np.maximum, np.fmax)),
    "neg": _by_numbers(lambda _, a: -a),
    "abs": _by_numbers(lambda _, a: abs(a)),
    "sqrt": _by_numbers(lambda _, a: np.sqrt(a)),
    "ex2": _by_numbers(lambda _, a: np.exp2(a)),
    "not": _logic(np.invert),
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "shl": _shift,
    "shr": _shift,
    "bfe": _bit_field,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
    "prmt": _permute_bytes,
}
