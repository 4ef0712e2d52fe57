"""The `host` suite: what a call costs the host, how many kernels it launches, and what starting up costs.

A call is an inference of batch 1, or a training step of batch 2. On a GPU, the time until it returns, the device's work
not awaited. On a CPU there is nothing to launch: there, sk_triton's launches are replaced by nothing, so that its own
Python alone is timed, beside PyTorch's cheapest `conv2d`; peers are left out, since their time is the computation.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import results
from ..shapes import INFERENCE, TRAINING, UNITS, Case, Shape, stage_shape
from ..suites import HOST
from . import forms, protocol
from .competition import DTYPES, Setting
from .entrant import Entrant
from .inputs import RANDOM, make_gradient, make_input
from .profiler import device_events
from .providers import Provider, make_state
from .sources import Ours

CALLS = 20
REPEATS = 25
STAGE = 1
PROCESSES = 3
RECORDED_BY = 3
"""Calls after which ours start recorded kernels, forward and backward."""

IMPORT_TORCH = "import torch"
IMPORT_OURS = "import sk_triton, torch imported before"
FIRST_CALL = "first call in a new process, empty compile cache"
CONV2D = "conv2d"


def measure(setting: Setting, revisions: Sequence[Ours] = ()) -> Iterator[results.Record]:
    """The suite's records, one by one: `host_us` and `launches` of every provider, `host_us` of starting up.

    `revisions` are measured on a CPU besides the installed package; on a GPU they are among `setting.competitors`.
    """
    if setting.device.type == "cuda":
        yield from _gpu_records(setting)
        yield from _start_up_records(on_gpu=True)
    else:
        yield from _stubbed_records(setting, (Ours(), *revisions))
        yield from _start_up_records(on_gpu=False)


def _gpu_records(setting: Setting) -> Iterator[results.Record]:
    for case in _cases():
        x, dv = _inputs(case, setting)
        for provider in setting.competitors(case):
            record = provider.record(case)
            missing = provider.source.missing()
            if missing:
                yield replace(record, status=results.SKIPPED, message=missing)
                continue
            try:
                with provider.scope():
                    entrant = _entrant(case, provider, setting)
                    record = replace(record, runs=entrant.runs(x))
                    timing, launches = provider.form.run(partial(_host_cost, entrant, x, dv))
            except Exception as error:
                status, message = protocol.failure(error)
                yield replace(record, status=status, message=message)
            else:
                yield _measured(record, timing, launches)
    x = torch.zeros(1, 8, 1, 1, device=setting.device, dtype=torch.float16)
    yardstick, call = _conv2d(x)
    (timing,) = _host_times([call], torch.cuda.synchronize)
    yield _measured(yardstick, timing, None)


def _stubbed_records(setting: Setting, sources: Sequence[Ours]) -> Iterator[results.Record]:
    """A record of each unit from each source, and the yardstick's: all timed in turns."""
    records, calls, able = [], [], []
    for source in sources:
        provider = _stubbed(source)
        missing = provider.source.missing()
        if missing is None:
            able.append(source)
            continue
        for case in _cases():
            yield replace(provider.record(case), status=results.SKIPPED, message=missing)
    with ExitStack() as stack:
        packages = {source.package for source in able}
        started = {package: stack.enter_context(stubbed_launches(package)) for package in packages}

        def forget_started() -> None:
            for launches in started.values():
                launches.clear()

        for source in able:
            provider = _stubbed(source)
            stack.enter_context(provider.scope())
            for case in _cases():
                record = provider.record(case)
                try:
                    entrant = _entrant(case, provider, setting)
                    x, dv = _inputs(case, setting)
                    call, _ = entrant.bind(x, dv)
                    for _ in range(RECORDED_BY):
                        call()
                    forget_started()
                    call()
                    launches = len(started[source.package])
                except Exception as error:
                    status, message = protocol.failure(error)
                    yield replace(record, status=status, message=message)
                else:
                    records.append(replace(record, runs=entrant.runs(x), launches=launches))
                    calls.append(call)
        yardstick, call = _conv2d(torch.zeros(1, 8, 1, 1))
        timings = _host_times([*calls, call], forget_started)
    for record, timing in zip([*records, yardstick], timings, strict=True):
        yield _measured(record, timing, record.launches)


def _stubbed(source: Ours) -> Provider:
    """The source's kernels, whose launches are left out."""
    key = "ours-stubbed" if source.key == results.SK_TRITON else source.key
    label = f"{source.label}, launches stubbed out"
    stubbed = Ours(key, label, backend="triton", role=source.role, package=source.package)
    return Provider(stubbed, forms.CHANNELS_LAST)


def _entrant(case: Case, provider: Provider, setting: Setting) -> Entrant:
    state = make_state(case, setting.seed)
    module = provider.module(case, state, DTYPES[case.dtype], setting.device)
    return Entrant(case, provider, module)


@contextmanager
def stubbed_launches(package: ModuleType) -> Iterator[list[object]]:
    """Launches of `package` do nothing but enter a list, and its dispatcher takes the kernels on a CPU.

    The list is handed out; it may be cleared.
    """
    launch = importlib.import_module(f"{package.__name__}.kernels.launch").Launch
    started: list[object] = []

    class Compiled:
        """Stands for the kernel that a first launch compiles and later ones start directly."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: started.append(grid)

    def start(step: Any) -> Compiled:
        started.append(step.grid)
        return Compiled()

    run, interpret = launch.__call__, os.environ.get("TRITON_INTERPRET")
    launch.__call__ = start
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield started
    finally:
        launch.__call__ = run
        if interpret is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = interpret


def _cases() -> list[Case]:
    return [
        Case(HOST, unit, stage_shape(unit, STAGE), batch, "fp16", direction)
        for unit in UNITS
        for direction, batch in ((INFERENCE, 1), (TRAINING, 2))  # the gate's norm needs two samples
    ]


def _inputs(case: Case, setting: Setting) -> tuple[Tensor, Tensor | None]:
    """x and, in training, the gradient of the output, which is as large."""
    dtype, device, seed = DTYPES[case.dtype], setting.device, setting.seed
    x = make_input(RANDOM, case.batch, case.shape, dtype, device, seed)
    return x, make_gradient(x.shape, dtype, device, seed) if case.direction == TRAINING else None


def _host_cost(entrant: Entrant, x: Tensor, dv: Tensor | None) -> tuple[results.Timing, int | None]:
    """The host's time for a call on `x`, and its launches."""
    call, _ = entrant.bind(x, dv)
    (timing,) = _host_times([call], torch.cuda.synchronize)
    return timing, _launches(call)


def _host_times(calls: Sequence[Callable[[], object]], between: Callable[[], object]) -> list[results.Timing]:
    """Time until each call returns, over rounds of CALLS of each; `between`, untimed, before each."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(3):
            call()
    for _ in range(REPEATS):
        for call, own in zip(calls, samples, strict=True):
            between()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            own.append((time.perf_counter() - start) / CALLS * 1e3)
    between()
    return [protocol.summarise(own) for own in samples]


def _launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills on the device in one call; None where the profiler sees none."""
    return len(device_events(call, torch.device("cuda"))) or None


def _conv2d(x: Tensor) -> tuple[results.Record, Callable[[], Tensor]]:
    """PyTorch's own cheapest convolution call, one pixel of 8 channels, as a yardstick."""
    weight = x.new_zeros(8, 8, 1, 1)

    def call() -> Tensor:  # turns gradients off by itself, as an entrant's does
        with torch.no_grad():
            return F.conv2d(x, weight)

    shape = Shape(8, 1, 1, 1, (1,), (1,))
    case = Case(HOST, CONV2D, shape, 1, "fp32" if x.dtype == torch.float32 else "fp16")
    record = results.Record(case, CONV2D, "torch.nn.functional.conv2d, 1 pixel", "", "", results.PEER)
    return record, call


def _start_up_records(on_gpu: bool) -> Iterator[results.Record]:
    """Import times, and on a GPU the first call with nothing compiled; each in a process of its own."""
    scripts = {IMPORT_TORCH: ("", "import torch"), IMPORT_OURS: ("import torch", "import sk_triton")}
    if on_gpu:
        layer = "layer = sk_triton.SelectiveKernel(128, groups=32, split_input=False).eval().half().cuda()"
        x = "x = torch.zeros(1, 128, 56, 56).half().cuda(); torch.cuda.synchronize()"
        scripts[FIRST_CALL] = (
            f"import torch, sk_triton; torch.set_grad_enabled(False); {layer}; {x}",
            "layer(x); torch.cuda.synchronize()",
        )
    for name, (before, timed) in scripts.items():
        case = Case(HOST, name, Shape(0, 0, 0, 1, (), ()), 1, dtype="", direction="")
        record = results.Record(case, results.SK_TRITON, "sk_triton", "", "", results.OURS)
        if name == IMPORT_TORCH:
            record = replace(record, source="torch", source_label="PyTorch", role=results.PEER)
        try:
            timing = protocol.summarise([_in_new_process(before, timed) for _ in range(PROCESSES)])
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()
            yield replace(record, status=results.FAILED, message=lines[-1] if lines else str(error))
        else:
            yield _measured(record, timing, None)


def _in_new_process(before: str, timed: str) -> float:
    """Milliseconds that `timed` takes in a new process after `before`, with an empty compile cache."""
    script = (
        f"import time\n{before}\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            cwd=cache,
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout.split()[-1]) * 1e3


def _measured(record: results.Record, timing: results.Timing, launches: int | None) -> results.Record:
    return replace(record, status=results.OK, launches=launches).with_host_time(timing)
