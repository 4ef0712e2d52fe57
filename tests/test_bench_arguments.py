"""Options that several subcommands have."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("command", ["bench", "report"])
@pytest.mark.parametrize("seed", ["-1", "0.5", "9223372036854775808"])
def test_a_seed_has_63_bits(command, seed, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main([command, "--device", "none", f"--seed={seed}"])
    assert refusal.value.code == 2
    assert (
        f"argument --seed: must be a whole number from 0 to 9223372036854775807, got '{seed}'"
        in capsys.readouterr().err
    )


def test_the_largest_seed_is_one_of_pytorch():
    generator = torch.Generator().manual_seed(arguments.seed("9223372036854775807"))
    assert generator.initial_seed() == 2**63 - 1


@pytest.mark.parametrize("name", ["cpu:7", "cpu:0", "meta", "nonsense"])
def test_a_device_that_is_none_of_those_named_is_refused(name):
    with pytest.raises(ValueError, match=f"--device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        arguments.choose_device(name)
