"""A log of the GPU's clocks, heat and throttling during a run, read through NVIDIA's management library."""

from __future__ import annotations

import time
from typing import Any

import torch

from .. import results

INTERVAL_SECONDS = 0.25

THERMAL = "thermal slowdown"
HARDWARE = "hardware slowdown"
POWER_BRAKE = "power brake"
POWER_CAP = "power cap"
_REASONS = {0x04: POWER_CAP, 0x08: HARDWARE, 0x20: THERMAL, 0x40: THERMAL, 0x80: POWER_BRAKE}
"""Bits of NVML's clocks event reasons."""


class ClockLog:
    """Readings at most every quarter second, taken between timed rounds by :meth:`tick`.

    Without an NVIDIA GPU, or without nvidia-ml-py, it stays empty, and `unavailable` says why.
    """

    def __init__(self, device: torch.device) -> None:
        self.samples: list[results.ClockSample] = []
        self.unavailable: str | None = None
        self._start = self._last = time.monotonic()
        self._nvml: Any = None
        if device.type != "cuda" or torch.version.hip:
            self.unavailable = "not an NVIDIA GPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
            self._read()
        except Exception as error:  # a log that cannot be kept must not stop the run, but the results say so
            self._give_up(error)

    def tick(self) -> None:
        """Takes a reading if the last one is old enough."""
        if self._nvml is None or time.monotonic() - self._last < INTERVAL_SECONDS:
            return
        try:
            self._read()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._nvml = None
        self.unavailable = f"{type(error).__name__}: {error}"

    def _read(self) -> None:
        nvml, handle = self._nvml, self._handle
        self._last = time.monotonic()
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        self.samples.append(
            results.ClockSample(
                seconds=round(self._last - self._start, 2),
                sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                throttle=tuple(dict.fromkeys(name for bit, name in _REASONS.items() if bits & bit)),
            )
        )
