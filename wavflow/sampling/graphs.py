"""Capturing a step as a CUDA graph, and the places that its inputs keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from wavflow.flow.guidance import Output

#: Runs of a step before it is captured; in them kernels are compiled and libraries pick theirs.
WARMUP = 3


def capture(
    step: Callable[[], Output], rewind: Callable[[], Any], device: torch.device
) -> tuple[Callable[[], None], Output]:
    """Captures `step` as a CUDA graph.

    Args:
        step: runs on `device` without synchronising.
        rewind: undoes what a warm-up run of `step` must not leave.
        device: the GPU.

    Returns:
        What replays the graph, and the tensors that it writes the step's result to.
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


def clone(conditions: Any) -> Any:
    """Conditions, a dataclass, whose tensors are copies."""
    return replace(conditions, **{name: value.clone() for name, value in _tensors(conditions)})


def copy_into(places: Any, conditions: Any) -> None:
    """Copies the tensors of conditions into those of `places`, of the same shapes."""
    for name, value in _tensors(conditions):
        getattr(places, name).copy_(value)


def _tensors(conditions: Any) -> Iterator[tuple[str, Tensor]]:
    for field in fields(conditions):
        value = getattr(conditions, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
