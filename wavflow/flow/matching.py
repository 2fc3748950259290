r"""Flow matching on waveform tokens: the noisy path, the losses and sampling.

The path from noise :math:`x_0` at t = 0 to data :math:`x_1` at t = 1 is
:math:`x_t = (1 - (1 - \sigma_{min}) t) x_0 + t x_1` (Lipman et al., arXiv 2210.02747).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wavflow_kernels
from wavflow.base.names import METHODS as INFERENCE_MODES
from wavflow.base.shapes import check_shape
from wavflow.flow.solvers import adaptive, check_prediction, solve, solver_table
from wavflow.flow.times import shift_time, time_grid


def log_normal_sample(
    x: Tensor, generator: torch.Generator | None = None, m: float = 0.0, s: float = 1.0
) -> Tensor:  # (b ...) -> (b)
    """One time in (0, 1) for each item of ``x``: sigmoid(m + s n), n standard normal, float32."""
    normal = torch.randn(x.shape[0], device=x.device, generator=generator)
    return torch.sigmoid(m + s * normal)


class FlowMatching:
    """The path, losses and sampler of one kind of prediction.

    Tokens are (b n d) and times (b); a tensor that does not fit raises a ValueError naming the
    argument, its shape and the wanted one.

    Args:
        min_sigma: noise left at t = 1, the path's sigma_min.
        inference_mode: a fixed-step solver (``solvers.solver_table``), or "adaptive"
            (``solvers.adaptive``).
        num_steps: steps of a fixed-step solver.
        prediction_type: "x" if the network predicts clean tokens, "v" if velocities.
        noise_scale: standard deviation of the noise that ``get_x0_xt_c`` draws.
        noise_shift: s of the time shift t / (t + s (1 - t)).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        min_sigma: float = 0.0,
        inference_mode: str = "euler",
        num_steps: int = 25,
        prediction_type: str = "x",
        noise_scale: float = 1.0,
        noise_shift: float = 1.0,
    ) -> None:
        check_prediction(prediction_type)
        if inference_mode not in INFERENCE_MODES:
            raise ValueError(
                f"inference_mode is {inference_mode!r}, wanted one of {', '.join(INFERENCE_MODES)}"
            )
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, wanted at least 1")
        if not 0 <= min_sigma < 1:
            raise ValueError(f"min_sigma is {min_sigma}, wanted 0 <= min_sigma < 1")
        if noise_scale < 0:
            raise ValueError(f"noise_scale is {noise_scale}, wanted 0 or more")
        if noise_shift <= 0:
            raise ValueError(f"noise_shift is {noise_shift}, wanted more than 0")
        self.min_sigma = min_sigma
        self.inference_mode = inference_mode
        self.num_steps = num_steps
        self.prediction_type = prediction_type
        self.noise_scale = noise_scale
        self.noise_shift = noise_shift

    # The path.

    def shift_timestep(self, t: Tensor) -> Tensor:
        """The shifted times t / (t + s (1 - t)), s being ``noise_shift``."""
        return shift_time(t, self.noise_shift)

    def get_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The point x_t (b n d) between noise x0 and data x1 at unshifted t (b), in x1's dtype."""
        _check_tokens(t, x1=x1, x0=x0)
        wide = _wide(x1)
        xt, _ = wavflow_kernels.flow_mix(
            x1, t.to(wide), noise=x0.to(wide), sigma_min=self.min_sigma
        )
        return xt

    def get_x0_xt_c(
        self, x1: Tensor, t: Tensor, Cs: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """Draws noise for data x1 (b n d) and shifts t (b): (x0, x1, x_t, shifted t, Cs)."""
        _check_tokens(t, x1=x1)
        x0 = torch.empty_like(x1).normal_(generator=generator) * self.noise_scale
        t = self.shift_timestep(t)
        return x0, x1, self.get_conditional_flow(x0, x1, t), t, Cs

    # Losses per item (b), the mean over tokens and samples; t as the network was given it.

    def x_pred_x_loss(self, pred: Tensor, x0: Tensor, xt: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Error of a prediction of data: (pred - x1)^2."""
        return self._loss("x", "x", pred, x0, xt, x1, t)

    def x_pred_v_loss(self, pred: Tensor, x0: Tensor, xt: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Error of the velocity (pred - x_t) / (1 - t): ((pred - x1) / max(1 - t, 1e-6))^2."""
        return self._loss("x", "v", pred, x0, xt, x1, t)

    def v_pred_v_loss(self, pred: Tensor, x0: Tensor, xt: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Error of a prediction of the velocity: (pred - (x1 - (1 - sigma_min) x0))^2."""
        return self._loss("v", "v", pred, x0, xt, x1, t)

    def v_pred_x_loss(self, pred: Tensor, x0: Tensor, xt: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Error of the data that a velocity leads to: (x_t + (1 - t) pred - x1)^2."""
        return self._loss("v", "x", pred, x0, xt, x1, t)

    def _loss(
        self,
        prediction: str,
        loss: str,
        pred: Tensor,
        x0: Tensor,
        xt: Tensor,
        x1: Tensor,
        t: Tensor,
    ) -> Tensor:
        _check_tokens(t, pred=pred, x0=x0, xt=xt, x1=x1)
        wide = _wide(pred)
        return wavflow_kernels.flow_loss(
            pred,
            x1.to(wide),
            t.to(wide),
            x_t=xt.to(wide),
            x_0=x0.to(wide),
            prediction=prediction,
            loss=loss,
            sigma_min=self.min_sigma,
        )

    # Sampling; fn(t, x) gets a 0-d t, which is shifted, and x (b n d), and returns the prediction.

    def to_data(self, fn: Callable[[Tensor, Tensor], Tensor], x0: Tensor) -> Tensor:
        """Carries noise x0 to data (b n d); the caller has scaled x0 by ``noise_scale``."""
        return self.run_t0_to_t1(fn, x0, 0.0, 1.0)

    def to_prior(self, fn: Callable[[Tensor, Tensor], Tensor], x1: Tensor) -> Tensor:
        """Carries data x1 to noise (b n d).

        Raises:
            ValueError: with x-prediction, whose velocity at t = 1 is 0 / 0: the way back has no
                start.
        """
        if self.prediction_type == "x":
            raise ValueError(
                "prediction_type is 'x', wanted 'v': to_prior needs a velocity at t = 1"
            )
        return self.run_t0_to_t1(fn, x1, 1.0, 0.0)

    def run_t0_to_t1(
        self, fn: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t0: float, t1: float
    ) -> Tensor:
        """Carries x0 (b n d) from t0 to t1 - min_sigma, times before the shift; no gradients."""
        check_shape("x0", x0, ("batch", "tokens", "samples"))
        mode, prediction = self.inference_mode, self.prediction_type
        steps = 1 if mode == "adaptive" else self.num_steps
        grid = time_grid(steps, float(t0), float(t1) - self.min_sigma, self.noise_shift)
        if mode == "adaptive":
            return adaptive(fn, x0, *grid.tolist(), prediction=prediction)
        return solve(fn, x0, solver_table(mode, grid, prediction=prediction))


def _check_tokens(t: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError unless t is (b) and all tensors have the first one's shape, (b n d)."""
    first = next(iter(tensors))
    check_shape(first, tensors[first], ("batch", "tokens", "samples"))
    shape = tuple(tensors[first].shape)
    for name, tensor in tensors.items():
        check_shape(name, tensor, shape)
    check_shape("t", t, shape[:1])


def _wide(x: Tensor) -> torch.dtype:
    """The dtype the kernels compute in for tokens ``x``."""
    return torch.promote_types(x.dtype, torch.float32)
