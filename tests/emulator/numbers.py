"""Types of PTX as NumPy's, and values as the words that registers hold."""

import numpy as np

TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip

# Several numbers in one register, the first in its lower bits: (the register's type, each number's).
PACKED = {"f16x2": ("b32", "f16"), "bf16x2": ("b32", "bf16"), "f32x2": ("b64", "f32")}


def bits_of(kind):
    """Of a type's register."""
    return int(PACKED[kind][0][1:]) if kind in PACKED else int(kind.lstrip("bfsu"))


def is_float(kind):
    return kind.startswith(("f", "bf"))


def decoded(words, kind):
    """Numbers of words that are as long as the type, bfloat16 as float32; of packed ones all, a word's in a row."""
    words = np.ascontiguousarray(words)
    if kind in PACKED:
        kind = PACKED[kind][1]
        words = words.view(f"u{bits_of(kind) // 8}")
    if kind == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(TYPES[kind])


def encoded(values, kind):
    """The words of `decoded`; to bfloat16 float32 is rounded to nearest even."""
    if kind in PACKED:
        register, kind = PACKED[kind]
        return encoded(values, kind).view(f"u{bits_of(register) // 8}")
    if kind == "bf16":
        words = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (words + np.uint32(0x7FFF) + (words >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
    return np.ascontiguousarray(values, TYPES[kind]).view(f"u{bits_of(kind) // 8}")


def immediate(text, kind):
    """A literal's word."""
    size = bits_of(kind) // 8
    if text == "global_smem":  # all of shared memory
        value = 0
    elif text[:2] in ("0f", "0d"):
        if len(text) != 2 + 2 * size:
            raise NotImplementedError(f"{text} as {kind}")
        value = int(text[2:], 16)
    else:
        value = int(text.rstrip("U"), 0)
    return np.array(value % 2 ** (8 * size), f"u{size}")
