"""Capturing a step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wavflow.flow.guidance import Output

#: Runs of a step before it is captured: kernels are compiled and libraries pick theirs in them.
WARMUP = 3


def capture(
    step: Callable[[], Output], rewind: Callable[[], Any], device: torch.device
) -> tuple[Callable[[], None], Output]:
    """A CUDA graph of `step`: what replays it, and the tensors it writes its result to.

    Args:
        step: runs on `device` without synchronising.
        rewind: undoes what a warm-up run of `step` must not leave.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                rewind()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
    return graph.replay, output
