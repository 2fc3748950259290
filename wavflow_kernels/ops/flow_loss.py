r"""The four losses of flow matching, per item, in one pass; the backward in one more.

With :math:`c = \max(1 - t, 10^{-6})`, the mean over tokens of

- x-prediction, x-loss: :math:`(p - x_1)^2`
- x-prediction, v-loss: :math:`((p - x_t)/c - (x_1 - x_t)/c)^2 = ((p - x_1)/c)^2`; x_t is not read
- v-prediction, v-loss: :math:`(p - (x_1 - (1 - \sigma_{min}) x_0))^2`
- v-prediction, x-loss: :math:`(x_t + (1 - t)\,p - x_1)^2`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, target
from .._registry import ON_BOTH, Op, Sample, Workload, no_double_backward, normals

KINDS = {("x", "x"): 0, ("x", "v"): 1, ("v", "v"): 2, ("v", "x"): 3}
_X_PRED_V, _V_PRED_V, _V_PRED_X = 1, 2, 3
_CHUNK = 8192  # elements a CUDA block reduces; kChunk in csrc/cuda/flow_loss.cu


def _check(
    pred: Tensor, x_1: Tensor, other: Tensor | None, t: Tensor, kind: int, sigma_min: float
) -> None:
    op = "flow_loss"
    sizes = check(op, pred=(pred, "b n d"), x_1=(x_1, "b n d"), other=(other, "b n d"), t=(t, "b"))
    computed = compute_dtype(pred.dtype)
    check_dtype(op, "pred", pred, *FLOATS)
    for name, tensor in (("x_1", x_1), ("x_0 / x_t", other), ("t", t)):
        check_dtype(op, name, tensor, computed)
    require(
        sizes["n"] > 0 and sizes["d"] > 0,
        f"{op}: pred must hold at least one token, got {tuple(pred.shape)}",
    )
    require(kind in KINDS.values(), f"{op}: kind must be 0, 1, 2 or 3, got {kind}")
    if kind in (_V_PRED_V, _V_PRED_X):
        name = "x_0" if kind == _V_PRED_V else "x_t"
        require(other is not None, f"{op}: {name} must be given for this prediction and loss")


def _residual(
    pred: Tensor, x_1: Tensor, other: Tensor | None, t: Tensor, kind: int, sigma_min: float
) -> tuple[Any, Any, Tensor]:
    """The factors a and w (b 1 1, or a number) and the residual a pred - x_1 + b other (b n d).

    The loss is mean((w residual)^2).
    """
    rest = (1 - t)[:, None, None]
    pred = pred.to(x_1.dtype)
    if kind == _X_PRED_V:
        return 1.0, 1 / rest.clamp_min(1e-6), pred - x_1
    if kind not in (_V_PRED_V, _V_PRED_X):
        return 1.0, 1.0, pred - x_1
    assert other is not None
    if kind == _V_PRED_V:
        return 1.0, 1.0, pred - x_1 + (1.0 - sigma_min) * other
    return rest, 1.0, rest * pred - x_1 + other


def reference(**arguments: Any) -> Tensor:  # b
    _, w, residual = _residual(**arguments)
    return (w * residual).square().mean((1, 2))


def _call(
    out: Tensor,
    out_residual: Tensor | None,
    grad: Tensor | None,
    pred: Tensor,
    x_1: Tensor,
    other: Tensor | None,
    t: Tensor,
    kind: int,
    sigma_min: float,
) -> None:
    if not pred.numel():
        return
    used = other if kind in (_V_PRED_V, _V_PRED_X) else None
    pred, x_1, t, other = dense(pred, x_1, t, used)
    batch, count = pred.shape[0], pred.shape[1] * pred.shape[2]
    partials = None
    if grad is None and pred.device.type == "cuda":
        partials = x_1.new_empty(batch * -(-count // _CHUNK))
    C.flow_loss(
        target(pred),
        DTYPE_CODE[pred.dtype],
        kind,
        grad is not None,
        address(pred),
        address(x_1),
        address(other),
        address(t),
        address(grad),
        address(out),
        address(out_residual),
        address(partials),
        batch,
        count,
        sigma_min,
    )


def _check_backward(grad: Tensor, pred: Tensor, residual_too: bool, **forward: Any) -> None:
    _check(pred, **forward)
    check("flow_loss_backward", pred=(pred, "b n d"), grad=(grad, "b"))


def _outputs_backward(grad: Tensor, pred: Tensor, residual_too: bool) -> tuple[Tensor, Tensor]:
    residual = pred.shape if residual_too else (0,)
    return pred.new_empty(pred.shape), pred.new_empty(residual, dtype=grad.dtype)


def _launch_backward(
    out: tuple[Tensor, Tensor], grad: Tensor, residual_too: bool, **forward: Any
) -> None:
    _call(out[0], out[1] if residual_too else None, grad.contiguous(), **forward)


def _reference_backward(
    grad: Tensor, pred: Tensor, residual_too: bool, **forward: Any
) -> tuple[Tensor, Tensor]:  # b n d, b n d
    a, w, residual = _residual(pred, **forward)
    count = pred.shape[1] * pred.shape[2]
    d_residual = (2 / count) * grad[:, None, None] * w * w * residual
    return (a * d_residual).to(pred.dtype), d_residual if residual_too else grad.new_empty(0)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    computed = compute_dtype(dtype)

    normal = normals(generator, device, computed)

    def arguments(kind: int, *shape: int) -> tuple[Any, ...]:
        pred, x_1, other = normal(*shape, dtype=dtype), normal(*shape), normal(*shape)
        t = (
            torch.rand(shape[0], generator=generator, dtype=torch.float64).to(device, computed)
            * 0.9
        )
        return pred, x_1, other if kind >= 2 else None, t, kind, 0.01

    samples = [
        Sample(
            arguments(kind, 3, 25, 7), (0, 1, 2) if kind >= 2 else (0, 1), f"{p}-pred {loss}-loss"
        )
        for (p, loss), kind in KINDS.items()
    ]
    samples.append(Sample(arguments(1, 2, 111, 300), (), "several blocks"))
    samples.append(Sample(arguments(3, 0, 4, 4), (), "empty batch"))
    return samples


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    grad = torch.linspace(0.5, 2, 3, dtype=compute_dtype(dtype), device=device)
    return [
        Sample((grad[: len(s.args[0])], *s.args, s.args[4] == _V_PRED_X), (), s.name)
        for s in _samples(device, dtype, seed)
    ]


def _workload(batch: int, backward: bool) -> Workload:
    """Clips of 8 s at 16 kHz: x-prediction with the v-loss."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        pred = torch.randn(batch, 640, 200, device=device, dtype=dtype)
        x_1 = torch.randn_like(pred, dtype=compute_dtype(dtype))
        grad, t = torch.ones_like(x_1[:, 0, 0]), torch.rand_like(x_1[:, 0, 0])
        args = (pred, x_1, None, t, KINDS["x", "v"], 0.0)
        return (grad, *args, False) if backward else args

    return make


def _workloads(backward: bool) -> dict[str, Workload]:
    return {f"{batch} clips of 8 s": _workload(batch, backward) for batch in (8, 256)}


BACKWARD = Op(
    name="flow_loss_backward",
    schema=(
        "(Tensor grad, Tensor pred, Tensor x_1, Tensor? other, Tensor t, int kind, "
        "float sigma_min, bool residual_too) -> (Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward},
    supported={"cpp": ON_BOTH},
    samples=_samples_backward,
    workloads=_workloads(backward=True),
    bytes=lambda pred, x_1, other: (
        2 * pred.nbytes + x_1.nbytes + (0 if other is None else other.nbytes)
    ),
    flops=lambda pred: 4 * pred.numel(),
    tolerance="single_pass",
    backward=no_double_backward("flow_loss"),
    internal=True,
)


def _setup_context(
    ctx: Any,
    output: Tensor,
    pred: Tensor,
    x_1: Tensor,
    other: Tensor | None,
    t: Tensor,
    kind: int,
    sigma_min: float,
) -> None:
    if OP.needs(ctx, "t"):
        raise RuntimeError("flow_loss: no gradient with respect to t")
    ctx.save_for_backward(pred, x_1, other, t)
    ctx.kind, ctx.sigma_min = kind, sigma_min


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    needs_x_1, needs_other = OP.needs(ctx, "x_1"), OP.needs(ctx, "other")
    d_pred, d_residual = BACKWARD.torch_op(
        grad, *ctx.saved_tensors, ctx.kind, ctx.sigma_min, needs_x_1 or needs_other
    )
    found = {"pred": d_pred}
    if needs_x_1:
        found["x_1"] = -d_residual
    if needs_other:
        found["other"] = (1.0 - ctx.sigma_min if ctx.kind == _V_PRED_V else 1.0) * d_residual
    return found


OP = Op(
    name="flow_loss",
    schema=(
        "(Tensor pred, Tensor x_1, Tensor? other, Tensor t, int kind, float sigma_min) -> Tensor"
    ),
    reference=reference,
    check=_check,
    outputs=lambda pred: pred.new_empty(pred.shape[0], dtype=compute_dtype(pred.dtype)),
    launch={"cpp": lambda out, **arguments: _call(out, None, None, **arguments)},
    supported={"cpp": ON_BOTH},
    samples=_samples,
    workloads=_workloads(backward=False),
    bytes=lambda pred, x_1, other: (
        pred.nbytes + x_1.nbytes + (0 if other is None else other.nbytes)
    ),
    flops=lambda pred: 4 * pred.numel(),
    tolerance="reduction",
    setup_context=_setup_context,
    backward=_backward,
)


def flow_loss(
    pred: Tensor,  # b n d
    x_1: Tensor,  # b n d
    t: Tensor,  # b
    *,
    x_t: Tensor | None = None,  # b n d
    x_0: Tensor | None = None,  # b n d
    prediction: str = "x",
    loss: str = "v",
    sigma_min: float = 0.0,
) -> Tensor:  # b
    """The mean squared flow-matching error of each item.

    Args:
        pred: (b, n, d) the network's output, any float dtype.
        x_1: (b, n, d) clean tokens; float32 (float64 with a float64 pred), like x_t, x_0 and t.
        t: (b,) times the network was given.
        x_t: (b, n, d) noisy tokens; needed for v-prediction with the x-loss, else not read.
        x_0: (b, n, d) noise; needed for v-prediction with the v-loss, else not read.
        prediction: "x" if the network predicts clean tokens, "v" if velocities.
        loss: "x" or "v", the space in which errors are squared.
        sigma_min: noise left at t = 1; enters v-prediction's v-loss only.

    Returns:
        (b,) losses, float32 (float64 for float64). Differentiable once in pred, x_1, x_t and x_0.

    Raises:
        ValueError: shapes that do not fit, an unknown prediction or loss, a needed tensor missing.
        TypeError: an unsupported dtype.
    """
    kind = KINDS.get((prediction, loss))
    require(
        kind is not None,
        f"flow_loss: prediction and loss must each be 'x' or 'v', got '{prediction}' and '{loss}'",
    )
    other = x_0 if kind == _V_PRED_V else x_t if kind == _V_PRED_X else None
    return OP(pred, x_1, other, t, kind, sigma_min)
