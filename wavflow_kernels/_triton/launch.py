"""The one way a Triton kernel is launched, so that launches can be recorded without a GPU.

``python -m wavflow_kernels.tools.aot`` runs the ops' launchers on meta tensors under
:func:`recording` and compiles what they would have launched: there is no second list of
configurations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: the jitted kernel, its run-time arguments in order, constexprs, options."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    grid: Grid


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
    grid: Grid | Callable[[dict[str, Any]], Grid],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """``kernel[grid](*args, **constants)``; `constants` are its ``tl.constexpr`` parameters."""
    # Triton 3.10 will stop fusing a * b + c by default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _recorder is None:
        kernel[grid](*args, **options, **constants)
        return
    if callable(grid):
        grid = grid({**dict(zip(kernel.arg_names, args, strict=False)), **constants})
    _recorder.launches.append(Launch(kernel, args, constants, options, grid))
