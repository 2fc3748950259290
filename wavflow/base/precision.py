"""Which device and dtype a model runs with."""

from __future__ import annotations

import torch

from wavflow.base.errors import InputError
from wavflow_kernels import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is the current GPU where there is one, else the CPU.

    Raises:
        InputError: an unknown device, or one that is not present.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is {device!r}; wanted auto, cpu, cuda or cuda:N") from None
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device {device}: torch sees no GPU here")
        index = torch.cuda.current_device() if resolved.index is None else resolved.index
        if index >= torch.cuda.device_count():
            raise InputError(f"device {device}: torch sees {torch.cuda.device_count()} GPU(s)")
        return torch.device("cuda", index)
    if resolved.type != "cpu":
        raise InputError(f"device is {device!r}; wanted auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 where `device` has it in hardware, else float32.

    On a CPU that means AVX-512-BF16: elsewhere bf16 is computed by float32, and is no faster.

    Raises:
        InputError: an unknown dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native on `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu.current().bf16


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Says in one line the device's name, the dtype, and whether bf16 is native there."""
    fast = has_fast_bf16(device)
    if device.type == "cuda":
        name, unit = torch.cuda.get_device_name(device), "bf16 tensor cores"
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
        unit = "AVX-512-BF16"
    return f"{name}, {str(dtype).removeprefix('torch.')} ({unit}: {'yes' if fast else 'no'})"
