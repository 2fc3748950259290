r"""Tokens back to a waveform: flatten, trim, and divide by ``audio_scale``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, target
from .._registry import ON_BOTH, Op, Sample, Workload, normals


def _check(tokens: Tensor, samples: int, audio_scale: float) -> None:
    op = "unpatchify"
    sizes = check(op, tokens=(tokens, "b n d"))
    check_dtype(op, "tokens", tokens, *FLOATS)
    longest = sizes["n"] * sizes["d"]
    require(longest > 0, f"{op}: tokens must not be empty, got {tuple(tokens.shape)}")
    require(0 < samples <= longest, f"{op}: samples must lie in [1, {longest}], got {samples}")
    require(audio_scale > 0, f"{op}: audio_scale must be positive, got {audio_scale}")


def reference(tokens: Tensor, samples: int, audio_scale: float) -> Tensor:  # b n d -> b t
    wave = tokens.to(compute_dtype(tokens.dtype)).flatten(1)
    return (wave[:, :samples] / audio_scale).to(tokens.dtype)


def _launch(out: Tensor, tokens: Tensor, samples: int, audio_scale: float) -> None:
    if not out.numel():
        return
    tokens = tokens.contiguous()
    b, n, d = tokens.shape
    where = target(tokens), DTYPE_CODE[tokens.dtype], address(tokens), address(out)
    C.unpatchify(*where, b, n * d, samples, audio_scale)


def _setup_context(
    ctx: Any, output: Tensor, tokens: Tensor, samples: int, audio_scale: float
) -> None:
    ctx.shape, ctx.audio_scale = tokens.shape, audio_scale


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    b, n, d = ctx.shape
    wide = grad.to(compute_dtype(grad.dtype)) / ctx.audio_scale
    wide = torch.nn.functional.pad(wide, (0, n * d - grad.shape[1]))
    return {"tokens": wide.view(b, n, d).to(grad.dtype)}


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)
    return [
        Sample((normal(3, 25, 40), 1000, 3.0), (0,), "even"),
        Sample((normal(2, 11, 7), 75, 3.0), (0,), "trimmed"),
        Sample((normal(2, 200, 200), 39_999, 3.0), (), "several blocks"),
        Sample((normal(0, 3, 4), 12, 3.0), (), "empty batch"),
    ]


def _workload(batch: int) -> Workload:
    """Clips of 8 s at 16 kHz."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(batch, 640, 200, device=device, dtype=dtype), 128_000, 3.0

    return make


OP = Op(
    name="unpatchify",
    schema="(Tensor tokens, SymInt samples, float audio_scale) -> Tensor",
    reference=reference,
    check=_check,
    outputs=lambda tokens, samples: tokens.new_empty(tokens.shape[0], samples),
    launch={"cpp": _launch},
    supported={"cpp": ON_BOTH},
    samples=_samples,
    workloads={f"{batch} clips of 8 s": _workload(batch) for batch in (8, 256)},
    bytes=lambda tokens, samples: tokens.nbytes + tokens.shape[0] * samples * tokens.itemsize,
    flops=lambda tokens: tokens.numel(),
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
)


def unpatchify(
    tokens: Tensor,  # b n d
    *,
    samples: int | None = None,
    audio_scale: float = 3.0,
) -> Tensor:  # b t
    """Join tokens to waveforms.

    Args:
        tokens: (b, n, d) tokens of d samples each, any float dtype.
        samples: t, samples kept of each item, at most n * d; None: all.
        audio_scale: the scale that :func:`lift_patchify` applied; divided out.

    Returns:
        (b, t) in the dtype of `tokens`. The lift's gain is not undone. Differentiable in `tokens`.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype.
    """
    if samples is None and isinstance(tokens, Tensor):
        samples = math.prod(tokens.shape[1:])
    return OP(tokens, samples, audio_scale)
