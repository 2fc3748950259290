"""At which times a solver evaluates the flow."""

from __future__ import annotations

import torch
from torch import Tensor

from wavflow.base.names import TIMES

#: Slope k of the sigmoid times (``time_grid``).
SIGMOID_SLOPE = 8.0

#: Log signal-to-noise ratios that ``log_snr_grid`` goes from and to: t = 0.018, before which there
#: is little to see, and t = 0.999, from where the rest is one step.
LOG_SNR = (-4.0, 6.9)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times t / (t + shift (1 - t)): 0 and 1 stay, a shift above 1 spends more steps on noise."""
    return t / (t + shift * (1 - t))


def time_grid(
    steps: int, t0: float = 0.0, t1: float = 1.0, shift: float = 1.0, slope: float = 0.0
) -> Tensor:
    r"""``steps + 1`` float64 times from t0 to t1 that are even in u before the shift.

    With slope k > 0 they are sigmoid-spaced, denser at both ends: u runs from 0 to 1 through
    :math:`(\sigma(k (s - 1/2)) - \sigma(-k/2)) / (\sigma(k/2) - \sigma(-k/2))`, s even.

    Raises:
        ValueError: there is no step, or the slope is negative.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, wanted at least 1")
    if slope < 0:
        raise ValueError(f"slope is {slope}, wanted 0 or more")
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if slope > 0:
        curve = torch.sigmoid(slope * (u - 0.5))
        u = (curve - curve[0]) / (curve[-1] - curve[0])
    return shift_time(torch.lerp(torch.full_like(u, t0), torch.full_like(u, t1), u), shift)


def log_snr_grid(steps: int, t1: float = 1.0) -> Tensor:
    r"""``steps + 1`` float64 times: 0, times even in :math:`\log(t/(1-t))`, and t1.

    The logarithm of the signal-to-noise ratio runs from LOG_SNR's first to its second number, or to
    t1's where that is less.

    Raises:
        ValueError: there is no step, or t1 lies before the first of these ratios.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, wanted at least 1")
    low, high = LOG_SNR
    end = torch.tensor([t1], dtype=torch.float64)
    if end.logit() <= low:
        raise ValueError(f"t1 is {t1}, wanted a log-SNR above {low}")
    if end.logit() > high:
        inner = torch.linspace(low, high, steps - 1, dtype=torch.float64).sigmoid()
    else:
        inner = torch.linspace(low, end.logit().item(), steps, dtype=torch.float64)[:-1].sigmoid()
    return torch.cat((torch.zeros_like(end), inner, end))


def sampling_times(kind: str, steps: int, t1: float = 1.0, shift: float = 1.0) -> Tensor:
    """Float64 times from 0 to t1 for ``steps`` steps.

    Args:
        kind: "even", before the shift, as the public system's; "sigmoid", with SIGMOID_SLOPE;
            "log-snr" (``log_snr_grid``). The latter two are not shifted.
        steps: how many steps are between the times.
        t1: the last time.
        shift: s of ``shift_time``, for even times alone.

    Raises:
        ValueError: an unknown kind, or no step.
    """
    if kind not in TIMES:
        raise ValueError(f"times is {kind!r}, wanted one of {', '.join(TIMES)}")
    if kind == "log-snr":
        return log_snr_grid(steps, t1)
    if kind == "sigmoid":
        return time_grid(steps, 0.0, t1, slope=SIGMOID_SLOPE)
    return time_grid(steps, 0.0, t1, shift)
