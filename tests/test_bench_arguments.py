"""Options that several subcommands have."""

from __future__ import annotations

import pytest

from sk_triton import cli
from sk_triton.bench.commands import arguments


@pytest.mark.parametrize(
    "options",
    [
        ["bench", "--batch", "0"],
        ["bench", "--device", "none", "--batch", "65537"],
        ["resources", "--workers", "0"],
        ["resources", "--workers", "-1"],
        ["explain", "--gpu", "h100", "--stage", "1", "--groups", "0"],
        ["explain", "--gpu", "h100", "--stage", "1", "--batch", "1.5"],
        ["explain", "--gpu", "none", "--stage", "1", "--batch", "99999999999999999999"],
    ],
)
def test_what_counts_something_says_which_numbers_it_takes(options, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(options)
    assert refusal.value.code == 2
    assert (
        f"argument {options[-2]}: must be a whole number from 1 to 65536, got '{options[-1]}'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("seconds", ["x", "0", "604801"])
def test_a_time_limit_is_a_week_at_most(seconds, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["bench", "--device", "none", "--time-limit", seconds])
    assert refusal.value.code == 2
    assert (
        f"argument --time-limit: must be a whole number from 1 to 604800, got '{seconds}'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "shape", ["1,128,1000000000,1000000000", "1,8193,7,7", "65537,1,1,1", "65536,128,64,65", "1,128,7"]
)
def test_a_shape_that_no_gpu_holds_is_refused(shape, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["explain", "--gpu", "none", "--shape", shape])
    assert refusal.value.code == 2
    assert (
        "argument --shape: must be N,C,H,W, each from 1 to 65536, C to 8192, with a product of at most 34359738368, "
        f"as in 128,128,56,56, got '{shape}'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("shape", [(1, 8192, 7, 7), (65536, 128, 64, 64), (1, 1, 65536, 65536)])
def test_a_large_shape_is_taken(shape):
    assert arguments.sizes(",".join(map(str, shape))) == shape
