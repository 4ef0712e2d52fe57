"""Clocks of a loop from the stall counts of its machine code."""

from types import SimpleNamespace

import pytest

from sk_triton.bench.compiled.loops import Instruction
from sk_triton.bench.compiled.warps import (
    NO_BARRIER,
    Step,
    clocks_per_trip,
    longest_loop,
    product_clocks,
    resident_warps,
)

PRODUCT = Step("HMMA.16816.F32", 6, NO_BARRIER, NO_BARRIER, 0)
ADD = Step("FADD", 1, NO_BARRIER, NO_BARRIER, 0)


def load(barrier):
    return Step("LDG.E.64", 1, barrier, NO_BARRIER, 0)


def waiting(barrier):
    return Step("FADD", 1, NO_BARRIER, NO_BARRIER, 1 << barrier)


def test_a_warp_alone_takes_its_stall_counts():
    assert clocks_per_trip([PRODUCT] * 10 + [ADD] * 7, "sm_90", 1, 400) == 67


def test_the_tensor_core_serves_one_product_at_a_time():
    loop = [PRODUCT] * 10
    assert clocks_per_trip(loop, "sm_90", 2, 400) == pytest.approx(120, abs=1)
    assert product_clocks([*loop, ADD], "sm_90") == 60


def test_a_scheduler_issues_one_instruction_a_clock():
    assert clocks_per_trip([ADD] * 50, "sm_90", 3, 400) == pytest.approx(150, abs=1)


def test_warps_that_begin_together_want_the_same_clocks_and_idle_together():
    quiet = Step("BAR", 15, NO_BARRIER, NO_BARRIER, 0)
    assert clocks_per_trip([ADD] * 15 + [quiet], "sm_90", 1, 400) == 30
    assert clocks_per_trip([ADD] * 15 + [quiet], "sm_90", 2, 400) == pytest.approx(45, abs=1)


@pytest.mark.parametrize("barrier", [0, 5])
def test_a_load_holds_up_those_that_wait_for_its_barrier_and_no_others(barrier):
    other = 3
    assert clocks_per_trip([load(barrier), ADD, waiting(barrier)], "sm_90", 1, 400) == pytest.approx(
        401, abs=1
    )
    assert clocks_per_trip([load(barrier), ADD, waiting(other)], "sm_90", 1, 400) == 3


def test_a_longer_latency_takes_no_less():
    loop = [load(1), *[PRODUCT] * 60, waiting(1), *[PRODUCT] * 30]
    times = [clocks_per_trip(loop, "sm_90", 2, latency) for latency in (100, 400, 900, 1400)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(2 * 90 * 6, rel=0.02)
    assert times[-1] > 1400


def test_registers_leave_room_for_warps():
    assert [resident_warps(registers) for registers in (255, 168, 128, 64, 16)] == [2, 3, 4, 8, 16]


def word(stall, written=NO_BARRIER, read=NO_BARRIER, waits=0):
    return (stall | written << 5 | read << 8 | waits << 11) << 41


def line(address, text, upper):
    return f"        /*{address:04x}*/    {text} ;    /* 0x{7:016x} */\n                     /* 0x{upper:016x} */\n"


def test_control_words_are_read_from_the_code_of_the_longest_loop():
    sass = "".join(
        [
            line(0x00, "MOV R1, R2", word(1)),
            line(0x10, "LDG.E R4, desc[UR4][R2.64]", word(2, written=3)),
            line(0x20, "FADD R1, R4, R1", word(5, waits=1 << 3)),
            line(0x30, "@P0 BRA 0x10", word(6)),
            line(0x40, "EXIT", word(5)),
        ]
    )
    texts = ["MOV R1, R2", "LDG.E R4", "FADD R1, R4, R1", "@P0 BRA 0x10", "EXIT"]
    opcodes = ["MOV", "LDG.E", "FADD", "BRA", "EXIT"]
    code = [
        Instruction(16 * i, opcode, f"/*{16 * i:04x}*/ {text} ;")
        for i, (opcode, text) in enumerate(zip(opcodes, texts, strict=True))
    ]
    assert longest_loop(code, sass) == (
        Step("LDG.E", 2, 3, NO_BARRIER, 0),
        Step("FADD", 5, NO_BARRIER, NO_BARRIER, 8),
        Step("BRA", 6, NO_BARRIER, NO_BARRIER, 0),
    )
    assert longest_loop([code[0], code[-1]], sass) == ()


def test_chips_whose_products_were_not_measured_are_refused():
    with pytest.raises(ValueError, match="target must be one of sm_90, got 'sm_80'"):
        clocks_per_trip([ADD], "sm_80", 1, 400)
    with pytest.raises(ValueError, match="loop must have instructions"):
        clocks_per_trip([], "sm_90", 1, 400)


def test_the_table_has_them_for_chips_that_were_measured():
    from sk_triton.bench.commands.resources import LATENCIES, clocks_of

    used = SimpleNamespace(loop=(*[PRODUCT] * 10, ADD), target="sm_90", registers=255)
    alone, products, *simulated = clocks_of(used)
    assert (alone, products) == ("61", "120")
    assert len(simulated) == len(LATENCIES)
    assert all(120 <= int(clocks) <= 125 for clocks in simulated)
    used.target = "sm_80"
    assert clocks_of(used) == ["-"] * 4
