"""What this machine and this installation are: package versions, devices, source revision.

Nothing here needs an optional package; every function answers `None` rather than raise where a fact is
not to be had.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

PACKAGE_DIR = Path(__file__).resolve().parent
CLONE_DIR = PACKAGE_DIR.parent


@dataclass(frozen=True)
class OptionalPackage:
    """A package that some part of sk_triton uses but `import sk_triton` does not need."""

    module: str
    distribution: str
    extra: str | None
    used_for: str


OPTIONAL_PACKAGES = (
    OptionalPackage("triton", "triton", None, "the GPU kernels"),
    OptionalPackage("rich", "rich", "bench", "the benchmark's progress bar and tables"),
    OptionalPackage("numpy", "numpy", "bench", "Triton's interpreter, and the benchmark's plots"),
    OptionalPackage("matplotlib", "matplotlib", "bench", "the benchmark's plots"),
    OptionalPackage("sklearn", "scikit-learn", "bench", "the photographs of the benchmark's real input"),
    OptionalPackage(
        "pynvml", "nvidia-ml-py", "bench", "the log of an NVIDIA GPU's clocks during a benchmark"
    ),
    OptionalPackage("timm", "timm", "bench", "timm's SelectiveKernel as a peer in the benchmark"),
)
_BY_MODULE = {package.module: package for package in OPTIONAL_PACKAGES}


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message is one line with the command that installs it."""


def in_clone() -> bool:
    """True where this package is imported from a clone of its repository (an editable install)."""
    return (CLONE_DIR / "pyproject.toml").is_file()


def install_command(package: OptionalPackage) -> str:
    """The pip command that installs `package` in the version that sk_triton asks for."""
    if package.extra is None:
        requirement = required_version(package)
        return f"pip install '{package.distribution}{f'>={requirement}' if requirement else ''}'"
    if not in_clone():
        return f"pip install 'sk-triton[{package.extra}]'"
    clone = "." if Path.cwd() == CLONE_DIR else str(CLONE_DIR)
    return f"pip install -e '{clone}[{package.extra}]'"


def missing_message(module: str) -> str | None:
    """One line that says what `module` is for and how to install it; None for a module not known here."""
    package = _BY_MODULE.get(module.partition(".")[0])
    if package is None:
        return None
    return f"{package.distribution} is not installed ({package.used_for}): {install_command(package)}"


def require(*modules: str) -> None:
    """Raises MissingPackageError for the first of `modules` that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(missing_message(module) or f"{module} is not installed", name=module)


def version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_triton() -> str | None:
    """Version of the installed Triton, whatever its distribution is called, or None."""
    known = version("triton") or version("pytorch-triton-rocm")
    if known or importlib.util.find_spec("triton") is None:
        return known
    # triton-rocm, triton-windows, …: every distribution is looked through, which takes a while.
    for distribution in importlib.metadata.packages_distributions().get("triton", ()):
        if found := version(distribution):
            return found
    try:
        return getattr(importlib.import_module("triton"), "__version__", None)
    except Exception:  # a package that is there may fail in any way when imported
        return None


@lru_cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton, of a pre-release as of its release; (0, 0) without one."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", installed_triton() or "")
    return (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)


def required_version(package: OptionalPackage) -> str | None:
    """The lowest version of `package` that sk_triton's own metadata accepts, or None."""
    try:
        requirements = importlib.metadata.requires("sk-triton") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = re.match(rf"{re.escape(package.distribution)}\s*\(?>=\s*([\w.]+)", requirement)
        if match:
            return match[1]
    return None


def is_older(installed: str, required: str) -> bool:
    """Compares the numeric release parts of two versions: "2.8.0+cu128" is not older than "2.8"."""

    def release(text: str) -> tuple[int, ...]:
        numbers = [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore[index]
        return tuple(numbers + [0] * (4 - len(numbers)))

    return release(installed) < release(required)


def cpu_name() -> str:
    """Marketing name of the processor where the system tells it, else its architecture."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
        if match:
            return match[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of a CPU or of a CUDA/ROCm device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def gpu_names() -> list[str]:
    """Name and architecture of every visible CUDA or ROCm device."""
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", None) if torch.version.hip else None
        arch = arch or f"sm_{properties.major}{properties.minor}"
        gib = properties.total_memory / 2**30
        names.append(f"{properties.name} ({arch}, {properties.multi_processor_count} SMs, {gib:.0f} GiB)")
    return names


def torch_built_for() -> str:
    """The GPU runtime that this PyTorch was built for, or "the CPU only"."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"


def driver_version() -> str | None:
    """Version of the NVIDIA or AMD kernel driver, or None where there is none."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        try:
            match = re.search(pattern, Path(path).read_text(encoding="utf-8"))
        except OSError:
            continue
        if match:
            return match[1]
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


@dataclass(frozen=True)
class Revision:
    """Commit of the running source, and whether tracked files differ from it."""

    commit: str | None
    dirty: bool | None


def git_revision() -> Revision:
    """Revision of the clone that sk_triton runs from; empty for an installed wheel."""
    # A wheel inside somebody else's repository must not be stamped with that repository's commit.
    if not in_clone() or _git("ls-files", "--error-unmatch", "sk_triton/environment.py") is None:
        return Revision(None, None)
    status = _git("status", "--porcelain", "--untracked-files=no")
    return Revision(_git("rev-parse", "HEAD") or None, None if status is None else bool(status))


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(CLONE_DIR), *arguments)


def _output(*command: str) -> str | None:
    """Standard output of a command, stripped; None if it is absent, slow or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
