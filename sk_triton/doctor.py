"""`sk-triton doctor`: what is installed, which backend `auto` takes and why, and what mends the rest."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from dataclasses import dataclass

import torch

from . import environment
from .dispatch import is_interpreted
from .environment import OPTIONAL_PACKAGES, OptionalPackage
from .tuning import user_file
from .tuning.entries import BrokenFileError, NewerFileError

LABEL_WIDTH = 14


@dataclass(frozen=True)
class PackageState:
    """An optional package as found: what the trouble is, and the pip command that mends it."""

    package: OptionalPackage
    version: str | None
    trouble: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class BackendState:
    """What `auto` takes for one layer on one device; `works` is whether a call went through."""

    device: str
    layer: str
    backend: str
    reason: str
    works: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sk-triton doctor` has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if the layers run here, on whichever backend, else 1."""
    packages = [inspect_package(package) for package in OPTIONAL_PACKAGES]
    backends = inspect_backends()
    print("\n".join(report(packages, backends)))
    return 0 if all(state.works for state in backends) else 1


def inspect_package(package: OptionalPackage) -> PackageState:
    """Version of a package, and whether it is missing, too old or broken; imports it."""
    is_triton = package.module == "triton"  # which AMD's PyTorch brings under another name
    installed = environment.installed_triton() if is_triton else environment.version(package.distribution)
    remedy = environment.install_command(package)
    if installed is None:
        return PackageState(package, None, "not installed", remedy)
    required = environment.required_version(package)
    if required and environment.is_older(installed, required):
        return PackageState(package, installed, f"older than {required}", remedy)
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a package that is there may fail in any way when imported
        return PackageState(package, installed, f"does not import: {_first_line(error)}", remedy)
    return PackageState(package, installed)


def inspect_backends() -> list[BackendState]:
    """Probes both layers for inference, in fp16 on the first GPU if one is visible and in fp32 on the CPU."""
    gpu = _probe_device(torch.device("cuda"), torch.float16) if torch.cuda.is_available() else []
    return gpu + _probe_device(torch.device("cpu"), torch.float32)


def report(packages: list[PackageState], backends: list[BackendState]) -> list[str]:
    """The report's lines."""
    lines = ["Installed"]
    revision = environment.git_revision()
    source = f"  {revision.commit[:9]}{' with changes' if revision.dirty else ''}" if revision.commit else ""
    lines.append(_row("python", f"{platform.python_version()}  {sys.executable}"))
    lines.append(_row("sk_triton", f"{environment.version('sk-triton')}{source}  {environment.PACKAGE_DIR}"))
    lines.append(_row("torch", f"{torch.__version__}  built for {environment.torch_built_for()}"))
    for state in packages:
        name = state.package.distribution
        facts = [state.version or "", f"({state.trouble})" if state.trouble else ""]
        lines.append(_row(name, " ".join(fact for fact in facts if fact)))
    lines.append(_row("tuned", _tuned()))

    lines += ["", "Devices"]
    lines.append(_row("cpu", f"{environment.cpu_name()}, {torch.get_num_threads()} threads"))
    gpus = environment.gpu_names()
    lines += [_row(f"gpu {index}", name) for index, name in enumerate(gpus)]
    if not gpus:
        lines.append(_row("gpu", f"none: {_why_no_gpu()}"))
    lines.append(_row("driver", environment.driver_version() or "none found"))

    lines += ["", "Backend that `auto` takes for inference"]
    for probe in backends:
        lines.append(_row(probe.device, f"{probe.layer}: {probe.backend} ({probe.reason})"))
    if is_interpreted():
        lines.append(_row("", "TRITON_INTERPRET=1: use_backend('triton') interprets the kernels, slowly"))

    remedies: dict[str, list[str]] = {}
    for state in packages:
        if state.remedy and state.trouble:
            use = f"{state.package.distribution} ({state.package.used_for})"
            remedies.setdefault(state.remedy, []).append(use)
    if remedies:
        lines += ["", "To mend"]
        lines += [f"  {command}    # {', '.join(names)}" for command, names in remedies.items()]
    return lines


@torch.no_grad()
def _probe_device(device: torch.device, dtype: torch.dtype) -> list[BackendState]:
    from . import SelectiveKernel, SKConv, explain

    states = []
    for layer in (SKConv(64, M=2, G=16, r=16), SelectiveKernel(64, groups=16, split_input=False)):
        name = type(layer).__name__
        try:
            layer = layer.to(device, dtype).eval()
            x = torch.zeros(1, 64, 8, 8, device=device, dtype=dtype)
            plan = explain(layer, x).plan
            layer(x)
        except Exception as error:  # whatever it is, the report must still be printed
            states.append(BackendState(device.type, name, "fails", _first_line(error), works=False))
            continue
        reasons = [f"not {other}: {reason}" for other, reason in plan.rejected if plan.backend == "reference"]
        why = "; ".join(reasons) or f"schedule {plan.schedule}"
        states.append(BackendState(device.type, name, plan.backend, why, works=True))
    return states


def _tuned() -> str:
    """Where this user's tuned configs are, how many, and how many of them this version uses."""
    try:
        sections, complaints = user_file.inspect()
    except NewerFileError as error:
        return f"{user_file.path()}: not used: {error}"
    except BrokenFileError as error:
        return f"{user_file.path()}: damaged: {error}"
    except OSError as error:
        return f"not used: {error}"
    entries = sum(map(len, sections.values()))
    current = sum(len(found) for origin, found in sections.items() if origin.is_current)
    damaged = f", {len(complaints)} damaged; the first: {complaints[0]}" if complaints else ""
    return f"{user_file.path()}: {entries} entries, {current} current{damaged}"


def _why_no_gpu() -> str:
    built = environment.torch_built_for()
    if built == "the CPU only":
        return "this PyTorch is built for the CPU only; see https://pytorch.org/get-started/locally/"
    driver = environment.driver_version()
    if driver is None:
        return f"this PyTorch is built for {built}, but no driver was found"
    return f"this PyTorch is built for {built} and sees no device with driver {driver}"


def _row(label: str, text: str) -> str:
    return f"  {label:<{LABEL_WIDTH}}{text}".rstrip()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
