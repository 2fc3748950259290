r"""Solvers of the flow's ordinary differential equation, from noise at t = 0 to data at t = 1.

The network predicts clean data ("x") or the velocity ("v"), so that with its output :math:`p`

.. math:: dx/dt = (p - x) / \max(1 - t, 10^{-6}) \quad\text{or}\quad dx/dt = p.

A fixed-step solver is a table of linear steps that ``wavflow_kernels.ode_step_`` carries out: every
row holds t, the guidance weight and the coefficients that take (prediction, x) to the next x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import wavflow_kernels

# Smallest 1 - t that an x-prediction is divided by.
MIN_REMAINDER = 1e-6
# With x-prediction the velocity divides by 1 - t: adaptive integration ends this far from t = 1.
ADAPTIVE_END = 1e-3

Prediction = Callable[[Tensor, Tensor], Tensor]
GuidedPrediction = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t / (t + shift (1 - t)): 0 and 1 stay, and a shift above 1 spends more steps on noise."""
    return t / (t + shift * (1 - t))


def time_grid(steps: int, t0: float = 0.0, t1: float = 1.0, shift: float = 1.0) -> Tensor:
    """``steps + 1`` float64 times from t0 to t1, uniform before the shift.

    Raises ValueError if there is no step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, wanted at least 1")
    return shift_time(torch.linspace(t0, t1, steps + 1, dtype=torch.float64), shift)


def euler_table(grid: Tensor, *, prediction: str = "x", guidance: float = 1.0) -> Tensor:
    r"""Euler's method on ``grid`` (steps + 1) as a float64 table (steps 4) for ``solve``.

    A row is [t, w, a, b] with :math:`x' = a\,p + b\,x`. A step :math:`\Delta` of v-prediction has
    a = :math:`\Delta`, b = 1; of x-prediction a = :math:`\Delta / c`, b = 1 - a with
    :math:`c = \max(1 - t, 10^{-6})`. w is the guidance weight, used where the prediction is a pair.

    Raises ValueError for a prediction other than "x" and "v".
    """
    check_prediction(prediction)
    t, step = grid[:-1], grid.diff()
    if prediction == "x":
        weight = step / (1 - t).clamp_min(MIN_REMAINDER)
        keep = 1 - weight
    else:
        weight, keep = step, torch.ones_like(step)
    return torch.stack((t, torch.full_like(t, guidance), weight, keep), dim=1)


@torch.no_grad()
def solve(fn: GuidedPrediction, x0: Tensor, table: Tensor) -> Tensor:  # (b n d), (steps 4)
    """Carries x0 through every step of ``table``; one call of ``fn`` a step, no gradients.

    Args:
        fn: ``fn(t, x)`` gets a 0-d t and x (b n d) in x0's dtype, and returns the prediction
            (b n d), or a pair (with, without conditions) that is mixed with the table's weight.
        x0: (b n d), the start. The state is float32 whatever its dtype, float64 for float64.
        table: rows made by ``euler_table``.

    Returns:
        (b n d) in x0's dtype.

    Raises:
        ValueError: a prediction of another shape than x0.
    """
    state = _state(x0).unsqueeze(0).clone(memory_format=torch.contiguous_format)
    table = table.to(state)
    index = torch.zeros(1, dtype=torch.int64, device=x0.device)
    for t in table[:, 0].unbind():
        # A copy: fn may keep its x, and the state is updated in place.
        pred = fn(t, state[0].to(x0.dtype, copy=True))
        pred, pred_uncond = pred if isinstance(pred, tuple) else (pred, None)
        wavflow_kernels.ode_step_(state, pred, table, index, pred_uncond=pred_uncond)
    return state[0].to(x0.dtype)


@torch.no_grad()
def adaptive(
    fn: Prediction,
    x0: Tensor,
    t0: float,
    t1: float,
    *,
    prediction: str = "x",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_calls: int = 1000,
) -> Tensor:
    r"""Dormand and Prince's method of order 5 with step control (torchdiffeq's dopri5), t0 to t1.

    t0 and t1 are the times the network sees. With x-prediction the steps shrink with 1 - t, so the
    integration ends at most at :math:`t_e = 1 - 10^{-3}`; one Euler step on the prediction there
    covers the rest. At t1 = 1 its result is the prediction itself.

    Args:
        fn: ``fn(t, x)`` gets a 0-d t and x (b n d) in x0's dtype, and returns the prediction.
        x0: (b n d), the start. The state is float32 whatever its dtype, float64 for float64.
        rtol, atol: bounds of a step's error estimate, relative to the state and absolute.
        max_calls: bound on the calls of ``fn``.

    Returns:
        (b n d) in x0's dtype.

    Raises:
        RuntimeError: more than ``max_calls`` calls, or a step that came down to rounding.
    """
    from torchdiffeq import odeint

    check_prediction(prediction)
    state, calls = _state(x0), 0

    def predict(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        if calls == max_calls:
            raise RuntimeError(
                f"the adaptive solver is at t = {float(t):.4f} of {t1:.4f} after {calls} calls of "
                "the network: allow more (max_calls), loosen rtol and atol, or use Euler"
            )
        calls += 1
        return fn(t, x.to(x0.dtype)).to(x.dtype)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        pred = predict(t, x)
        return pred if prediction == "v" else (pred - x) / (1 - t).clamp_min(MIN_REMAINDER)

    end = min(t1, 1 - ADAPTIVE_END) if prediction == "x" else t1
    times = torch.tensor([t0, end, t1], dtype=state.dtype, device=state.device)
    if t0 != end:
        try:
            state = odeint(velocity, state, times[:2], rtol=rtol, atol=atol, method="dopri5")[-1]
        except AssertionError as error:  # torchdiffeq's report of a vanishing step or of NaN
            raise RuntimeError(f"the adaptive solver failed: {error}") from error
    if end != t1:
        remainder = (times[2] - times[1]) / (1 - times[1])
        state = torch.lerp(state, predict(times[1], state), remainder)
    return state.to(x0.dtype)


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless ``prediction`` is "x" or "v"."""
    if prediction not in ("x", "v"):
        raise ValueError(f"prediction is {prediction!r}, wanted 'x' or 'v'")


def _state(x0: Tensor) -> Tensor:
    return x0.to(torch.promote_types(x0.dtype, torch.float32))
