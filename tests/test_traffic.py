"""Passes over memory, counted by the interpreter."""

import pytest
import torch

from sk_triton.bench import traffic
from sk_triton.bench.grid import paper_unit, seed_unit

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("size", [56, 28, 14])
def test_store_schedule_moves_six_passes(size):
    rows, unit = traffic.count(paper_unit(16, groups=4), 1, size)
    assert traffic.total(rows, unit) <= 6.2
    touched = {(row.kernel, row.tensor): row.touched / unit for row in rows}
    assert touched["branch_conv_stream", "x"] == 1
    assert touched["branch_conv_stream", "u"] == 2
    assert touched["select", "u"] == 2
    assert touched["select", "v"] == 1


def test_seven_by_seven_and_seed_unit():
    rows, unit = traffic.count(paper_unit(64, groups=2), 4, 7)
    assert traffic.total(rows, unit) <= 6.3  # a sample's partial sums weigh more against 49 pixels
    rows, unit = traffic.count(seed_unit(16, groups=4), 1, 14)
    assert traffic.total(rows, unit) <= 6.3


def test_an_access_outside_of_its_tensors_is_caught():
    from sk_triton.kernels.config import SelectConfig
    from sk_triton.kernels.select import select_fwd

    u, attention, v = torch.randn(2, 1, 2, 2, 16), torch.rand(1, 2, 16), torch.empty(1, 16, 2, 2)
    launch = select_fwd(u, attention, v, config=SelectConfig(4, 16))
    with traffic.Meter({"u": u, "attention": attention, "v": v}).watch() as rows:
        launch()
    assert {row.tensor: (row.read, row.written) for row in rows} == {
        "u": (u.numel() * 4, 0),
        "attention": (attention.numel() * 4, 0),
        "v": (0, v.numel() * 4),
    }
    with (
        pytest.raises(Exception, match="64 accesses outside of every tensor"),
        traffic.Meter({"u": u, "v": v}).watch(),
    ):
        launch._replace(arguments=(u, attention, v[:, :, :1], *launch.arguments[3:]))()
