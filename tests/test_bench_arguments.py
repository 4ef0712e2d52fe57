"""Options that several subcommands have."""

from __future__ import annotations

import pytest

from sk_triton import cli


@pytest.mark.parametrize(
    "options",
    [
        ["bench", "--batch", "0"],
        ["bench", "--time-limit", "x"],
        ["resources", "--workers", "0"],
        ["resources", "--workers", "-1"],
        ["explain", "--gpu", "h100", "--stage", "1", "--groups", "0"],
        ["explain", "--gpu", "h100", "--stage", "1", "--batch", "1.5"],
    ],
)
def test_what_counts_something_says_which_numbers_it_takes(options, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(options)
    assert refusal.value.code == 2
    assert (
        f"argument {options[-2]}: must be a whole number from 1 on, got '{options[-1]}'"
        in capsys.readouterr().err
    )
