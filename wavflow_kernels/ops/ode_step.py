r"""One step of a general linear ODE solver with classifier-free guidance, in one pass.

The state holds :math:`x` in slot 0 and up to two slots of history. A row of the table is
:math:`[t, w, M]`; with the guided prediction :math:`D = w p + (1 - w) p_{uncond}` the new state is
:math:`S'_i = M_{i0} D + \sum_j M_{i,1+j} S_j`.

x- and v-prediction, Euler, midpoint, Heun, the classical Runge-Kutta method and two- and three-step
multistep methods differ in :math:`M` only. Euler with x-prediction is
:math:`x' = x + \Delta (D - x)/c`, :math:`c = \max(1 - t, 10^{-6})`, so
:math:`M = [\Delta/c,\ 1 - \Delta/c]`. The row is picked by an index on the device, which the
in-place form advances: one captured CUDA graph serves every step, solver and guidance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, target
from .._registry import ON_BOTH, Op, Sample, Workload, normals

MAX_SLOTS = 3


def _check(
    state: Tensor, pred: Tensor, pred_uncond: Tensor | None, table: Tensor, index: Tensor
) -> None:
    op = "ode_step"
    sizes = check(
        op,
        state=(state, "k b n d"),
        pred=(pred, "b n d"),
        pred_uncond=(pred_uncond, "b n d"),
        table=(table, "steps row"),
        index=(index, "1"),
    )
    check_dtype(op, "state", state, torch.float32, torch.float64)
    check_dtype(op, "pred", pred, *FLOATS)
    require(
        compute_dtype(pred.dtype) == state.dtype,
        f"{op}: a {pred.dtype} pred needs a {compute_dtype(pred.dtype)} state, got {state.dtype}",
    )
    check_dtype(op, "pred_uncond", pred_uncond, pred.dtype)
    check_dtype(op, "table", table, state.dtype)
    check_dtype(op, "index", index, torch.int64)
    k = sizes["k"]
    require(1 <= k <= MAX_SLOTS, f"{op}: state must have 1 to {MAX_SLOTS} slots, got {k}")
    wanted = 2 + k * (k + 1)
    require(
        sizes["row"] == wanted,
        f"{op}: rows of table must hold t, w and {k} x {k + 1} coefficients = {wanted} numbers, "
        f"got {sizes['row']}",
    )
    require(sizes["steps"] > 0, f"{op}: table must have at least one row")
    require(sizes["n"] > 0 and sizes["d"] > 0, f"{op}: state is empty, got {tuple(state.shape)}")


def _row(table: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The guidance weight w and the (k, k + 1) matrix M of the chosen row."""
    row = table.index_select(0, index)[0]
    return row[1], row[2:].view(k, k + 1)


def reference(
    state: Tensor,  # k b n d
    pred: Tensor,  # b n d
    pred_uncond: Tensor | None,  # b n d
    table: Tensor,  # steps 2+k(k+1)
    index: Tensor,  # 1
) -> Tensor:  # k b n d
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_index(table, index)
    k = state.shape[0]
    w, matrix = _row(table, index, k)
    d = pred.to(state.dtype)
    if pred_uncond is not None:
        d = w * d + (1 - w) * pred_uncond.to(state.dtype)
    slots = [
        matrix[i, 0] * d + sum(matrix[i, 1 + j] * state[j] for j in range(k)) for i in range(k)
    ]
    return torch.stack(slots)


def _check_index(table: Tensor, index: Tensor) -> None:
    step = int(index)
    require(0 <= step < len(table), f"ode_step: index is {step}, table has {len(table)} rows")


def _call(
    out: Tensor,
    state: Tensor,
    pred: Tensor,
    pred_uncond: Tensor | None,
    table: Tensor,
    index: Tensor,
    *,
    advance: bool,
) -> None:
    if index.device.type == "cpu":
        _check_index(table, index)
    pred, pred_uncond, table = dense(pred, pred_uncond, table)
    C.ode_step(
        target(state),
        DTYPE_CODE[state.dtype],
        DTYPE_CODE[pred.dtype],
        address(state),
        address(out),
        address(pred),
        address(pred_uncond),
        address(table),
        address(index),
        state.shape[0],
        pred.numel(),
        len(table),
        advance,
    )


def _launch(out: Tensor, state: Tensor, *rest: Any) -> None:
    _call(out, state.contiguous(), *rest, advance=False)


def _setup_context(
    ctx: Any,
    output: Tensor,
    state: Tensor,
    pred: Tensor,
    pred_uncond: Tensor | None,
    table: Tensor,
    index: Tensor,
) -> None:
    if OP.needs(ctx, "table"):
        raise RuntimeError("ode_step: no gradient with respect to table")
    ctx.k, ctx.pred_dtype, ctx.guided = state.shape[0], pred.dtype, pred_uncond is not None
    ctx.save_for_backward(table, index.clone())


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    table, index = ctx.saved_tensors
    w, matrix = _row(table, index, ctx.k)
    d_d = torch.einsum("i,ibnd->bnd", matrix[:, 0], grad)
    d_state = torch.einsum("ij,ibnd->jbnd", matrix[:, 1:], grad)
    if not ctx.guided:
        return {"state": d_state, "pred": d_d.to(ctx.pred_dtype)}
    d_pred, d_uncond = (d.to(ctx.pred_dtype) for d in (w * d_d, (1 - w) * d_d))
    return {"state": d_state, "pred": d_pred, "pred_uncond": d_uncond}


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    computed = compute_dtype(dtype)

    normal = normals(torch.Generator().manual_seed(seed), device, computed)

    def arguments(k: int, guided: bool, *shape: int) -> tuple[Any, ...]:
        uncond = normal(*shape, dtype=dtype) if guided else None
        index = torch.tensor([2], device=device)
        table = normal(4, 2 + k * (k + 1))
        return normal(k, *shape), normal(*shape, dtype=dtype), uncond, table, index

    return [
        Sample(arguments(1, True, 2, 25, 7), (0, 1, 2), "one slot, guided"),
        Sample(arguments(1, False, 3, 10, 8), (0, 1), "one slot"),
        Sample(arguments(2, True, 2, 5, 7), (0, 1, 2), "two slots"),
        Sample(arguments(3, True, 1, 3, 5), (0, 1, 2), "three slots"),
        Sample(arguments(2, True, 3, 111, 200), (), "several blocks"),
        Sample(arguments(1, False, 0, 4, 4), (), "empty batch"),
    ]


def _bytes(state: Tensor, pred: Tensor, pred_uncond: Tensor | None) -> int:
    return 2 * state.nbytes + pred.nbytes + (0 if pred_uncond is None else pred_uncond.nbytes)


def _workload(batch: int) -> Workload:
    """Clips of 8 s at 16 kHz: a guided Euler step."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        pred, uncond = (torch.randn(batch, 640, 200, device=device, dtype=dtype) for _ in range(2))
        state = torch.randn_like(pred, dtype=compute_dtype(dtype))[None]
        table = torch.rand(50, 4, device=device, dtype=state.dtype)
        return state, pred, uncond, table, torch.zeros(1, dtype=torch.int64, device=device)

    return make


_WORKLOADS = {f"{batch} clips of 8 s": _workload(batch) for batch in (8, 256)}

OP = Op(
    name="ode_step",
    schema="(Tensor state, Tensor pred, Tensor? pred_uncond, Tensor table, Tensor index) -> Tensor",
    reference=reference,
    check=_check,
    outputs=lambda state: state.new_empty(state.shape),
    launch={"cpp": _launch},
    supported={"cpp": ON_BOTH},
    samples=_samples,
    workloads=_WORKLOADS,
    bytes=_bytes,
    flops=lambda state, pred: pred.numel() * (3 + 2 * len(state) * (len(state) + 1)),
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
)


def _check_inplace(state: Tensor, *rest: Any) -> None:
    _check(state, *rest)
    require(
        state.is_contiguous(),
        f"ode_step_: state must be contiguous, got strides {tuple(state.stride())}",
    )


def _reference_inplace(state: Tensor, index: Tensor, **rest: Any) -> None:
    state.copy_(reference(state, index=index, **rest))
    index.add_(1)


INPLACE = Op(
    name="ode_step_",
    schema=(
        "(Tensor(a!) state, Tensor pred, Tensor? pred_uncond, Tensor table, Tensor(b!) index) -> ()"
    ),
    reference=_reference_inplace,
    check=_check_inplace,
    outputs=lambda: None,
    launch={"cpp": lambda out, state, *rest: _call(state, state, *rest, advance=True)},
    supported={"cpp": ON_BOTH},
    samples=lambda device, dtype, seed: [
        Sample(s.args, (), s.name) for s in _samples(device, dtype, seed)
    ],
    workloads=_WORKLOADS,
    bytes=_bytes,
    flops=OP.flops,
    tolerance="single_pass",
    mutates=True,
)


def ode_step(
    state: Tensor,  # k b n d
    pred: Tensor,  # b n d
    table: Tensor,  # steps 2+k(k+1)
    index: Tensor,  # 1
    *,
    pred_uncond: Tensor | None = None,  # b n d
) -> Tensor:  # k b n d
    """The state after one step; differentiable in state, pred and pred_uncond.

    Args:
        state: (k, b, n, d) float32 or float64; slot 0 is x, slots 1 .. k - 1 history, k at most 3.
        pred: (b, n, d) the network's conditional output; float64 with a float64 state, else any
            other float dtype.
        table: (steps, 2 + k (k + 1)) rows [t, w, M by rows] in the state's dtype.
        index: (1,) int64 on the same device: the row to use.
        pred_uncond: (b, n, d) the unconditional output in pred's dtype; None: no guidance, w is not
            used.

    Returns:
        (k, b, n, d), the state's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, an index outside the table (on the CPU; a GPU
            kernel writes NaN instead).
        TypeError: an unsupported dtype.
    """
    return OP(state, pred, pred_uncond, table, index)


def ode_step_(
    state: Tensor,  # k b n d
    pred: Tensor,  # b n d
    table: Tensor,  # steps 2+k(k+1)
    index: Tensor,  # 1
    *,
    pred_uncond: Tensor | None = None,  # b n d
) -> None:
    """Take :func:`ode_step` in place, then add 1 to `index`. The state must be contiguous.

    Raises RuntimeError if grad mode is on and an argument requires grad.
    """
    INPLACE(state, pred, pred_uncond, table, index)
