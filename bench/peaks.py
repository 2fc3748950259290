"""What the machine itself reaches, measured in the run that quotes it: copies and matrix products.

Percentages of a peak are of these two figures, never of a data sheet's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wavflow.base.flops import matmul_rate
from wavflow_kernels.tools.timing import interleaved

COPY_BYTES = 2**28  # read, and as many written: far beyond any cache


@dataclass(frozen=True)
class Peaks:
    """Rates of the machine: bytes that a copy moves, operations of a product, a second."""

    copy: float
    gemm: float


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Peaks:
    """The peaks of a device, matrix products in `dtype` by the fastest library."""
    return Peaks(_copy(device, seconds), matmul_rate(device, dtype, seconds))


def _copy(device: torch.device, seconds: float) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    return 2 * COPY_BYTES / timing.median
