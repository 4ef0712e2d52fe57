"""Benchmark results with plausible numbers that nobody measured: for tests of what is made of results."""

from __future__ import annotations

import dataclasses
import random

from sk_triton.bench import results
from sk_triton.bench.measuring import forms
from sk_triton.bench.plots.style import mode
from sk_triton.bench.results import Ceilings, Check, Memory, Record, Results, Timing
from sk_triton.bench.shapes import (
    CLASSIC,
    PAPER,
    SKNET50,
    SKRESNEXT50,
    STAGES,
    TRAINING,
    Case,
    network_shape,
    stage_shape,
    unit_shape,
)
from sk_triton.bench.stamp import Stamp

SOURCES = {
    "classic": "classic SKConv",
    "plain-classic": "plain PyTorch",
    "timm": "timm",
    "paper": "plain PyTorch",
    "ours": "sk_triton",
    "ours-store": "sk_triton, store",
    "ours-recompute": "sk_triton, recompute",
    "ours-merged": "sk_triton, merged",
    "ours-resident": "sk_triton, resident",
    "ours-library": "sk_triton, library",
    "ours-input": 'sk_triton, save="input"',
    "ours-reference": "sk_triton, reference",
    "rev-478cb1a": "sk_triton at 478cb1a",
}
EAGER, COMPILED, GRAPHS, COMPILED_GRAPHS = (
    tuple(form.key for form in group)
    for group in (forms.EAGER, forms.COMPILED, forms.GRAPHS, forms.COMPILED_GRAPHS)
)
FORMS = tuple(forms.EVERY)
PEER_PASSES = {
    "eager": 23,
    "compile": 10,
    "max-autotune": 9,
    "graph": 20,
    "graph-compile": 10,
    "graph-max-autotune": 9,
}
OUR_PASSES = {
    "ours": 3.2,
    "ours-input": 4.6,
    "ours-store": 6.5,
    "ours-recompute": 3.6,
    "ours-resident": 2.6,
    "ours-library": 9.4,
    "rev-478cb1a": 6.6,
}
HOST_US = {
    "eager": 95.0,
    "compile": 38.0,
    "max-autotune": 30.0,
    "graph": 7.0,
    "graph-compile": 7.5,
    "graph-max-autotune": 7.5,
}
LAUNCHES = {
    "eager": 14,
    "compile": 6,
    "max-autotune": 5,
    "graph": 14,
    "graph-compile": 6,
    "graph-max-autotune": 5,
}
COPY_BYTES_PER_S = {"cuda": 2.9e12, "cpu": 2.1e10}
MATRIX_FLOP_PER_S = {
    "cuda": {"fp16": 7.1e14, "bf16": 7.3e14, "fp32": 3.9e14},
    "cpu": {"fp16": 4e10, "bf16": 2e11, "fp32": 1.9e11},
}


def a_stamp(device_type: str = "cuda", **changes) -> Stamp:
    on_gpu = device_type == "cuda"
    stamp = Stamp(
        device="NVIDIA H100 80GB HBM3" if on_gpu else "AMD EPYC 9654 96-Core Processor",
        device_type=device_type,
        driver="580.65.06" if on_gpu else None,
        python="3.11.7",
        torch="2.15.0+cu132",
        torch_built_for="CUDA 13.2",
        triton="3.9.0",
        timm="1.0.31",
        sk_triton="0.1.0",
        git_commit="478cb1a0c9e5f2d4b6a8c0e1f3a5b7d9c1e3f5a7",
        git_dirty=False,
        tf32_convolution=True,
        float32_matmul_precision="highest",
        threads=2,
        load=0.2,
        cpus=2,
        platform="Linux",
        date="2026-11-22T17:08:53+00:00",
    )
    return dataclasses.replace(stamp, **changes)


def a_record(
    case: Case, source: str, form: str, device_type: str, noise: random.Random, faster=1.0
) -> Record:
    """A record whose time is that of its passes over memory and its launches."""
    passes = OUR_PASSES.get(source, PEER_PASSES[mode(form)])
    host = HOST_US[mode(form)] * (0.3 if source in OUR_PASSES else 1.0)
    if device_type == "cpu":
        passes, host = (21 if source.startswith("ours") else 27), 30
    if "channels_last" not in form:
        passes += 2
    role = results.PEER
    if source.startswith(("ours", "rev")):
        role = results.OURS if source.startswith("ours") else results.REVISION
    is_ours = role != results.PEER
    scale = 2.6 if case.direction == TRAINING else 1.0
    per_group = max(case.shape.channels / case.shape.groups, 1)
    width = 1 + (per_group / (40 if is_ours else 160)) ** 1.6
    passes *= scale * width * (1 + 0.12 * max(len(case.shape.kernels) - 2, 0))
    passes *= 400 if case.is_network else 1
    memory_ms = passes * case.tensor_bytes / COPY_BYTES_PER_S[device_type] * 1e3
    share = 0.25 + 0.3 * is_ours
    matrix_ms = case.flops / MATRIX_FLOP_PER_S[device_type][case.dtype] / share * 1e3
    median = (max(memory_ms, matrix_ms, host / 1e3 * scale) + 0.004) * noise.uniform(0.95, 1.08) / faster
    timing = Timing(median, median * noise.uniform(0.95, 0.99), median * noise.uniform(1.01, 1.06), 200)
    saved = None
    if case.direction == TRAINING:
        saved = case.tensor_bytes * (0.1 if source == "ours-input" else 2.1 if is_ours else 9.4)
    peak = (saved or 0) + (2.3 if is_ours else 5.2) * case.tensor_bytes
    inputs = [Check(kind, "v", 1.3e-4, 1.1e-4, 2.2e-4, True) for kind in ("random", "photo")]
    return Record(
        case,
        source,
        SOURCES[source],
        form,
        forms.EVERY[form].label,
        role,
        results.OK,
        checks=tuple(inputs),
        timing=timing,
        warm=Timing(median * 0.9, median * 0.88, median * 0.93, 200) if device_type == "cuda" else None,
        # What is captured in a graph is not weighed.
        memory=None if "graph" in form else Memory(int(peak), int(saved) if saved else None),
        host_us=host * noise.uniform(0.95, 1.05),
        launches=3 if is_ours else LAUNCHES[mode(form)],
    )


def a_floor(case: Case, device_type: str) -> Record:
    median = case.floor_passes * case.tensor_bytes / COPY_BYTES_PER_S[device_type] * 1e3 + 0.003
    label = f"memory floor: {case.floor_passes:g} passes"
    timing = Timing(median, median * 0.99, median * 1.02, 200)
    return Record(case, "copy", label, "", "", results.FLOOR, results.OK, timing=timing)


def cases(
    suite: str, dtypes: tuple[str, ...], batches: tuple[int, ...], stages: tuple[int, ...]
) -> list[Case]:
    if suite in ("layer", "train", "host"):
        direction = {"direction": TRAINING} if suite == "train" else {}
        return [
            Case(suite, unit, stage_shape(unit, stage), batch, dtype, **direction)
            for unit in (CLASSIC, PAPER)
            for dtype in dtypes
            for stage in stages
            for batch in batches
        ]
    if suite == "model":
        sizes = (SKNET50, SKRESNEXT50)
        return [
            Case(suite, name, network_shape(224), batch, d)
            for d in dtypes
            for name in sizes
            for batch in batches
        ]
    if suite == "sweep":
        return [case for dtype in dtypes for case in sweep_cases(dtype, batches[-1])]
    axes = {
        "batch": [(unit_shape(PAPER, 256, 28), n, n) for n in (1, 4, 16, 64, 256)],
        "height × width": [(unit_shape(PAPER, 128, s), 32, s * s) for s in (7, 14, 28, 56, 112)],
        "channels": [(unit_shape(PAPER, c, 28), 32, c) for c in (64, 128, 256, 512, 1024)],
    }
    return [
        Case(suite, PAPER, shape, batch, dtype, axis=axis, value=float(value))
        for dtype in dtypes
        for axis, points in axes.items()
        for shape, batch, value in points
    ]


def sweep_cases(dtype: str, batch: int) -> list[Case]:
    shapes = {
        "channels per group": [
            (n, unit_shape(PAPER, 256, 28, groups=256 // n)) for n in (1, 4, 8, 16, 32, 64, 256)
        ],
        "dilation": [(n, unit_shape(PAPER, 256, 28, dilation=n)) for n in (1, 2, 3, 4)],
        "kernel size": [(n, unit_shape(PAPER, 256, 28, kernel=n)) for n in (3, 5, 7)],
        "branches": [(n, unit_shape(PAPER, 256, 28, num_branches=n)) for n in (1, 2, 3, 4)],
    }
    return [
        Case("sweep", PAPER, shape, batch, dtype, axis=axis, value=float(value))
        for axis, points in shapes.items()
        for value, shape in points
    ]


def competitors(case: Case, device_type: str, every: bool) -> list[tuple[str, str]]:
    peers = {
        CLASSIC: ["classic", "plain-classic"],
        PAPER: ["timm", "paper"],
        SKNET50: ["paper"],
        SKRESNEXT50: ["timm"],
    }[case.subject]
    if device_type == "cpu":
        return [(source, form) for source in (*peers, "ours") for form in EAGER]
    chosen = FORMS if every else (*EAGER, *COMPILED, *GRAPHS, *COMPILED_GRAPHS)
    ours = ["ours", *(("ours-store", "ours-recompute", "ours-resident", "ours-library") if every else ())]
    saving_input = [("ours-input", "channels_last")] if case.direction == TRAINING else []
    return (
        saving_input
        + [(p, form) for p in peers for form in chosen]
        + [(source, form) for source in ours for form in (*EAGER, "graph-channels_last")]
    )


def some_results(
    suite: str = "layer",
    device_type: str = "cuda",
    *,
    dtypes: tuple[str, ...] = ("fp16",),
    batches: tuple[int, ...] = (1, 8, 32, 128, 256),
    stages: tuple[int, ...] = tuple(STAGES),
    every: bool = False,
    faster: float = 1.0,
    **changes,
) -> Results:
    """A sound run of a suite. `every`: all forms and forced schedules; `faster` divides sk_triton's times."""
    noise = random.Random(0)
    records = []
    for case in cases(suite, dtypes, batches, stages):
        for source, form in competitors(case, device_type, every):
            gain = faster if source.startswith("ours") else 1.0
            records.append(a_record(case, source, form, device_type, noise, gain))
        if not case.is_network:
            records.append(a_floor(case, device_type))
    ceilings = Ceilings(COPY_BYTES_PER_S[device_type], MATRIX_FLOP_PER_S[device_type])
    run = Results(suite, 0, a_stamp(device_type), tuple(records), ceilings)
    return dataclasses.replace(run, **changes)


def with_status(run: Results, position: int, status: str, message: str = "some reason") -> Results:
    """The run with one record of another status."""
    records = list(run.records)
    records[position] = dataclasses.replace(
        records[position], status=status, message=message, timing=None, warm=None, memory=None, checks=()
    )
    return dataclasses.replace(run, records=tuple(records))


def small(device_type="cuda", **options):
    """Two batches of one stage of both units."""
    dtypes = ("fp32",) if device_type == "cpu" else ("fp16",)
    return some_results(
        device_type=device_type, **{"dtypes": dtypes, "batches": (1, 8), "stages": (1,), **options}
    )


def changed(run, chosen, **changes):
    """The run with other timings where `chosen` says so; each change is a factor."""

    def change(record):
        if record.timing is None or not chosen(record):
            return record
        factors = {name: getattr(record.timing, name) * factor for name, factor in changes.items()}
        return dataclasses.replace(record, timing=dataclasses.replace(record.timing, **factors))

    return dataclasses.replace(run, records=tuple(map(change, run.records)))


def slowed(run, factor, chosen=lambda record: record.ours):
    return changed(run, chosen, median_ms=factor, q20_ms=factor, q80_ms=factor)
