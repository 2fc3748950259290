"""Timing: variants interleaved round by round, cold caches on a GPU, medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH_BYTES = 2**29  # more than any L2; its fill also hides what a launch costs on the CPU


@dataclass(frozen=True)
class Timing:
    """How many seconds a call takes: the median, and the quartiles as spread."""

    median: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    warmup: int = 3,
    rounds: int = 5,
    reset: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time all calls in turns, for `seconds` each and at least `rounds` times.

    In turns, so that a slow phase of the machine meets every variant. On CUDA a buffer larger than
    the L2 cache is written before each call and the call is timed by events. `reset` runs before
    each call, untimed.
    """
    reset = reset or (lambda: None)
    flush = None
    if device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for call in calls.values():
        for _ in range(warmup):
            reset()
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    done = 0
    while done < max(rounds, 2) or time.perf_counter() < end:
        for name, call in calls.items():
            reset()
            times[name].append(_once(call, flush))
        done += 1
    return {name: _summary(values) for name, values in times.items()}


def _once(call: Callable[[], object], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(flush.device):
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
