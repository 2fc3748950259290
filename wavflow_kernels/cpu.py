"""What the processor and torch's libraries on it can do. Whatever asks about the CPU asks here.

Four levels of instructions decide: ``default`` (any processor), ``avx2``, ``avx512`` and
``avx512_bf16``. ``WAVFLOW_CPU_ISA`` in the environment, or :func:`feign` in a test, lowers the
level: then every choice is made as on such a processor, and the compiled kernels use its
instructions alone. torch's libraries keep to it if told so by ``ATEN_CPU_CAPABILITY`` and
``ONEDNN_MAX_CPU_ISA``; the latter is read here too, for oneDNN may be told to do less.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LEVELS = ("default", "avx2", "avx512", "avx512_bf16")
_NEEDS = {
    "avx2": ("avx2", "fma3", "bmi2"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
    "avx512_bf16": ("avx512_bf16",),
}


@dataclass(frozen=True)
class Cpu:
    """What a choice of kernels asks about the processor."""

    level: str  # of LEVELS, for the compiled kernels
    onednn_level: str  # likewise, for torch's oneDNN
    onednn: frozenset[torch.dtype]  # dtypes that oneDNN has convolutions and matrix products of
    bf16: bool  # whether bfloat16 arithmetic is the processor's own


def lower(*levels: str) -> str:
    """The level with the fewest instructions."""
    return min(levels, key=LEVELS.index)


def of_processor(capabilities: Mapping[str, Any]) -> str:
    """The highest level whose instructions, and those of the levels below, are all there."""
    found = LEVELS[0]
    for level in LEVELS[1:]:
        if not all(capabilities.get(name) for name in _NEEDS[level]):
            break
        found = level
    return found


def onednn_limit(environment: Mapping[str, str]) -> str:
    """The level that ``ONEDNN_MAX_CPU_ISA`` allows; oneDNN takes an unknown name for no limit."""
    name = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    name = name.upper()
    if name in ("SSE41", "AVX"):
        return "default"
    if name.startswith("AVX2"):
        return "avx2"
    return "avx512" if name in ("AVX512_CORE", "AVX512_CORE_VNNI") else LEVELS[-1]


def checked(wanted: str, best: str, origin: str) -> str:
    """`wanted` if it is a level that the processor has; '' is the best one."""
    if not wanted:
        return best
    if wanted not in LEVELS:
        raise ValueError(f"{origin} is '{wanted}', wanted one of {', '.join(reversed(LEVELS))}")
    if lower(wanted, best) != wanted:
        raise ValueError(
            f"{origin} is '{wanted}', which this processor does not have; its best is '{best}'"
        )
    return wanted


PROCESSOR = of_processor(torch.cpu.get_capabilities())


def _known(level: str) -> Cpu:
    by_onednn = lower(level, onednn_limit(os.environ))
    dtypes = {torch.float32} if torch.backends.mkldnn.is_available() else set()
    # oneDNN's bfloat16 needs avx512 or avx_ne_convert, which no level names: torch knows whether
    # the processor has either, not what it was told to leave alone.
    unlimited = by_onednn == PROCESSOR or LEVELS.index(by_onednn) >= LEVELS.index("avx512")
    if dtypes and unlimited and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    return Cpu(level, by_onednn, frozenset(dtypes), by_onednn == "avx512_bf16")


_cpu = _known(checked(os.environ.get("WAVFLOW_CPU_ISA", ""), PROCESSOR, "WAVFLOW_CPU_ISA"))


def current() -> Cpu:
    """The processor as choices see it now."""
    return _cpu


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which convolutions and matrix products of `dtype` are computed on the CPU.

    float32 for bfloat16 where oneDNN has none: torch's own kernels are 6 to 15 times slower there,
    conversions included. And float32 for float16, whose gradients oneDNN sums in float16.
    """
    if dtype == torch.float16 or (dtype == torch.bfloat16 and dtype not in _cpu.onednn):
        return torch.float32
    return dtype


@contextlib.contextmanager
def feign(level: str) -> Iterator[None]:
    """Make choices inside the block, and run compiled kernels, as on a CPU of this level.

    For tests. Raises ValueError for a level that this processor does not have.
    """
    from ._backend import C

    global _cpu
    previous, _cpu = _cpu, _known(checked(level, PROCESSOR, "feign"))
    if C is not None:
        C.use_isa(_cpu.level)
    try:
        yield
    finally:
        _cpu = previous
        if C is not None:
            C.use_isa(previous.level)


def name() -> str:
    """The processor's name."""
    return (
        torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    )


def describe() -> str:
    """The processor, and the instructions that each part may use, in one line."""
    halves = "yes" if _cpu.bf16 else "no" if torch.bfloat16 in _cpu.onednn else "no, by float32"
    return (
        f"{name()}, {os.cpu_count()} cores, {PROCESSOR}; in use: kernels {_cpu.level}, oneDNN "
        f"{_cpu.onednn_level}, torch {torch.backends.cpu.get_cpu_capability().lower()}; "
        f"native bfloat16: {halves}"
    )
