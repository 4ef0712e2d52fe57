"""What single instructions of compiled code do, by their names in disassembly."""

from __future__ import annotations

import math
import re

DENSE_CLOCKS = 6
"""Between products of 16 x 8 x 16 on sm_90: an H100's tensor core was busy 60 % of the time with 0.104 of them a clock
for each scheduler; ptxas places those of one warp so far apart."""
SPARSE_CLOCKS = {"16816": 6, "16832": 8}
"""As ptxas places products with a sparse left operand on sm_90. Not measured; on sm_80 they are 6 and 8 as well, where
dense ones are 8."""


def matrix_flop(instruction: str) -> tuple[str, float, bool] | None:
    """(precision, FLOP per warp, whether one warp multiplies alone) of a tensor-core instruction; for one whose left
    operand is sparse, the FLOP of dense ones that take as long.

    None for any other, and for Blackwell's UTCHMMA, whose shape is in a register.
    """
    precision = "bf16" if "BF16" in instruction else "tf32" if "TF32" in instruction else "fp16"
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)\b", instruction):
        return precision, 2.0 * math.prod(map(int, found.groups())), True
    if found := re.match(r"HMMA\.SP\.(168(?:16|32))\b", instruction):
        return precision, 2.0 * 16 * 8 * 16 * SPARSE_CLOCKS[found[1]] / DENSE_CLOCKS, True
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", instruction):
        return precision, 2.0 * math.prod(map(int, found.groups())) / 4, False
    if found := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(bf16|f16|xf32|f32)", instruction):
        names = {"bf16": "bf16", "f16": "fp16", "xf32": "tf32", "f32": "fp32"}
        return names[found[4]], 2.0 * math.prod(map(int, found.groups()[:3])), False
    return None


def access_width(instruction: str) -> int:
    """Bytes per thread of a load or store; LDSM and STSM move 4 bytes per thread and matrix."""
    if opcode(instruction) in ("LDSM", "STSM"):
        return 4 * int(instruction[-1]) if instruction.endswith((".2", ".4")) else 4
    modifiers = instruction.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((width for name, width in widths.items() if name in modifiers), 4)


def opcode(instruction: str) -> str:
    """An instruction without its modifiers."""
    return instruction.split(".")[0]
