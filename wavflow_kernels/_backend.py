"""Which implementations of an op exist here, why the others do not, and which one a call gets.

An op runs as one of

- ``cpp``: the compiled kernels of ``csrc`` (C++ on the CPU, CUDA C++ on a GPU),
- ``triton``: Triton kernels on a GPU (on the CPU in Triton's interpreter, for tests),
- ``library``: torch's own libraries (oneDNN, cuDNN, SDPA) called in the form that suits them best,
- ``compile``: ``torch.compile`` of the op's reference,
- ``reference``: the op's reference in eager torch.

The choice follows the tensor's device. ``WAVFLOW_BACKEND`` or :func:`use_backend` overrides it; a
choice that cannot be met raises and says what exists.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch  # before _C: the extension then shares torch's OpenMP runtime

BACKENDS = ("cpp", "triton", "library", "compile", "reference")
log = logging.getLogger("wavflow_kernels")

C: Any  # the extension, or None
try:
    C = importlib.import_module("wavflow_kernels._C")
    C_MISSING = ""
    C.use_isa(os.environ.get("WAVFLOW_CPU_ISA", ""))
except ImportError as error:
    C = None
    C_MISSING = (
        f"the compiled extension is absent ({error}); "
        "install with a C++ compiler (WAVFLOW_BUILD=cpu pip install .)"
    )


class Choosable(Protocol):
    """An op, as far as the choice of a backend asks."""

    @property
    def name(self) -> str: ...

    @property
    def supported(self) -> Mapping[str, Mapping[str, frozenset[torch.dtype]]]: ...

    @property
    def prefer(self) -> Callable[..., str | None] | None: ...


class BackendError(RuntimeError):
    """The error of a call whose backend was chosen by name and cannot run it."""


@cache
def cuda_reason() -> str:
    """Why the compiled CUDA kernels cannot run here, '' where they can; asks the driver once."""
    if C is None:
        return C_MISSING
    if not C.cuda_architectures:
        return "the extension was built without CUDA (nvcc was not found at build time)"
    return C.cuda_probe()


# Triton reads this variable at import; kernels then run in its interpreter, on CPU tensors.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def triton_reason(device: torch.device) -> str:
    """Why Triton kernels cannot run on the device, '' where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        return "" if TRITON_INTERPRETS else "Triton kernels run on a GPU"
    if torch.version.hip is not None:
        return "the Triton kernels are tested on NVIDIA GPUs alone"
    if TRITON_INTERPRETS:
        return "TRITON_INTERPRET=1 is set"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0, this device has {major}.{minor}"
    return ""


def unavailable(op: Choosable, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` on (device, dtype), in one sentence; '' where it can."""
    if backend in ("compile", "reference"):
        return ""
    devices = op.supported.get(backend, {})
    dtypes = devices.get(device.type)
    if backend == "triton" and device.type == "cpu" and TRITON_INTERPRETS:
        dtypes = devices.get("cuda", frozenset()) - {torch.bfloat16}
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly: it is tested on a GPU alone"
    if dtypes is None:
        return f"{op.name} has no {backend} kernel for device type '{device.type}'"
    if dtype not in dtypes:
        return f"{op.name} has no {backend} kernel for {dtype} on '{device.type}'"
    if backend == "cpp":
        return C_MISSING if device.type == "cpu" else cuda_reason()
    return triton_reason(device) if backend == "triton" else ""


def _checked(name: str | None, origin: str) -> str | None:
    if name not in (None, "", *BACKENDS):
        raise ValueError(f"{origin} is '{name}', wanted one of {', '.join(BACKENDS)}")
    return name or None


_override: str | None = _checked(os.environ.get("WAVFLOW_BACKEND"), "WAVFLOW_BACKEND")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block with the backend `name`, one of BACKENDS.

    ``None`` restores the automatic choice. Raises ValueError for an unknown name; a call that the
    backend cannot run raises :class:`BackendError`.
    """
    global _override
    previous, _override = _override, _checked(name, "use_backend")
    try:
        yield
    finally:
        _override = previous


_explained: set[tuple[str, str]] = set()


def choose(
    op: Choosable,
    device: torch.device,
    dtype: torch.dtype,
    args: Sequence[Any] | None = None,
    part: bool = False,
) -> str:
    """The backend a call gets: the override, else the measured one, else the first that runs.

    args: the call's, in the order of the schema; without them nothing measured is asked for.
    part: the call comes through the dispatcher: from the op's public function, which has met the
    override already, or as a part of another op, a gate or a backward, which chooses freely where
    it cannot meet it. Libraries are called past the dispatcher.
    """
    if _override is not None:
        unmet = unavailable(op, _override, device, dtype)
        if unmet and not part:
            raise BackendError(_explain(op, _override, device, dtype))
        if not unmet and not (part and _override == "library"):
            return _override
    if op.prefer is not None and args is not None:
        backend = op.prefer(*args)
        if backend is not None and not unavailable(op, backend, device, dtype):
            return backend
    candidates = ("cpp", "library") if device.type == "cpu" else ("cpp", "triton", "library")
    for backend in candidates:
        if not unavailable(op, backend, device, dtype):
            return backend
    fallback = "compile" if device.type == "cuda" else "reference"
    if not torch.compiler.is_compiling() and (op.name, device.type) not in _explained:
        _explained.add((op.name, device.type))
        log.warning("%s", _explain(op, fallback, device, dtype))
    return fallback


def _explain(op: Choosable, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    lines = []
    for backend in BACKENDS:
        reason = unavailable(op, backend, device, dtype)
        lines.append(f"{backend}: {'runs' if not reason else reason}")
    return f"{op.name} on {device.type} as '{wanted}'. " + "; ".join(lines)
