r"""The gate of a SwiGLU, :math:`\mathrm{silu}(a)\,b = a\,b / (1 + e^{-a})`, in one pass.

With :math:`s = 1 / (1 + e^{-a})` and :math:`g` the gradient of the result,
:math:`da = g\,b\,s\,(1 + a\,(1 - s))` and :math:`db = g\,a\,s`, both in one pass.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense_rows, target, triton_launch
from .._registry import ON_CPU, ON_TRITON, Op, Sample, Workload, no_double_backward, normals

_SUPPORTED = {"cpp": ON_CPU, "triton": ON_TRITON}


def _check(a: Tensor, b: Tensor) -> None:
    op = "swiglu"
    sizes = check(op, a=(a, "b n i"), b=(b, "b n i"))
    check_dtype(op, "a", a, *FLOATS)
    check_dtype(op, "b", b, a.dtype)
    for name, dim in (("tokens", "n"), ("channels", "i")):
        require(sizes[dim] > 0, f"{op}: there must be at least one of the {name}, got none")


def reference(a: Tensor, b: Tensor) -> Tensor:  # b n i
    wide = compute_dtype(a.dtype)
    return (F.silu(a.to(wide)) * b.to(wide)).to(a.dtype).contiguous()


def _call(grad: Tensor | None, a: Tensor, b: Tensor, out: Tensor, out_b: Tensor | None) -> None:
    if not a.numel():
        return
    a, b = dense_rows(a), dense_rows(b)
    grad = None if grad is None else dense_rows(grad)
    strides = [s for x in (a, b, a if grad is None else grad) for s in x.stride()[:2]]
    C.swiglu(
        target(a),
        DTYPE_CODE[a.dtype],
        address(grad),
        address(a),
        address(b),
        address(out),
        address(out_b),
        *a.shape,
        strides,
    )


def launch(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Fill `out` (b n i) with the gate of a and b, by the compiled kernel."""
    _call(None, a, b, out, None)


def _check_backward(grad: Tensor, a: Tensor, b: Tensor) -> None:
    _check(a, b)
    check("swiglu_backward", a=(a, "b n i"), grad=(grad, "b n i"))
    check_dtype("swiglu_backward", "grad", grad, a.dtype)


def _reference_backward(
    grad: Tensor,  # b n i
    a: Tensor,  # b n i
    b: Tensor,  # b n i
) -> tuple[Tensor, Tensor]:  # b n i
    dtype, wide = a.dtype, compute_dtype(a.dtype)
    grad, a, b = grad.to(wide), a.to(wide), b.to(wide)
    s = a.sigmoid()
    d_a = grad * b * (s * (1 + a * (-a).sigmoid()))  # 1 - s loses digits
    return d_a.to(dtype).contiguous(), (grad * (a * s)).to(dtype).contiguous()


def _launch_backward(out: tuple[Tensor, Tensor], grad: Tensor, a: Tensor, b: Tensor) -> None:
    _call(grad, a, b, *out)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    both = (0, 1)
    joined = normal(2, 5, 48)
    broadcast = normal(1, 3, 40).expand(2, 3, 40)
    return [
        Sample((2 * normal(2, 7, 33), normal(2, 7, 33)), both, "odd sizes"),
        Sample((normal(2, 3, 64), normal(2, 3, 64)), both, "even sizes"),
        Sample(tuple(joined.chunk(2, -1)), both, "joined"),
        Sample((normal(2, 6, 17).transpose(1, 2), normal(2, 17, 6)), both, "channels apart"),
        Sample((broadcast, normal(2, 3, 40)), both, "one row for the batch"),
        Sample((normal(1, 1, 1), normal(1, 1, 1)), both, "one number"),
        Sample((60 * normal(1, 9, 300), normal(1, 9, 300)), (), "far out"),
        Sample((normal(0, 3, 8), normal(0, 3, 8)), (), "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    return [
        Sample((s.args[1].flip(1) + 0.5, *s.args), (), s.name)
        for s in _samples(device, dtype, seed)
    ]


def _workloads(tensors: int) -> dict[str, Workload]:
    """Calls with that many tensors of the medium model's feed-forward width."""

    def workload(b: int, n: int) -> Workload:
        return lambda device, dtype: tuple(
            torch.randn(tensors, b, n, 2560, device=device, dtype=dtype).unbind()
        )

    return {"16k": workload(2, 640), "44k b16": workload(16, 1764)}


BACKWARD = Op(
    name="swiglu_backward",
    schema="(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference=_reference_backward,
    check=_check_backward,
    outputs=lambda a, b: (a.new_empty(a.shape), b.new_empty(b.shape)),
    launch={"cpp": _launch_backward, "triton": triton_launch("swiglu", "backward")},
    supported=_SUPPORTED,
    samples=_samples_backward,
    workloads=_workloads(tensors=3),
    bytes=lambda a: 5 * a.nbytes,
    flops=lambda a: 16 * a.numel(),
    tolerance="single_pass",
    backward=no_double_backward("swiglu"),
    bulk=("grad", "a", "b"),
    internal=True,
)


def _setup_context(ctx: Any, output: Tensor, a: Tensor, b: Tensor) -> None:
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    d_a, d_b = BACKWARD.torch_op(grad, *ctx.saved_tensors)
    return {"a": d_a, "b": d_b}


OP = Op(
    name="swiglu",
    schema="(Tensor a, Tensor b) -> Tensor",
    reference=reference,
    check=_check,
    outputs=lambda a: a.new_empty(a.shape),
    launch={"cpp": launch, "triton": triton_launch("swiglu", "forward")},
    supported=_SUPPORTED,
    samples=_samples,
    workloads=_workloads(tensors=2),
    bytes=lambda a: 3 * a.nbytes,
    flops=lambda a: 8 * a.numel(),
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("a", "b"),
    bulk=("a", "b"),
)


def swiglu(a: Tensor, b: Tensor) -> Tensor:  # b n i
    """Gate b by a: ``silu(a) * b``, rounded once.

    Args:
        a: (b, n, i) the branch that goes through SiLU, any float dtype. Rows that are contiguous
            are read in place whatever the other strides: halves of one (b, n, 2i) tensor cost
            no copy.
        b: (b, n, i) the other branch, in the dtype of a.

    Returns:
        (b, n, i) in the dtype of a, contiguous. Differentiable once in a and b.

    Raises:
        ValueError: shapes that do not fit, no token or no channel.
        TypeError: an unsupported dtype.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    return OP(a, b)
