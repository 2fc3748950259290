"""What the launchers of the ops share: tensors as compiled kernels and Triton take them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# DType in csrc/args.h.
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def target(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where a compiled kernel runs, as ``Target`` of csrc/args.h: device, threads, stream."""
    if tensor.device.type == "cuda":
        return tensor.device.index, 0, torch.cuda.current_stream(tensor.device).cuda_stream
    return -1, torch.get_num_threads(), 0


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's data pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(*tensors: torch.Tensor | None) -> list[Any]:
    """Each tensor itself if it is contiguous, else a copy that is; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is contiguous, whatever its other strides; else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def triton_launch(module: str, function: str) -> Callable[..., None]:
    """The launcher `function` of ``_triton/<module>.py``, imported at its first call.

    It takes the outputs, and the arguments of the op by name.
    """

    @cache
    def launcher() -> Callable[..., None]:
        return getattr(importlib.import_module(f"wavflow_kernels._triton.{module}"), function)

    def launch(outputs: Any, /, **arguments: Any) -> None:
        launcher()(outputs, **arguments)

    return launch
