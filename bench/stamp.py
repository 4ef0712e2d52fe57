"""Where, when and with what a run was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import sk_triton
from sk_triton import environment
from sk_triton.precision import allows_tf32


@dataclass(frozen=True)
class Stamp:
    """Machine, software and settings of a run; `threads` are PyTorch's intra-op ones."""

    device: str
    device_type: str
    driver: str | None
    python: str
    torch: str
    torch_built_for: str
    triton: str | None
    timm: str | None
    sk_triton: str | None
    git_commit: str | None
    git_dirty: bool | None
    tf32_convolution: bool
    float32_matmul_precision: str
    threads: int
    load: float | None
    """Runnable processes of the whole machine when the run began (1-minute average)."""
    cpus: int | None
    platform: str
    date: str
    """UTC, ISO 8601, to the second."""
    source_hash: str | None = None
    """Of the package's and its kernels' Python files: uncommitted changes of one commit differ in it."""

    def measures_like(self, other: Stamp) -> bool:
        """Whether results under both stamps may stand in one table: all but the time and the load are equal."""
        return not self.differences(other)

    def runs_peers_like(self, other: Stamp) -> bool:
        """Whether a peer does the same work under both stamps, on one device: PyTorch and its settings are equal."""
        fixed = ["torch", "tf32_convolution", "float32_matmul_precision"]
        if self.device_type == "cpu":
            fixed.append("threads")
        return all(getattr(self, name) == getattr(other, name) for name in fixed)

    def differences(self, other: Stamp) -> list[str]:
        """The fields that differ, the time and the load left out."""
        fixed = [name for name in self.__dataclass_fields__ if name not in ("load", "date")]
        return [name for name in fixed if getattr(self, name) != getattr(other, name)]

    def changes(self, now: Stamp) -> list[str]:
        """The fields that differ as people read them: "torch '2.9.0', now '2.10.0'"."""
        return [
            f"{name} {getattr(self, name)!r}, now {getattr(now, name)!r}" for name in self.differences(now)
        ]


def take_stamp(device: torch.device) -> Stamp:
    """The stamp of a run on `device`, taken now."""
    revision = environment.git_revision()
    return Stamp(
        device=environment.device_name(device),
        device_type=device.type,
        driver=environment.driver_version() if device.type == "cuda" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_built_for=environment.torch_built_for(),
        triton=environment.installed_triton(),
        timm=environment.version("timm"),
        sk_triton=environment.version("sk-triton"),
        git_commit=revision.commit,
        git_dirty=revision.dirty,
        tf32_convolution=allows_tf32(),
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        cpus=os.cpu_count(),
        platform=platform.platform(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        source_hash=_source_hash(),
    )


def _source_hash() -> str:
    digest = hashlib.sha256()
    for package in (sk_triton, importlib.import_module("sk_triton.kernels")):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
