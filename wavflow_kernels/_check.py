"""Argument checks of the ops: sizes bound by name, errors that say what was found and wanted."""

from __future__ import annotations

from functools import cache

import torch

Spec = tuple[torch.Tensor | None, str]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def _dims(dims: str) -> tuple[str, ...]:
    return tuple(dims.split())


def check(op: str, **arguments: Spec) -> dict[str, int]:
    """Bind the size names of ``name=(tensor, "b n d")`` and return them.

    A number stands for itself; a name must have one size in all arguments. ``None`` tensors are
    skipped. All tensors must live on the first one's device. Raises TypeError for a non-tensor and
    ValueError naming op, argument, wanted and found.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for name, (tensor, dims) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        wanted, shape = _dims(dims), tensor.shape
        if len(shape) != len(wanted):
            raise ValueError(
                f"{op}: {name} must have shape ({', '.join(wanted)}), got {tuple(shape)}"
            )
        for size, dim in zip(shape, wanted, strict=True):
            expected = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
            if size != expected:
                raise ValueError(
                    f"{op}: {name} must have shape ({', '.join(wanted)}) with "
                    f"{dim} = {expected}, got {tuple(shape)}"
                )
        here = tensor.device
        if device is None:
            device = here
        elif here != device:
            raise ValueError(f"{op}: {name} is on {here}, wanted {device}")
    return sizes


def check_dtype(op: str, name: str, tensor: torch.Tensor | None, *wanted: torch.dtype) -> None:
    """Raise TypeError unless `tensor` is None or has one of the wanted dtypes."""
    if tensor is not None and tensor.dtype not in wanted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {names}, got {found}")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
