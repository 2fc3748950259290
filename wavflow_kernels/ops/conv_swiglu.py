r"""The first half of a SwiGLU network: two convolutions over tokens, one gating the other.

:math:`\mathrm{silu}(a)\,b` with :math:`a = w_1 * x`, :math:`b = w_3 * x`, the convolutions of
:func:`conv1d` without biases. Width 1 makes them Linears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _panels, _tuned
from .._check import compute_dtype, require
from .._launch import triton_launch
from .._registry import ON_BOTH, ON_TRITON, Op, Sample, normals
from . import prepared_conv
from . import swiglu as gate
from .conv1d import (
    COMPILED,
    check_convolution,
    convolve,
    convolved,
    gradients,
    key,
    plain,
)
from .prepared_conv import PreparedConv


def _check(x: Tensor, w1: Tensor, w3: Tensor) -> None:
    check_convolution("conv_swiglu", x, w1=w1, w3=w3)


def _outputs(x: Tensor, w1: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], w1.shape[0])
    kept = shape if keep else (0,)
    return x.new_empty(shape), x.new_empty(kept), x.new_empty(kept)


def reference(
    x: Tensor,  # b n c
    w1: Tensor,  # i c k
    w3: Tensor,  # i c k
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # b n i; a and b: b n i or 0
    a, b = plain(x, w1), plain(x, w3)
    out = gate.reference(a, b)
    if not keep:
        return out, x.new_empty(0), x.new_empty(0)
    return out, a.contiguous(), b.contiguous()


def library(x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor]:
    """Call oneDNN or cuDNN for two convolutions, and gate them.

    Joined into one they take the same time, and the weights of a training step come apart.
    """
    return (gate.OP.torch_op(convolve(x, w1), convolve(x, w3)),)


def _launch(
    out: tuple[Tensor, Tensor, Tensor], x: Tensor, w1: Tensor, w3: Tensor, keep: bool
) -> None:
    y, *kept = out
    x, pair, channels = x.float(), (w1.float(), w3.float()), len(w1)
    if keep and y.dtype == torch.float32:
        for weight, z in zip(pair, kept, strict=True):
            _panels.multiply(x, _panels.pack(weight), channels, out=z)
    else:
        sums = (_panels.multiply(x, _panels.pack(weight), channels) for weight in pair)
        made = [z.to(y.dtype) for z in sums]
        kept = [z.copy_(m) for z, m in zip(kept, made, strict=True)] if keep else made
    gate.launch(y, *kept)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def arguments(b: int, n: int, c: int, i: int, k: int, keep: bool = True) -> list[Any]:
        w1, w3 = (normal(i, c, k) * (c * k) ** -0.5 for _ in range(2))
        return [normal(b, n, c), w1, w3, keep]

    strided = arguments(2, 9, 16, 32, 3)
    strided[0] = normal(2, 9, 40)[..., 8:24]
    broadcast = arguments(3, 5, 16, 16, 3)
    broadcast[0] = normal(1, 5, 16).expand(3, 5, 16)
    return [
        Sample(tuple(s), (0, 1, 2) if name else (), name)
        for name, s in {
            "width 3": arguments(2, 37, 24, 48, 3),
            "width 7, odd sizes": arguments(2, 7, 33, 17, 7),
            "width 1": arguments(2, 19, 64, 48, 1),
            "computed again": arguments(2, 11, 16, 32, 3, keep=False),
            "strided": strided,
            "one item for the batch": broadcast,
            "wider than the sequence": arguments(2, 2, 8, 8, 7),
            "one token": arguments(2, 1, 16, 16, 3),
        }.items()
    ] + [Sample(tuple(arguments(0, 4, 8, 8, 3)), (), "empty batch")]


def _prefer(x: Tensor, w1: Tensor, w3: Tensor, keep: bool) -> str | None:
    if x.device.type == "cpu":
        return "cpp" if _panels.fastest(x.dtype) else "library"
    row = _tuned.lookup("conv_swiglu", x.device, key(x, w1, " keep" if keep else ""))
    return row.get("backend", "library")


def _setup_context(
    ctx: Any, output: tuple[Tensor, ...], x: Tensor, w1: Tensor, w3: Tensor, keep: bool
) -> None:
    ctx.save_for_backward(x, w1, w3, *output[1:])
    ctx.keep = keep


def _backward(ctx: Any, grad: Tensor, *ignored: Tensor) -> dict[str, Tensor | None]:
    x, w1, w3, a, b = ctx.saved_tensors
    needs_x, needs_w1, needs_w3, _ = ctx.needs_input_grad
    if not ctx.keep:
        a, b = convolved(x, w1), convolved(x, w3)
    d_a, d_b = gate.BACKWARD.torch_op(grad, a, b)
    d_x1, d_w1, _ = gradients(d_a, x, w1, (needs_x, needs_w1, False))
    d_x3, d_w3, _ = gradients(d_b, x, w3, (needs_x, needs_w3, False))
    d_x = None
    if d_x1 is not None and d_x3 is not None:
        wide = compute_dtype(x.dtype)
        d_x = (d_x1.to(wide) + d_x3.to(wide)).to(x.dtype)
    return {"x": d_x, "w1": d_w1, "w3": d_w3}


def _workload(b: int, n: int, c: int, i: int, k: int, keep: bool = False) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        weights = torch.randn(2, i, c, k, device=device, dtype=dtype) * (c * k) ** -0.5
        return torch.randn(b, n, c, device=device, dtype=dtype), *weights.unbind(), keep

    return make


OP = Op(
    name="conv_swiglu",
    schema="(Tensor x, Tensor w1, Tensor w3, bool keep) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch, "triton": triton_launch("conv_swiglu", "forward")},
    library=library,
    supported={"cpp": COMPILED, "triton": ON_TRITON, "library": ON_BOTH},
    prefer=_prefer,
    samples=_samples,
    workloads={
        "16k": _workload(2, 640, 896, 2560, 3),
        "16k b16": _workload(16, 640, 896, 2560, 3),
        "44k b16": _workload(16, 1764, 896, 2560, 3),
        "training": _workload(16, 640, 896, 2560, 3, keep=True),
        "clip": _workload(2, 64, 896, 2560, 3),
        "text": _workload(2, 77, 896, 2560, 1),
        "audio in": _workload(1, 640, 896, 2560, 7),
    },
    bytes=lambda x, w1, keep: (
        x.nbytes + 2 * w1.nbytes + (3 if keep else 1) * x[..., 0].numel() * w1.shape[0] * x.itemsize
    ),
    flops=lambda x, w1: 4 * x.shape[0] * x.shape[1] * w1.numel(),
    tolerance="matrix",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "w1", "w3"),
    bulk=("x", "w1", "w3"),
)


def conv_swiglu(
    x: Tensor,  # b n c
    w1: Tensor | PreparedConv,  # i c k, or i c
    w3: Tensor | None = None,  # i c k, or i c
) -> Tensor:  # b n i
    """Gate one convolution by another: ``silu(conv(x, w1)) * conv(x, w3)``, padded by k // 2.

    Args:
        x: (b, n, c) tokens, any float dtype, any strides.
        w1: (i, c, k) weight of the branch that goes through SiLU, with an odd width k, or (i, c)
            for Linears; dtype of x. Or what :func:`prepare_conv` made of [w1, w3]: then w3 is None
            and there is no gradient.
        w3: weight of the other branch, of the same shape.

    Returns:
        (b, n, i) in the dtype of x. Differentiable once in x, w1 and w3; both pre-activations are
        then kept for the backward.

    Raises:
        ValueError: shapes that do not fit, an even width, no token.
        TypeError: an unsupported dtype.
    """
    if isinstance(w1, PreparedConv):
        require(w1.gated and w3 is None, "conv_swiglu: [w1, w3] must be prepared together")
        if w1.packed:
            return prepared_conv.call("conv_swiglu", x, w1, None)
        w1, w3 = prepared_conv.weights_for("conv_swiglu", x, w1)
    weights = [w.unsqueeze(2) if isinstance(w, Tensor) and w.dim() == 2 else w for w in (w1, w3)]
    arguments = [t for t in (x, *weights) if isinstance(t, Tensor)]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in arguments)
    return OP(x, *weights, keep)[0]
