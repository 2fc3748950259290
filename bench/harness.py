"""Timing: variants interleaved round by round, medians and spread, outputs allocated alike."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and the quartiles as spread."""

    median: float
    low: float
    high: float


def interleaved(
    variants: dict[str, Callable[[], object]], device: torch.device, seconds: float = 2.0
) -> dict[str, Timing]:
    """Times all variants in turns until each had its share of `seconds`.

    Rounds alternate, so that a slow phase of the machine meets every variant. On CUDA a buffer
    larger than the L2 cache is written before each call and the call is timed by events.
    """
    flush = torch.empty(2**26, device=device) if device.type == "cuda" else None
    for call in variants.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds * len(variants)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in variants.items():
            times[name].append(_once(call, flush))
    return {name: _summary(values) for name, values in times.items()}


def _once(call: Callable[[], object], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush.zero_()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine(device: torch.device) -> dict[str, object]:
    """Device, versions and commit, as every result row carries them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
