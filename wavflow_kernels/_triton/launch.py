"""The one way a Triton kernel is launched, so that launches can be recorded without a GPU.

``python -m wavflow_kernels.aot`` runs the ops' launchers on meta tensors under :func:`recording`
and compiles what they would have launched: there is no second list of configurations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch: the jitted kernel, its run-time arguments in order, constexprs, options."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class _Recorder:
    capability: tuple[int, int]
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as on a device of that compute capability."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(capability, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability the launch is for; (0, 0) in Triton's interpreter."""
    if _recorder is not None:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """``kernel[grid](*args, **constants)``; `constants` are its ``tl.constexpr`` parameters."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
