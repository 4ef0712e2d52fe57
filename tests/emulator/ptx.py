"""PTX as Triton prints it, as data."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Address(NamedTuple):
    """`[base + offset]`; the base is a register or a parameter."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address


class Instruction(NamedTuple):
    """`@guard opcode operands;`. A vector is a tuple of registers."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    is_negated: bool
    text: str

    @property
    def parts(self) -> list[str]:
        """The opcode's name, then its modifiers."""
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One kernel: its parameters with their sizes in bytes, the types of its registers by name or prefix, its code."""

    threads: int
    parameters: dict[str, int]
    types: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


DIRECTIVE = re.compile(r"\.(?:loc|file|section|pragma)\b[^\n;]*(?:;|\n|$)")
LABEL = re.compile(r"([$\w]+):")
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> Kernel:
    """The kernel of a module that has one."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text[text.index(".entry") :].split("\n{", 1)
    sizes = re.findall(r"\.param \.[bsuf](\d+)\b[^\n]*?(\w+)(?:,|\n|$)", head)
    kernel = Kernel(
        threads=int(re.search(r"\.reqntid (\d+)", head)[1]),
        parameters={name: int(bits) // 8 for bits, name in sizes},
    )
    for statement in body.split("\n}", 1)[0].split(";"):
        _read(statement.strip(), kernel)
    return kernel


def _read(statement: str, kernel: Kernel) -> None:
    """Add a statement to the kernel, and the labels before it. Scopes of inline assembly declare anew what they use."""
    while statement:
        if statement[0] in "{}":
            statement = statement[1:].lstrip()
        elif found := LABEL.match(statement):
            kernel.labels[found[1]] = len(kernel.code)
            statement = statement[found.end() :].lstrip()
        elif found := DIRECTIVE.match(statement):
            statement = statement[found.end() :].lstrip()
        else:
            break
    if not statement:
        return
    if statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            kernel.types[re.sub(r"<\d+>", "", name.strip())] = kind[1:]
        return
    found = INSTRUCTION.fullmatch(statement)
    if found is None:
        raise ValueError(f"not an instruction: {statement!r}")
    negation, guard, opcode, operands = found.groups()
    operands = tuple(map(_operand, OPERAND.findall(operands)))
    kernel.code.append(Instruction(opcode, operands, guard, negation == "!", " ".join(statement.split())))


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(name.strip() for name in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or 0))
    return text
