r"""LayerNorm without weights, then a shift and a scale that many tokens share.

:math:`\mathrm{out}_n = \frac{x_n - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}}\,(1 + \mathrm{scale}_r)
+ \mathrm{shift}_r`, where mean and (biased) variance run over the channels and the row r that token
n reads never decreases with n. A row's tokens are thus one range, and the gradient of a row is a
sum over that range.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, dense_rows, target, triton_launch
from .._registry import ON_CPU, ON_TRITON, Op, Sample, no_double_backward, normals
from .._rows import (
    NO_ROWS,
    TokenRows,
    check_rows,
    gather_rows,
    row_map,
    row_tensor,
    sample_rows,
    segment_sums,
    upsampled_rows,
)

MAX_CHANNELS = 8192  # kMaxChannels in csrc/adaln.h
SUPPORTED = {"cpp": ON_CPU, "triton": ON_TRITON}


def check_layer_norm(op: str, sizes: dict[str, int], eps: float) -> None:
    """Check what every op with a LayerNorm over (b n c) demands of its sizes and epsilon."""
    require(sizes["n"] > 0, f"{op}: x must hold at least one token, got none")
    require(
        0 < sizes["c"] <= MAX_CHANNELS,
        f"{op}: x must have 1 to {MAX_CHANNELS} channels, got {sizes['c']}",
    )
    require(eps > 0, f"{op}: eps must be positive, got {eps}")


def _check(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    op = "adaln"
    sizes = check(
        op,
        x=(x, "b n c"),
        shift=(shift, "b r c"),
        scale=(scale, "b r c"),
        **{"rows.index": (index, "n"), "rows.offsets": (offsets, "r+1")},
    )
    check_dtype(op, "x", x, *FLOATS)
    for name, tensor in (("shift", shift), ("scale", scale)):
        check_dtype(op, name, tensor, x.dtype)
    check_rows(op, "rows", shift, index, offsets)
    check_layer_norm(op, sizes, eps)


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise x over its channels; also 1 / standard deviation (b n 1)."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def layer_norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`layer_norm`'s first result in x."""
    along = (grad * normed).mean(-1, keepdim=True)
    return inverse * (grad - grad.mean(-1, keepdim=True) - normed * along)


def reference(
    x: Tensor,  # b n c
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    eps: float,
) -> Tensor:  # b n c
    wide = compute_dtype(x.dtype)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    shift, scale = gather_rows(shift, index, wide), gather_rows(scale, index, wide)
    return (normed * (1 + scale) + shift).to(x.dtype)


def _launch(
    out: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not out.numel():
        return
    shift, scale = dense_rows(shift), dense_rows(scale)
    x, index, offsets = dense(x, index, offsets)
    C.adaln(
        target(x),
        DTYPE_CODE[x.dtype],
        address(x),
        row_tensor(shift),
        row_tensor(scale),
        row_map(index, offsets, shift.shape[1]),
        address(out),
        *x.shape,
        eps,
    )


def _check_backward(grad: Tensor, x: Tensor, scale: Tensor, **rest: Any) -> None:
    _check(x, scale, scale, **rest)
    check("adaln_backward", x=(x, "b n c"), grad=(grad, "b n c"))
    check_dtype("adaln_backward", "grad", grad, x.dtype)


def _reference_backward(
    grad: Tensor,  # b n c
    x: Tensor,  # b n c
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # b n c, b r c, b r c
    wide, rows = compute_dtype(x.dtype), scale.shape[1]
    grad, (normed, inverse) = grad.to(wide), layer_norm(x.to(wide), eps)
    d_x = layer_norm_backward(grad * (1 + gather_rows(scale, index, wide)), normed, inverse)
    d_shift = segment_sums(grad, index, rows)
    d_scale = segment_sums(grad * normed, index, rows)
    return d_x.to(x.dtype), d_shift.to(x.dtype), d_scale.to(x.dtype)


def _launch_backward(
    out: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not x.numel():
        return
    scale = dense_rows(scale)
    grad, x, index, offsets = dense(grad, x, index, offsets)
    C.adaln_backward(
        target(x),
        DTYPE_CODE[x.dtype],
        address(grad),
        address(x),
        row_tensor(scale),
        row_map(index, offsets, scale.shape[1]),
        *(address(t) for t in out),
        *x.shape,
        eps,
    )


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def chunks(b: int, r: int, c: int) -> tuple[Tensor, Tensor]:
        """Make shift and scale as the model has them: views of one projection."""
        _, shift, scale, *_ = normal(b, r, 6 * c).chunk(6, -1)
        return shift, scale

    gathered = sample_rows(device, [0, 0, 1, 1, 1, 4, 4, 5], 7)  # rows without tokens, too
    long = upsampled_rows(device, 75, 4)
    large = 1e3 * normal(1, 3, 16), *chunks(1, 1, 16)
    small = 1e-3 * normal(1, 3, 24), *chunks(1, 1, 24)  # a variance below eps
    every = (0, 1, 2)
    return [
        Sample((normal(2, 8, 40), *chunks(2, 7, 40), *gathered, 1e-5), every, "gathered rows"),
        Sample((normal(3, 5, 7), *chunks(3, 1, 7), *NO_ROWS, 1e-5), every, "one row, odd width"),
        Sample((normal(2, 75, 65), *chunks(2, 4, 65), *long, 1e-5), every, "rows over blocks"),
        Sample((normal(1, 70, 130), *chunks(1, 1, 130), *NO_ROWS, 1e-5), every, "one long row"),
        Sample((normal(2, 1, 896), *chunks(2, 1, 896), *NO_ROWS, 1e-5), every, "one token"),
        Sample((normal(1, 2, 1), *chunks(1, 1, 1), *NO_ROWS, 1e-5), every, "one channel"),
        Sample((*large, *NO_ROWS, 1e-5), every, "large"),
        Sample((*small, *NO_ROWS, 1e-5), every, "small"),
        Sample(
            (normal(4, 3, 12).transpose(0, 1), *(t.expand(3, 1, 12) for t in chunks(1, 1, 12)))
            + (*NO_ROWS, 1e-2),
            every,
            "strided, rows shared by the batch",
        ),
        Sample((normal(0, 8, 6), *chunks(0, 7, 6), *gathered, 1e-5), (), "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for s in _samples(device, dtype, seed):
        x, _, *rest = s.args
        grad = torch.linspace(-1, 2, x.numel(), device=device).view(x.shape).sin().to(dtype)
        samples.append(Sample((grad, x, *rest), (), s.name))
    return samples


def _workload(b: int, n: int, rows: int | None) -> Any:
    """A call with c = 896 whose shift and scale are chunk views of a block's modulation."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(b, n, 896, device=device, dtype=dtype)
        chunks = torch.randn(b, rows or 1, 6 * 896, device=device, dtype=dtype).chunk(6, -1)
        which = NO_ROWS if rows is None else upsampled_rows(device, n, rows)
        return x, chunks[0], chunks[1], *which, 1e-5

    return make


def backward_workloads(workloads: Any, of_forward: Any) -> dict[str, Any]:
    """Make the backward's workloads of the forward's, whose arguments `of_forward` changes."""
    return {
        name: lambda device, dtype, make=make: of_forward(*make(device, dtype))
        for name, make in workloads.items()
    }


_WORKLOADS = {
    "16k": _workload(2, 640, 192),
    "16k batch": _workload(16, 640, 192),
    "44k batch": _workload(16, 1764, 192),
    "one row": _workload(16, 1764, None),
    "text": _workload(16, 77, None),
}


BACKWARD = Op(
    name="adaln_backward",
    schema=(
        "(Tensor grad, Tensor x, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=lambda x, scale: tuple(t.new_empty(t.shape) for t in (x, scale, scale)),
    launch={"cpp": _launch_backward, "triton": triton_launch("adaln", "backward")},
    supported=SUPPORTED,
    samples=_samples_backward,
    workloads=backward_workloads(
        _WORKLOADS, lambda x, shift, *rest: (torch.randn_like(x), x, *rest)
    ),
    bytes=lambda x, scale: 3 * x.nbytes + 3 * scale.nbytes,
    flops=lambda x: 16 * x.numel(),
    tolerance="reduction",
    backward=no_double_backward("adaln"),
    bulk=("grad", "x"),
    internal=True,
)


def _setup_context(
    ctx: Any,
    output: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Any,
    offsets: Any,
    eps: float,
) -> None:
    ctx.save_for_backward(x, scale, index, offsets)
    ctx.eps = eps


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    d_x, d_shift, d_scale = BACKWARD.torch_op(grad, *ctx.saved_tensors, ctx.eps)
    return {"x": d_x, "shift": d_shift, "scale": d_scale}


OP = Op(
    name="adaln",
    schema=(
        "(Tensor x, Tensor shift, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> Tensor"
    ),
    reference=reference,
    check=_check,
    outputs=lambda x: x.new_empty(x.shape),
    launch={"cpp": _launch, "triton": triton_launch("adaln", "forward")},
    supported=SUPPORTED,
    samples=_samples,
    workloads=_WORKLOADS,
    bytes=lambda x, shift, scale: 2 * x.nbytes + shift.nbytes + scale.nbytes,
    flops=lambda x: 8 * x.numel(),
    tolerance="reduction",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "shift", "scale"),
    bulk=("x",),
)


def adaln(
    x: Tensor,  # b n c
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    rows: TokenRows | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:  # b n c
    """LayerNorm without weights, modulated: ``layer_norm(x) * (1 + scale[row]) + shift[row]``.

    Args:
        x: (b, n, c) tokens, any float dtype, c at most 8192.
        shift, scale: (b, r, c) in the dtype of x. Views of a wider projection or of one that is
            expanded over the batch are read in place.
        rows: which of the r rows each token reads, from :func:`token_rows`. None: r is 1.
        eps: added to the variance.

    Returns:
        (b, n, c) in the dtype of x, computed in float32 (float64 for float64). Differentiable once
        in x, shift and scale.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype, or dtypes that differ.

    Source: Scalable Diffusion Models with Transformers (arXiv 2212.09748), section 3.2.
    """
    return OP(x, shift, scale, *(NO_ROWS if rows is None else rows), eps)
