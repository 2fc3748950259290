r"""The end of one half of a transformer block and the start of the next, in one pass.

:math:`x'_n = x_n + \mathrm{gate}_{g(n)}\,y_n`, and the adaptive LayerNorm of :mod:`.adaln` of
:math:`x'` before it is rounded. Gate and modulation are gathered by rows of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype
from .._launch import DTYPE_CODE, address, dense, dense_rows, target, triton_launch
from .._registry import Op, Sample, no_double_backward, normals
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
from .adaln import (
    SUPPORTED,
    backward_workloads,
    check_layer_norm,
    layer_norm,
    layer_norm_backward,
)


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    gate_offsets: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    op = "gated_residual_adaln"
    sizes = check(
        op,
        x=(x, "b n c"),
        y=(y, "b n c"),
        gate=(gate, "b rg c"),
        shift=(shift, "b r c"),
        scale=(scale, "b r c"),
        **{
            "gate_rows.index": (gate_index, "n"),
            "gate_rows.offsets": (gate_offsets, "rg+1"),
            "rows.index": (index, "n"),
            "rows.offsets": (offsets, "r+1"),
        },
    )
    check_dtype(op, "x", x, *FLOATS)
    for name, tensor in (("y", y), ("gate", gate), ("shift", shift), ("scale", scale)):
        check_dtype(op, name, tensor, x.dtype)
    check_rows(op, "gate_rows", gate, gate_index, gate_offsets)
    check_rows(op, "rows", shift, index, offsets)
    check_layer_norm(op, sizes, eps)


def reference(
    x: Tensor,  # b n c
    y: Tensor,  # b n c
    gate: Tensor,  # b rg c
    gate_index: Tensor | None,  # n
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    eps: float,
) -> tuple[Tensor, Tensor]:  # b n c, b n c
    wide = compute_dtype(x.dtype)
    new = x.to(wide) + gather_rows(gate, gate_index, wide) * y.to(wide)
    normed = F.layer_norm(new, x.shape[-1:], eps=eps)
    shift, scale = gather_rows(shift, index, wide), gather_rows(scale, index, wide)
    out = normed * (1 + scale) + shift
    return new.to(x.dtype).contiguous(), out.to(x.dtype).contiguous()


def _launch(
    outs: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    gate_offsets: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not x.numel():
        return
    gate, shift, scale = (dense_rows(t) for t in (gate, shift, scale))
    x, y, index, offsets = dense(x, y, index, offsets)
    gate_index, gate_offsets = dense(gate_index, gate_offsets)
    C.gated_residual_adaln(
        target(x),
        DTYPE_CODE[x.dtype],
        address(x),
        address(y),
        row_tensor(gate),
        row_map(gate_index, gate_offsets, gate.shape[1]),
        row_tensor(shift),
        row_tensor(scale),
        row_map(index, offsets, shift.shape[1]),
        *(address(t) for t in outs),
        *x.shape,
        eps,
    )


# The backward computes the sum anew from x and y: y is read in any case, and the rounded sum in
# place of x would round the gradients of the rows twice.


def _check_backward(grad_new: Tensor, grad: Tensor, x: Tensor, scale: Tensor, **rest: Any) -> None:
    _check(x, shift=scale, scale=scale, **rest)
    op = "gated_residual_adaln_backward"
    check(op, x=(x, "b n c"), grad_new=(grad_new, "b n c"), grad=(grad, "b n c"))
    check_dtype(op, "grad_new", grad_new, x.dtype)
    check_dtype(op, "grad", grad, x.dtype)


def _outputs_backward(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, y, gate, scale, scale))


def _reference_backward(
    grad_new: Tensor,  # b n c
    grad: Tensor,  # b n c
    x: Tensor,  # b n c
    y: Tensor,  # b n c
    gate: Tensor,  # b rg c
    gate_index: Tensor | None,  # n
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    eps: float,
) -> tuple[Tensor, ...]:  # b n c, b n c, b rg c, b r c, b r c
    wide = compute_dtype(x.dtype)
    grad, y, gates = grad.to(wide), y.to(wide), gather_rows(gate, gate_index, wide)
    normed, inverse = layer_norm(x.to(wide) + gates * y, eps)
    modulated = grad * (1 + gather_rows(scale, index, wide))
    d_new = grad_new.to(wide) + layer_norm_backward(modulated, normed, inverse)
    gradients = (
        d_new,
        d_new * gates,
        segment_sums(d_new * y, gate_index, gate.shape[1]),
        segment_sums(grad, index, scale.shape[1]),
        segment_sums(grad * normed, index, scale.shape[1]),
    )
    return tuple(g.to(x.dtype) for g in gradients)


def _launch_backward(
    outs: tuple[Tensor, ...],
    grad_new: Tensor,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    gate_offsets: Tensor | None,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not x.numel():
        return
    gate, scale = dense_rows(gate), dense_rows(scale)
    grad_new, grad, x, y = dense(grad_new, grad, x, y)
    gate_index, gate_offsets, index, offsets = dense(gate_index, gate_offsets, index, offsets)
    C.gated_residual_adaln_backward(
        target(x),
        DTYPE_CODE[x.dtype],
        *(address(t) for t in (grad_new, grad, x, y)),
        row_tensor(gate),
        row_map(gate_index, gate_offsets, gate.shape[1]),
        row_tensor(scale),
        row_map(index, offsets, scale.shape[1]),
        *(address(t) for t in outs),
        *x.shape,
        eps,
    )


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def arguments(
        b: int, n: int, c: int, gate_rows: Any = NO_ROWS, rows: Any = NO_ROWS, eps: float = 1e-5
    ) -> tuple[Any, ...]:
        gate, shift, scale = (
            normal(b, 1 if offsets is None else len(offsets) - 1, 3 * c).chunk(3, -1)[1]
            for _, offsets in (gate_rows, rows, rows)
        )
        return normal(b, n, c), normal(b, n, c), gate, *gate_rows, shift, scale, *rows, eps

    few = sample_rows(device, [0, 0, 1, 1, 1, 4, 4, 5], 7)  # rows without tokens, too
    other = sample_rows(device, [1, 2, 2, 2, 3, 3, 3, 3], 4)
    long, longer = upsampled_rows(device, 75, 4), upsampled_rows(device, 75, 7)
    every = (0, 1, 2, 5, 6)
    strided = list(arguments(4, 3, 12))
    strided[0], strided[1] = (normal(3, 4, 12).transpose(0, 1) for _ in range(2))
    strided[2] = normal(1, 1, 12).expand(4, 1, 12)
    return [
        Sample(arguments(2, 8, 40, few, few), every, "the same rows"),
        Sample(arguments(2, 8, 24, few, other), every, "rows of their own"),
        Sample(arguments(2, 8, 20, few), every, "one row of modulation"),
        Sample(arguments(1, 8, 33, rows=few), every, "one row of gates"),
        Sample(arguments(3, 5, 7), every, "one row of each, odd width"),
        Sample(arguments(1, 75, 65, long, longer), every, "rows over blocks"),
        Sample(arguments(1, 70, 130), every, "one long row"),
        Sample(arguments(2, 1, 896), every, "one token"),
        Sample(arguments(1, 2, 1), every, "one channel"),
        Sample(tuple(strided), every, "strided, gate shared by the batch"),
        Sample(arguments(0, 8, 6, few, few), (), "empty batch"),
    ]


def _of_forward(x: Tensor, *args: Any) -> tuple[Any, ...]:
    """Make the arguments of the backward from those of the forward."""
    y, gate, gate_index, gate_offsets, _, *rest = args
    return torch.randn_like(x), torch.randn_like(x), x, y, gate, gate_index, gate_offsets, *rest


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for s in _samples(device, dtype, seed):
        x = s.args[0]
        wave = torch.linspace(-1, 2, x.numel(), device=device).view(x.shape)
        args = wave.sin().to(dtype), (3 * wave).cos().to(dtype), *_of_forward(*s.args)[2:]
        samples.append(Sample(args, (), s.name))
    return samples


def _workload(b: int, n: int, gate_rows: int | None, rows: int | None) -> Any:
    """A call with c = 896 whose gate, shift and scale are chunk views of a modulation."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x, y = (torch.randn(b, n, 896, device=device, dtype=dtype) for _ in range(2))
        wide = torch.randn(b, gate_rows or 1, 6 * 896, device=device, dtype=dtype)
        other = torch.randn(b, rows or 1, 6 * 896, device=device, dtype=dtype)
        first = NO_ROWS if gate_rows is None else upsampled_rows(device, n, gate_rows)
        second = NO_ROWS if rows is None else upsampled_rows(device, n, rows)
        if rows == gate_rows:
            other, second = wide, first
        gate, shift, scale = wide.chunk(6, -1)[2], *other.chunk(6, -1)[3:5]
        return x, y, gate, *first, shift, scale, *second, 1e-5

    return make


_WORKLOADS = {
    "16k": _workload(2, 640, 192, 192),
    "16k batch": _workload(16, 640, 192, 192),
    "44k batch": _workload(16, 1764, 192, 192),
    "final layer": _workload(16, 1764, 192, None),
    "text": _workload(16, 77, None, None),
}


BACKWARD = Op(
    name="gated_residual_adaln_backward",
    stem="adaln",
    schema=(
        "(Tensor grad_new, Tensor grad, Tensor x, Tensor y, Tensor gate, Tensor? gate_index, "
        "Tensor? gate_offsets, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward, "triton": triton_launch("adaln", "gated_backward")},
    supported=SUPPORTED,
    samples=_samples_backward,
    workloads=backward_workloads(_WORKLOADS, _of_forward),
    bytes=lambda x, gate, scale: 6 * x.nbytes + 2 * gate.nbytes + 3 * scale.nbytes,
    flops=lambda x: 22 * x.numel(),
    tolerance="reduction",
    backward=no_double_backward("gated_residual_adaln"),
    bulk=("grad_new", "grad", "x", "y"),
    internal=True,
)


def _setup_context(
    ctx: Any, output: tuple[Tensor, Tensor], shift: Tensor, eps: float, **saved: Any
) -> None:
    ctx.save_for_backward(*saved.values())
    ctx.eps = eps


def _backward(ctx: Any, grad_new: Tensor, grad: Tensor) -> dict[str, Tensor]:
    d_x, d_y, d_gate, d_shift, d_scale = BACKWARD.torch_op(
        grad_new, grad, *ctx.saved_tensors, ctx.eps
    )
    return {"x": d_x, "y": d_y, "gate": d_gate, "shift": d_shift, "scale": d_scale}


OP = Op(
    name="gated_residual_adaln",
    stem="adaln",
    schema=(
        "(Tensor x, Tensor y, Tensor gate, Tensor? gate_index, Tensor? gate_offsets, "
        "Tensor shift, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> (Tensor, Tensor)"
    ),
    reference=reference,
    check=_check,
    outputs=lambda x: (x.new_empty(x.shape), x.new_empty(x.shape)),
    launch={"cpp": _launch, "triton": triton_launch("adaln", "gated_forward")},
    supported=SUPPORTED,
    samples=_samples,
    workloads=_WORKLOADS,
    bytes=lambda x, gate, shift, scale: 4 * x.nbytes + gate.nbytes + shift.nbytes + scale.nbytes,
    flops=lambda x: 10 * x.numel(),
    tolerance="reduction",
    setup_context=_setup_context,
    backward=_backward,
    differentiable_outputs=2,
    autocast=("x", "y", "gate", "shift", "scale"),
    bulk=("x", "y"),
)


def gated_residual_adaln(
    x: Tensor,  # b n c
    y: Tensor,  # b n c
    gate: Tensor,  # b rg c
    gate_rows: TokenRows | None,
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    rows: TokenRows | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # b n c, b n c
    """Add a gated residual and apply the adaptive LayerNorm after it, in one pass.

    Args:
        x: (b, n, c) the residual stream, any float dtype, c at most 8192.
        y: (b, n, c) what a block adds to it; like all tensors here in the dtype of x.
        gate: (b, rg, c) factors of y.
        gate_rows: which of the rg rows of `gate` each token reads, from :func:`token_rows`.
            None: rg is 1.
        shift, scale: (b, r, c) modulation of the LayerNorm. They and the gate may be views of a
            wider projection or of one that is expanded over the batch: they are read in place.
        rows: which of the r rows of shift and scale each token reads. None: r is 1.
        eps: added to the variance.

    Returns:
        ``new = x + gate[row] * y`` and ``layer_norm(new) * (1 + scale[row]) + shift[row]``, both
        (b, n, c) in the dtype of x; the LayerNorm sees the float32 sum (float64 for float64) before
        it is rounded. Differentiable once in x, y, gate, shift and scale.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype, or dtypes that differ.

    Source: Scalable Diffusion Models with Transformers (arXiv 2212.09748), section 3.2.
    """
    return OP(
        x,
        y,
        gate,
        *(NO_ROWS if gate_rows is None else gate_rows),
        shift,
        scale,
        *(NO_ROWS if rows is None else rows),
        eps,
    )
