"""Loops of machine code, and how often what is inside runs."""

import pytest

from sk_triton.bench.compiled.loops import Instruction, loop_weights, natural_loops


def code(*texts):
    """Instructions 16 bytes apart; a branch to line 3 is written `BRA 3`, its condition before it or the target."""
    found = []
    for i, text in enumerate(texts):
        opcode = next(word for word in text.split() if not word.startswith("@"))
        if opcode.startswith(("BRA", "CALL")):
            *start, line = text.split()
            text = " ".join((*start, hex(int(line) * 16)))
        found.append(Instruction(i * 16, opcode, f"        /*{i * 16:04x}*/                   {text} ;"))
    return found


def test_a_branch_may_be_annotated():
    """As some versions of cuobjdump print scheduling behind it."""
    text = "        /*07e0*/               @P0 BRA 0x2f30                    ?trans5;     /* 0x0000002400d00947 */"
    assert Instruction(0x7E0, "BRA", text).target == 0x2F30
    assert Instruction(0x7E0, "BRA", text).falls_through
    assert Instruction(0x7F0, "MOV", "        /*07f0*/      MOV R1, 0x2f30 ;").target is None


def test_straight_code_runs_once():
    assert loop_weights(code("MOV R1, R2", "@P0 EXIT", "@!P1 BRA 4", "IADD3", "EXIT"), (1,)) == [1] * 5


def test_a_loop_in_a_loop():
    instructions = code("MOV", "IADD3", "FFMA", "@P0 BRA 2", "STG", "@!P1 BRA 1", "EXIT")
    assert natural_loops(instructions) == [{1, 2, 3, 4, 5}, {2, 3}]
    assert loop_weights(instructions, (5, 3)) == [1, 5, 15, 15, 5, 5, 1]
    assert loop_weights(instructions, (5, 1, 3)) == [1, 5, 15, 15, 5, 5, 1], "a loop of one trip is none"
    assert loop_weights(instructions, (5, 0)) == [1, 5, 5, 5, 5, 5, 1], (
        "what may run no more than once counts once"
    )


def test_a_jump_back_from_rarely_run_code_is_no_loop():
    """The compiler puts it behind the kernel's end: it returns to the middle of a loop, whose body it belongs to."""
    instructions = code("MOV", "FFMA", "BRA.DIV UR4, 6", "STG", "@P0 BRA 1", "EXIT", "WARPSYNC", "BRA 3")
    assert natural_loops(instructions) == [{1, 2, 3, 4, 6, 7}]
    assert loop_weights(instructions, (7,)) == [1, 7, 7, 7, 7, 1, 7, 7]


def test_a_call_may_leave_a_loop():
    """As ptxas has it for sm_80: the call goes where the loop ends, and nothing returns from there."""
    instructions = code("MOV", "IADD3", "FFMA", "@!P5 CALL.REL.NOINC 5", "BRA 2", "STG", "@!P1 BRA 1", "EXIT")
    assert natural_loops(instructions) == [{1, 2, 3, 4, 5, 6}, {2, 3, 4}]
    assert loop_weights(instructions, (5, 3)) == [1, 5, 15, 15, 15, 5, 5, 1]


def test_a_loop_behind_the_end():
    """Loops come in the order in which they are reached, not by address."""
    instructions = code("BRA.U !UP0, 5", "FFMA", "@P0 BRA 1", "EXIT", "NOP", "LDG", "@P2 BRA 5", "BRA 1")
    assert natural_loops(instructions) == [{5, 6}, {1, 2}]
    assert loop_weights(instructions, (2, 9)) == [1, 9, 9, 1, 1, 2, 2, 1]


def test_a_loop_with_two_entries_is_not_counted():
    instructions = code("@P0 BRA 3", "MOV", "FFMA", "IADD3", "@P1 BRA 2", "EXIT")
    assert natural_loops(instructions) is None
    assert loop_weights(instructions, (9,)) is None


@pytest.mark.parametrize("trips", [(), (4,), (4, 4, 4)])
def test_loops_of_unknown_trips_are_not_counted(trips):
    instructions = code("MOV", "@P0 BRA 1", "FFMA", "@P1 BRA 2", "EXIT")
    assert loop_weights(instructions, trips) is None
