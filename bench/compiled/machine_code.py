"""The machine code of compiled kernels, as text and as instructions, by the tools that Triton brings along."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import triton

from .loops import Instruction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION_BYTES = 16
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)")


def disassembled(cubins: Sequence[bytes], target: str) -> list[str]:
    """The code of kernels for one chip with its encoding. Addresses go on from kernel to kernel.

    Of all at once: it takes a third of a second to start the disassembler, and a hundredth to read a kernel.
    """
    codes = [_code(cubin) for cubin in cubins]
    number = target.removeprefix("sm_")
    architecture = f"SM{number}a" if int(number) >= 90 else f"SM{number}"
    lines = _run(
        "nvdisasm", b"".join(codes), "--print-instruction-encoding", "--binary", architecture
    ).splitlines()
    starts = [*(i for i, line in enumerate(lines) if _LINE.match(line)), len(lines)]
    bounds = list(accumulate((len(code) // _INSTRUCTION_BYTES for code in codes), initial=0))
    if len(starts) != bounds[-1] + 1:
        raise RuntimeError(f"nvdisasm printed {len(starts) - 1} instructions where there are {bounds[-1]}")
    return ["\n".join(lines[starts[a] : starts[b]]) for a, b in pairwise(bounds)]


def registers_of(cubin: bytes) -> int:
    """Registers of a thread."""
    printed = _run("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed!r}")
    return int(found[1])


def instructions_of(sass: str) -> list[Instruction]:
    """The instructions, without the padding behind the last exit."""
    found = [Instruction(int(m[1], 16), m[2], line) for line in sass.splitlines() if (m := _LINE.match(line))]
    while found and found[-1].opcode == "NOP":
        found.pop()
    if found and found[-1].opcode == "BRA":
        found.pop()
    return found


def _run(tool: str, content: bytes, *options: str) -> str:
    """What a tool prints of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run(
            [_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def _code(cubin: bytes) -> bytes:
    """The one section of code of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", strings + name)
    )
    return code
