r"""The training mix of flow matching, with the noise given or drawn inside.

:math:`x_t = (1 - (1 - \sigma_{min})\,t)\,x_0 + t\,x_1`. Drawn noise is Philox 4x32-10 keyed by the
item's seed and counted by the element's position, through Box and Muller: an item's noise has the
same bits in any batch, on any number of threads, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _philox
from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, target
from .._registry import ON_BOTH, Op, Sample, Workload, normals


def _check(
    x_1: Tensor,
    t: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    sigma_min: float,
    noise_scale: float,
    offset: int,
) -> None:
    op = "flow_mix"
    sizes = check(op, x_1=(x_1, "b n d"), t=(t, "b"), noise=(noise, "b n d"), seeds=(seeds, "b"))
    computed = compute_dtype(x_1.dtype)
    check_dtype(op, "x_1", x_1, *FLOATS)
    check_dtype(op, "t", t, computed)
    check_dtype(op, "noise", noise, computed)
    check_dtype(op, "seeds", seeds, torch.int64)
    require(
        (noise is None) != (seeds is None),
        f"{op}: exactly one of noise and seeds must be given, got "
        + ("neither" if noise is None else "both"),
    )
    require(
        sizes["n"] > 0 and sizes["d"] > 0,
        f"{op}: x_1 must hold at least one token, got {tuple(x_1.shape)}",
    )
    require(0 <= sigma_min < 1, f"{op}: sigma_min must lie in [0, 1), got {sigma_min}")
    require(noise_scale >= 0, f"{op}: noise_scale must not be negative, got {noise_scale}")
    require(offset >= 0 and offset % 4 == 0, f"{op}: offset must be a multiple of 4, got {offset}")


def _outputs(x_1: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    x_0 = x_1.new_empty(0 if noise is not None else x_1.shape, dtype=compute_dtype(x_1.dtype))
    return x_1.new_empty(x_1.shape), x_0


def reference(
    x_1: Tensor,  # b n d
    t: Tensor,  # b
    noise: Tensor | None,  # b n d
    seeds: Tensor | None,  # b
    sigma_min: float,
    noise_scale: float,
    offset: int,
) -> tuple[Tensor, Tensor]:  # b n d, b n d
    x_0 = noise
    if x_0 is None:
        assert seeds is not None
        count = x_1[0].numel() if len(x_1) else 0
        x_0 = _philox.normal(seeds, count, offset).to(t.dtype) * noise_scale
        x_0 = x_0.view(x_1.shape)
    time = t[:, None, None]
    x_t = (1 - (1 - sigma_min) * time) * x_0 + time * x_1
    return x_t.to(x_1.dtype), x_0 if noise is None else noise.new_empty(0)


def _launch(
    out: tuple[Tensor, Tensor],
    x_1: Tensor,
    t: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    sigma_min: float,
    noise_scale: float,
    offset: int,
) -> None:
    if not x_1.numel():
        return
    x_1, t, noise, seeds = dense(x_1, t, noise, seeds)
    C.flow_mix(
        target(x_1),
        DTYPE_CODE[x_1.dtype],
        address(x_1),
        address(t),
        address(noise),
        address(seeds),
        address(out[0]),
        address(None if noise is not None else out[1]),
        x_1.shape[0],
        x_1.shape[1] * x_1.shape[2],
        offset,
        sigma_min,
        noise_scale,
    )


def _setup_context(
    ctx: Any,
    output: tuple[Tensor, Tensor],
    x_1: Tensor,
    t: Tensor,
    noise: Tensor | None,
    sigma_min: float,
) -> None:
    ctx.save_for_backward(x_1, t, output[1] if noise is None else noise)
    ctx.noise_given, ctx.sigma_min = noise is not None, sigma_min


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> dict[str, Tensor]:
    x_1, t, x_0 = ctx.saved_tensors
    grad = grad.to(t.dtype)
    time = t[:, None, None]
    keep = 1 - ctx.sigma_min
    found = {}
    if OP.needs(ctx, "x_1"):
        found["x_1"] = (grad * time).to(x_1.dtype)
    if OP.needs(ctx, "t"):
        found["t"] = (grad * (x_1 - keep * x_0)).sum((1, 2))
    if ctx.noise_given and OP.needs(ctx, "noise"):
        found["noise"] = grad * (1 - keep * time)
    return found


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    computed = compute_dtype(dtype)

    normal = normals(generator, device, dtype)

    def times(batch: int) -> Tensor:
        return torch.rand(batch, generator=generator, dtype=torch.float64).to(device, computed)

    seeds = torch.tensor([0, -1, 2**62 + 12345], device=device)
    return [
        Sample(
            (normal(3, 25, 40), times(3), normal(3, 25, 40, dtype=computed), None, 0.0, 1.0, 0),
            (0, 1, 2),
            "noise given",
        ),
        Sample((normal(3, 5, 7), times(3), None, seeds, 0.01, 0.7, 0), (0, 1), "noise drawn"),
        Sample((normal(3, 5, 7), times(3), None, seeds, 0.0, 1.0, 2**34 + 4), (), "further on"),
        Sample((normal(3, 111, 300), times(3), None, seeds, 0.0, 1.0, 8), (), "several blocks"),
        Sample((normal(3, 1, 1), times(3), None, seeds, 0.0, 1.0, 0), (), "one element"),
        Sample((normal(0, 4, 4), times(0), None, seeds[:0], 0.0, 1.0, 0), (), "empty batch"),
    ]


def _workload(batch: int) -> Workload:
    """Clips of 8 s at 16 kHz, with noise drawn inside; audio stays in the computed dtype."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x_1 = torch.randn(batch, 640, 200, device=device, dtype=compute_dtype(dtype))
        t = torch.rand(batch, device=device, dtype=x_1.dtype)
        return x_1, t, None, torch.arange(batch, device=device), 0.0, 1.0, 0

    return make


OP = Op(
    name="flow_mix",
    schema=(
        "(Tensor x_1, Tensor t, Tensor? noise, Tensor? seeds, float sigma_min, float noise_scale,"
        " SymInt offset) -> (Tensor, Tensor)"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch},
    supported={"cpp": ON_BOTH},
    samples=_samples,
    workloads={f"{batch} clips of 8 s": _workload(batch) for batch in (8, 256)},
    # Noise is read, or x_0 written.
    bytes=lambda x_1: 2 * x_1.nbytes + x_1.numel() * compute_dtype(x_1.dtype).itemsize,
    flops=lambda x_1, noise: x_1.numel() * (3 if noise is not None else 60),
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
)


def flow_mix(
    x_1: Tensor,  # b n d
    t: Tensor,  # b
    *,
    noise: Tensor | None = None,  # b n d
    seeds: Tensor | None = None,  # b
    sigma_min: float = 0.0,
    noise_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # b n d, b n d
    """Mix clean tokens with noise on the straight path of flow matching.

    Args:
        x_1: (b, n, d) clean tokens.
        t: (b,) times, 0 is noise and 1 is data; float32 (float64 for float64 tokens).
        noise: (b, n, d) x_0 in t's dtype, used as it is; or
        seeds: (b,) int64, one stream of normals an item, multiplied by `noise_scale`.
        sigma_min: noise left at t = 1.
        noise_scale: standard deviation of drawn noise.

    Returns:
        x_t (b, n, d) in x_1's dtype, and x_0 (b, n, d) in t's dtype.

    Raises:
        ValueError: shapes that do not fit, or not exactly one of noise and seeds.
        TypeError: an unsupported dtype.
    """
    x_t, x_0 = OP(x_1, t, noise, seeds, sigma_min, noise_scale, 0)
    return x_t, x_0 if noise is None else noise


def philox_normal(
    seeds: Tensor,  # b
    tokens: int,
    token_size: int,
    *,
    noise_scale: float = 1.0,
    first: int = 0,
) -> Tensor:  # b n d
    """The noise that :func:`flow_mix` draws for `seeds`: (b, tokens, token_size) float32.

    It is tokens first, first + 1, ... of endless streams, so that a long one can be had in parts.

    Raises ValueError / TypeError as :func:`flow_mix` does.
    """
    check("philox_normal", seeds=(seeds, "b"))
    require(first >= 0, f"philox_normal: first must not be negative, got {first}")
    # Streams are counted in blocks of 4 numbers; 4 tokens are whole ones, whatever their size.
    more = first % 4
    zeros = torch.zeros(len(seeds), more + tokens, token_size, device=seeds.device)
    offset = (first - more) * token_size
    noise = OP(zeros, zeros.new_zeros(len(seeds)), None, seeds, 0.0, noise_scale, offset)[1]
    return noise[:, more:]
