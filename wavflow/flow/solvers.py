r"""Solvers of the flow's ordinary differential equation, from noise at t = 0 to data at t = 1.

The network predicts clean data ("x") or the velocity ("v"), so that with its output :math:`p`

.. math:: dx/dt = (p - x) / \max(1 - t, 10^{-6}) \quad\text{or}\quad dx/dt = p.

A fixed-step solver is a table of linear steps that ``wavflow_kernels.ode_step_`` carries out: a row
is one evaluation of the network and holds t, the guidance weight w and a matrix that takes the
guided prediction and the state (the point of evaluation, then up to two slots of history) to the
next state. Solvers differ in nothing but their tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import wavflow_kernels
from wavflow.base.names import FIXED_STEP

# Smallest 1 - t that an x-prediction is divided by.
MIN_REMAINDER = 1e-6
# With x-prediction the velocity divides by 1 - t: adaptive integration ends this far from t = 1.
ADAPTIVE_END = 1e-3

Prediction = Callable[[Tensor, Tensor], Tensor]
GuidedPrediction = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]


def solver_table(
    method: str,
    grid: Tensor,
    *,
    prediction: str = "x",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""A solver on ``grid`` (steps + 1) as a float64 table (evaluations, 2 + k (k + 1)).

    A row is [t, w, M], M the (k, k + 1) matrix of ``wavflow_kernels.ode_step``, k the slots of the
    state. With :math:`h = t' - t` and the velocity :math:`f`, one step from t to t' is

    - ``euler``: :math:`x' = x + h f`. Order 1. With x-prediction it is also the first-order
      exponential integrator: :math:`x' = \rho x + (1 - \rho) D`, :math:`\rho = (1 - t')/(1 - t)`,
      D the predicted data.
    - ``midpoint``, ``heun``: order 2 with two evaluations; ``rk4``: order 4 with four. With
      x-prediction a Heun or Runge-Kutta step that ends at t = 1, where the velocity is 0/0, is an
      Euler step.
    - ``ab2``: two-step Adams and Bashforth, order 2 with one evaluation:
      :math:`x' = x + h\,[(1 + r/2) f_n - (r/2) f_{n-1}]`, r the ratio of this step to the last.
    - ``2m``: DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) for this path, order 2 with one
      evaluation. Multiplying :math:`dx/dt = (D - x)/(1 - t)` by the integrating factor gives

      .. math:: x' = \rho x + (1 - t') \int_t^{t'} \frac{D(s)}{(1 - s)^2}\,ds,

      in which a constant D is Euler's step. 2M continues D linearly in the logarithm of the
      signal-to-noise ratio, :math:`\lambda = \log(t/(1 - t))`: D is replaced by
      :math:`(1 + g) D_n - g D_{n-1}`, :math:`g = h_n / (2 h_{n-1})` with the steps of
      :math:`\lambda`. g is 0 where a step of :math:`\lambda` is infinite: for the step after t = 0
      and the one that ends at t = 1.

    The first step of ``ab2`` and ``2m`` is Euler's.

    Args:
        method: a key of SOLVERS.
        grid: increasing times in [0, 1]; decreasing ones too, but for ``2m``.
        prediction: "x" or "v".
        guidance: w of every row with t in ``interval``; the other rows have w = 1.

    Raises:
        ValueError: an unknown method or prediction, a grid that ``2m`` cannot take.
    """
    check_prediction(prediction)
    if method not in SOLVERS:
        raise ValueError(f"solver is {method!r}, wanted one of {', '.join(SOLVERS)}")
    if method == "2m" and not (grid.diff() > 0).all():
        raise ValueError("solver 2m needs times that increase")
    times = grid.tolist()
    rows: list[list[float]] = []
    for i, (t, end) in enumerate(pairwise(times)):
        last = times[i - 1] if i > 0 else None
        for at, matrix in SOLVERS[method](t, end, last, prediction):
            weight = guidance if interval[0] <= at <= interval[1] else 1.0
            rows.append([at, weight, *chain.from_iterable(matrix)])
    return torch.tensor(rows, dtype=torch.float64)


# A step is its evaluations: (t, M) each. The columns of M are the prediction and the slots.
Step = list[tuple[float, list[list[float]]]]


def _velocity(t: float, prediction: str) -> tuple[float, float]:
    """The coefficients (a, b) of the velocity a p + b x at t, p being the prediction."""
    if prediction == "v":
        return 1.0, 0.0
    rest = max(1 - t, MIN_REMAINDER)
    return 1 / rest, -1 / rest


def _euler(t: float, end: float, last: float | None, prediction: str) -> Step:
    a, b = _velocity(t, prediction)
    h = end - t
    return [(t, [[h * a, 1 + h * b]])]


def _midpoint(t: float, end: float, last: float | None, prediction: str) -> Step:
    h, middle = end - t, (t + end) / 2
    a, b = _velocity(t, prediction)
    am, bm = _velocity(middle, prediction)
    return [
        (t, [[h / 2 * a, 1 + h / 2 * b, 0], [0, 1, 0]]),
        (middle, [[h * am, h * bm, 1], [0, 0, 1]]),
    ]


def _heun(t: float, end: float, last: float | None, prediction: str) -> Step:
    h = end - t
    a, b = _velocity(t, prediction)
    if prediction == "x" and end == 1:
        return [(t, [[h * a, 1 + h * b, 0], [0, 0, 1]])]
    ae, be = _velocity(end, prediction)
    return [
        (t, [[h * a, 1 + h * b, 0], [h / 2 * a, 1 + h / 2 * b, 0]]),
        (end, [[h / 2 * ae, h / 2 * be, 1], [0, 0, 1]]),
    ]


def _rk4(t: float, end: float, last: float | None, prediction: str) -> Step:
    h, middle = end - t, (t + end) / 2
    a, b = _velocity(t, prediction)
    if prediction == "x" and end == 1:
        return [(t, [[h * a, 1 + h * b, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])]
    am, bm = _velocity(middle, prediction)
    ae, be = _velocity(end, prediction)
    # Slots: the point of evaluation, x, and the sum of weighted velocities.
    base: list[float] = [0, 0, 1, 0]
    return [
        (
            t,
            [
                [h / 2 * a, 1 + h / 2 * b, 0, 0],
                [0, 1, 0, 0],
                [h / 6 * a, 1 + h / 6 * b, 0, 0],
            ],
        ),
        (middle, [[h / 2 * am, h / 2 * bm, 1, 0], base, [h / 3 * am, h / 3 * bm, 0, 1]]),
        (middle, [[h * am, h * bm, 1, 0], base, [h / 3 * am, h / 3 * bm, 0, 1]]),
        (end, [[h / 6 * ae, h / 6 * be, 0, 1], base, [0, 0, 0, 1]]),
    ]


def _ab2(t: float, end: float, last: float | None, prediction: str) -> Step:
    h = end - t
    a, b = _velocity(t, prediction)
    half = 0.0 if last is None else h / (t - last) / 2
    now = h * (1 + half)
    return [(t, [[now * a, 1 + now * b, -h * half], [a, b, 0]])]


def _2m(t: float, end: float, last: float | None, prediction: str) -> Step:
    keep = (1 - end) / (1 - t)
    g = 0.0
    if last is not None and last > 0 and end < 1:
        g = (_log_snr(end) - _log_snr(t)) / (_log_snr(t) - _log_snr(last)) / 2
    # The predicted data are a p + b x.
    a, b = (1.0, 0.0) if prediction == "x" else (1 - t, 1.0)
    now = (1 - keep) * (1 + g)
    return [(t, [[now * a, keep + now * b, -(1 - keep) * g], [a, b, 0]])]


def _log_snr(t: float) -> float:
    return math.log(t / (1 - t))


SOLVERS: dict[str, Callable[[float, float, float | None, str], Step]] = dict(
    zip(FIXED_STEP, (_euler, _midpoint, _heun, _rk4, _ab2, _2m), strict=True)
)


class SolverError(RuntimeError):
    """An adaptive solver could not reach the end."""


class Recommended(NamedTuple):
    """A solver with its steps and times, and the times between which there is guidance."""

    solver: str
    steps: int
    times: str
    guidance_interval: tuple[float, float] = (0.0, 1.0)


#: In 14 evaluations it is as exact as Euler in 50 on even times, and as true in sound, by ``python
#: -m bench.run solvers``. Guidance near t = 1 harms the sound where the steps there are fine, so it
#: ends before (guidance in an interval: Kynkäänniemi et al., arXiv 2404.07724).
BEST = Recommended("euler", 14, "sigmoid", (0.0, 0.7))


@torch.no_grad()
def solve(
    fn: GuidedPrediction, x0: Tensor, table: Tensor, plain: Prediction | None = None
) -> Tensor:  # (b n d), (evaluations, 2 + k (k + 1))
    """Carries x0 through every row of ``table``; one call of the network a row, no gradients.

    Args:
        fn: ``fn(t, x)`` gets a 0-d t and x (b n d) in x0's dtype, and returns the prediction
            (b n d), or a pair (with, without conditions) that is mixed with the row's weight.
        x0: (b n d), the start. The state is float32 whatever its dtype, float64 for float64.
        table: made by ``solver_table``.
        plain: called in place of ``fn`` for rows of weight 1, which need no pair.

    Returns:
        (b n d) in x0's dtype.

    Raises:
        ValueError: a prediction of another shape than x0.
    """
    slots = table_slots(table)
    state = _wide(x0).new_zeros(slots, *x0.shape)
    state[0] = x0
    alone = is_unguided(table)
    table = table.to(state)
    index = torch.zeros(1, dtype=torch.int64, device=x0.device)
    for t, unguided in zip(table[:, 0].unbind(), alone, strict=True):
        # A copy: fn may keep its x, and the state is updated in place.
        x = state[0].to(x0.dtype, copy=True)
        prediction = plain(t, x) if unguided and plain is not None else fn(t, x)
        advance(state, table, index, prediction)
    return state[0].to(x0.dtype)


def advance(
    state: Tensor, table: Tensor, index: Tensor, prediction: Tensor | tuple[Tensor, Tensor]
) -> None:
    """Takes ``state`` (k b n d) through the table's row ``index`` (1,), and adds 1 to it."""
    pair = prediction if isinstance(prediction, tuple) else (prediction, None)
    wavflow_kernels.ode_step_(state, pair[0], table, index, pred_uncond=pair[1])


def table_slots(table: Tensor) -> int:
    """How many slots k the state of a table has, whose rows are 2 + k (k + 1) numbers."""
    return (math.isqrt(4 * (table.shape[1] - 2) + 1) - 1) // 2


def is_unguided(table: Tensor) -> list[bool]:
    """Whether the guidance weight of a table's rows is 1, one answer a row."""
    return (table[:, 1] == 1).tolist()


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
    r"""Carries x0 from t0 to t1 by Dormand and Prince's method of order 5 with step control.

    It is torchdiffeq's dopri5. With x-prediction the steps shrink with 1 - t, so the integration
    ends at most at :math:`t_e = 1 - 10^{-3}`; one Euler step on the prediction there covers the
    rest. At t1 = 1 its result is the prediction itself.

    Args:
        fn: ``fn(t, x)`` gets a 0-d t and x (b n d) in x0's dtype, and returns the prediction.
        x0: (b n d), the start. The state is float32 whatever its dtype, float64 for float64.
        t0, t1: times from and to which x0 is carried, as the network sees them.
        prediction: "x" or "v".
        rtol, atol: bounds of a step's error estimate, relative to the state and absolute.
        max_calls: bound on the calls of ``fn``.

    Returns:
        (b n d) in x0's dtype.

    Raises:
        SolverError: more than ``max_calls`` calls, or a step that came down to rounding.
        ValueError: an unknown prediction.
    """
    from torchdiffeq import odeint

    check_prediction(prediction)
    state, calls = _wide(x0), 0

    def predict(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        if calls == max_calls:
            raise SolverError(
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
            raise SolverError(f"the adaptive solver failed: {error}") from error
    if end != t1:
        remainder = (times[2] - times[1]) / (1 - times[1])
        state = torch.lerp(state, predict(times[1], state), remainder)
    return state.to(x0.dtype)


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless ``prediction`` is "x" or "v"."""
    if prediction not in ("x", "v"):
        raise ValueError(f"prediction is {prediction!r}, wanted 'x' or 'v'")


def _wide(x0: Tensor) -> Tensor:
    """x0 in float32, or as it is where it is float64."""
    return x0.to(torch.promote_types(x0.dtype, torch.float32))
