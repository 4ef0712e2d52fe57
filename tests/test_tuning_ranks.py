"""Distributed runs: every rank uses the same configs, and nothing waits for a rank that was not asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sk_triton import sync_configs
from sk_triton.tuning import ranks, user_file
from sk_triton.tuning.entries import dump_sections

from .tuned import entry, origin, requests, workload

# One rank: what it looks up before and after `sync_configs`. Each rank has a file of its own, as on two hosts.
RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from sk_triton import sync_configs
from sk_triton.bench.grid import paper_unit
from sk_triton.chips import Chip
from sk_triton.planning import plan_schedule
from sk_triton.tuning import lookup, ranks
from sk_triton.workload import Workload

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
chip = Chip("sm_90", 132, 50, "NVIDIA H100 80GB HBM3")
lookup.shipped = lambda name: {}

def chosen():
    pinned = ranks.pinning_reason()
    workload = Workload(paper_unit(128), 128, 56, 56, torch.float16, chip, is_pinned=bool(pinned))
    plan = plan_schedule("store", workload)
    return [pinned, plan.branch_launches[0].source.text, str(plan.branch_launches[0].config)]

found = [chosen()]
if rank == 1:
    os.remove(os.path.join(os.environ["SK_TRITON_CACHE_DIR"], "tuned.json"))
sync_configs()
found.append(chosen())
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_all_ranks_use_the_configs_of_rank_0(tmp_path):
    request = requests("store", workload())["branch_store"]
    one, two = [config for config in request.candidates() if config != request.analytic()][:2]
    processes = []
    for rank, config in enumerate((one, two)):
        (tmp_path / str(rank)).mkdir()
        text = dump_sections({origin(): {request.key: entry(config)}})
        (tmp_path / str(rank) / "tuned.json").write_text(text)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), f"file://{tmp_path}/meet"],
                env={
                    **os.environ,
                    "SK_TRITON_CACHE_DIR": str(tmp_path / str(rank)),
                    "GLOO_SOCKET_IFNAME": "lo",
                },
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    # Before its last line, gloo of torch 2.8 prints its own.
    found = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    before = ["sk_triton.sync_configs() was not called", "analytic (sm_90)", str(request.analytic())]
    after = ["", "tuned for NVIDIA H100 80GB HBM3 (132 SMs)", str(one)]
    assert found == [[before, after]] * 2


class Ranks:
    """A distributed run as one of its ranks sees it: `sent` is what rank 0 sends."""

    def __init__(self, rank, sent=None):
        self.rank, self.sent = rank, sent

    def is_available(self):
        return True

    is_initialized = is_available

    def get_rank(self):
        return self.rank

    def broadcast_object_list(self, objects, src, group):
        if self.rank == src:
            (self.sent,) = objects
        objects[:] = [self.sent]


def test_where_rank_0_cannot_read_its_configs_no_rank_waits_for_it(monkeypatch):
    def fail():
        raise RuntimeWarning("tuned configs are not used")

    monkeypatch.setattr(user_file, "read", fail)
    first = Ranks(0)
    for run in (first, Ranks(1, "RuntimeWarning: tuned configs are not used")):
        monkeypatch.setattr(ranks, "dist", run)
        with pytest.raises(
            RuntimeError, match="no tuned configs on rank 0: RuntimeWarning: tuned configs are not"
        ):
            sync_configs()
    assert first.sent == "RuntimeWarning: tuned configs are not used"
    assert ranks._agreed is None


def test_outside_of_a_distributed_run_there_is_nothing_to_agree_on():
    assert ranks.pinning_reason() == ""
    with pytest.raises(RuntimeError, match="init_process_group"):
        sync_configs()


def test_ranks_that_have_agreed_read_no_file(folder, monkeypatch):
    agreed = {origin(): {}}
    monkeypatch.setattr(ranks, "_agreed", agreed)
    monkeypatch.setattr(user_file, "read", lambda: pytest.fail("read a file"))
    assert ranks.user_sections() is agreed
