"""What the machine itself reaches, measured in the run that quotes it: copies and matrix products.

Percentages of a peak are of these two figures, never of a data sheet's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wavflow_kernels._timing import interleaved
from wavflow_kernels.ops import prepared_conv

COPY_BYTES = 2**28  # read, and as many written: far beyond any cache
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Peaks:
    """copy: bytes read and written a second; gemm: operations a second of a square product."""

    copy: float
    gemm: float


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Peaks:
    """The peaks of a device, matrix products in `dtype` by the fastest library."""
    return Peaks(_copy(device, seconds), _gemm(device, dtype, seconds))


def _copy(device: torch.device, seconds: float) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    return 2 * COPY_BYTES / timing.median


def _gemm(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"mm": lambda: torch.mm(a, b, out=out)}
    if device.type == "cpu" and prepared_conv.fast(a):
        # In float32 torch.mm is MKL's, which runs at half of oneDNN's speed on AMD CPUs.
        calls["oneDNN"] = lambda: prepared_conv.linear(a, b)
    timings = interleaved(calls, device, seconds)
    return 2 * size**3 / min(timing.median for timing in timings.values())
