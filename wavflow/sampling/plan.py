"""How sounds are generated, and what a callback is told of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.config.schema import SamplingConfig
from wavflow.flow.solvers import BEST, SOLVERS, solver_table
from wavflow.flow.times import TIMES, sampling_times
from wavflow.media.sound import Sound


@dataclass(frozen=True)
class Plan:
    """How sounds are generated.

    Attributes:
        solver: a key of `wavflow.flow.solvers.SOLVERS`, or `adaptive`.
        steps: how many steps the solver takes; `adaptive` takes as many as it needs.
        times: `even` under the configuration's noise_shift, `sigmoid` or `log-snr`
            (`wavflow.flow.times.sampling_times`).
        guidance: weight of classifier-free guidance; 1 or less runs the conditional pass alone.
        guidance_interval: times from and to which there is guidance, as the network sees them
            (0 noise, 1 data); a step outside costs half.
        guidance_rescale: share of the guided prediction's standard deviation that is brought back
            to the unguided one's (`wavflow.flow.guidance.rescale_guidance`).

    Raises:
        InputError: a value out of range.
    """

    solver: str
    steps: int
    times: str
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for wrong, text in (
            (
                self.solver not in (*SOLVERS, "adaptive"),
                f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}, adaptive",
            ),
            (self.steps < 1, f"steps is {self.steps}; wanted at least 1"),
            (self.times not in TIMES, f"times is {self.times!r}; wanted one of {', '.join(TIMES)}"),
            (
                not math.isfinite(self.guidance),
                f"guidance is {self.guidance}; wanted a number, 1 or less for none",
            ),
            (
                not 0 <= low <= high <= 1,
                f"guidance_interval is {low:g} to {high:g}; wanted times from 0 to 1 in order",
            ),
            (
                not 0 <= self.guidance_rescale <= 1,
                f"guidance_rescale is {self.guidance_rescale}; wanted 0 to 1",
            ),
        ):
            if wrong:
                raise InputError(text)

    @classmethod
    def best(cls, guidance: float) -> Plan:
        """The plan measured best (`wavflow.flow.solvers.BEST`), with a guidance of one's own."""
        return cls(BEST.solver, BEST.steps, BEST.times, guidance, BEST.guidance_interval)

    def table(self, flow: SamplingConfig) -> Tensor:  # (evaluations, 2 + k (k + 1))
        """The solver's table for a flow (`wavflow.flow.solvers.solver_table`)."""
        end = 1.0 - flow.min_sigma
        return solver_table(
            self.solver,
            sampling_times(self.times, self.steps, end, flow.noise_shift),
            prediction=flow.prediction_type,
            guidance=self.weight(self.guidance_interval[0]),
            interval=self.guidance_interval,
        )

    @property
    def guided(self) -> bool:
        """Whether any step needs both passes."""
        return self.guidance > 1

    def weight(self, t: float) -> float:
        """Guidance weight at time t."""
        low, high = self.guidance_interval
        return self.guidance if self.guided and low <= t <= high else 1.0


@dataclass(frozen=True)
class Step:
    """What a callback is told when a step of a batch is done.

    Attributes:
        rows: which rows this batch generates, by their places in the call.
        done, total: steps of this batch taken and to take, of a long sound the evaluations of its
            windows; an adaptive solver's total is None.
        t: the time the network was evaluated at, 0 noise, 1 data.
    """

    rows: tuple[int, ...]
    done: int
    total: int | None
    t: float
    _data: Callable[[], list[Sound]] = field(repr=False)

    def preview(self) -> list[Sound]:
        """The clean sounds that the network expects at this step, one a row; no extra pass.

        To be called within the callback: the next step overwrites what they are made of.
        """
        return self._data()
