"""The figures of the steps since the log's last line, kept on the device until they are wanted."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wavflow.base.processes import World

#: How many equal parts the flow's time is cut into.
BUCKETS = 5


@dataclass
class StepRecord:
    """One step of this process.

    Attributes:
        step: its number, from 0.
        norm: norm of the gradient of all processes, 0-d, on the device.
        clips: indices of its clips.
        values, counts: for each micro-batch the losses (b,), and whether they count, 0 or 1, (b,).
        times: for each micro-batch the flow's times (b,), where there are such.
    """

    step: int
    norm: Tensor | None = None
    clips: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class BadStep:
    """A step whose gradient was not finite, and the clips of this process that may be the cause."""

    step: int
    clips: list[int]


class StepFigures:
    """Sums of the losses of steps; they are exact to the bit wherever a run is cut.

    Attributes:
        in_a_row: how many steps up to now, one after the other, had gradients that are not finite.
        skipped: how many steps of the whole run had such gradients.
        norm: norm of the gradient of the last step that was absorbed.
        sums: losses, and how many, in all and by parts of the flow's time, (2, 1 + BUCKETS).
    """

    def __init__(self) -> None:
        self.pending: list[StepRecord] = []
        self.in_a_row = self.skipped = 0
        self.norm = float("nan")
        self.sums = torch.zeros(2, 1 + BUCKETS, dtype=torch.float64)

    def add(self, record: StepRecord) -> None:
        """Takes a step's figures; waits for no device."""
        self.pending.append(record)

    def absorb(self) -> list[BadStep]:
        """Sums up what is pending: one wait for the device. Returns its bad steps."""
        bad = []
        for record in self.pending:
            values = torch.cat(record.values).double().cpu()
            counts = torch.cat(record.counts).double().cpu()
            assert record.norm is not None  # the step is over
            self.norm = float(record.norm)
            if not torch.isfinite(record.norm):
                self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
                culprits = (~torch.isfinite(values) & (counts > 0)).nonzero().flatten().tolist()
                bad.append(BadStep(record.step, [record.clips[i] for i in culprits]))
                continue
            self.in_a_row = 0
            self.sums[0, 0] += values.sum()
            self.sums[1, 0] += counts.sum()
            if record.times:
                place = (torch.cat(record.times).cpu() * BUCKETS).long().clamp(0, BUCKETS - 1)
                self.sums[0, 1:].index_add_(0, place, values)
                self.sums[1, 1:].index_add_(0, place, counts)
        self.pending.clear()
        return bad

    def means(self, world: World) -> dict[str, float]:
        """Means over all processes and absorbed steps, and starts anew.

        `loss`, and `loss_by_t/<from>-<to>` where there were such times; empty without a step.
        """
        sums, counts = world.total(self.sums)
        self.sums = torch.zeros_like(self.sums)
        names = ["loss"]
        names += [f"loss_by_t/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}" for i in range(BUCKETS)]
        means = (sums / counts).tolist()
        return {n: m for n, m, c in zip(names, means, counts.tolist(), strict=True) if c > 0}


class Pace:
    """How fast the last steps were, and how much of their time was spent waiting for data."""

    STEPS = 20

    def __init__(self) -> None:
        self.steps: deque[tuple[float, int, float]] = deque(maxlen=self.STEPS)
        self.begun = time.monotonic()

    def add(self, clips: int, waited: float) -> None:
        """Notes that a step has just ended: its clips, and the seconds that it waited for them."""
        if len(self.steps) == self.STEPS:
            self.begun = self.steps[0][0]
        self.steps.append((time.monotonic(), clips, waited))

    @property
    def seconds(self) -> float:
        """How long the last steps took; 0 before the first."""
        return max(self.steps[-1][0] - self.begun, 1e-9) if self.steps else 0.0

    @property
    def clips_per_second(self) -> float:
        """Clips a second in the last steps; 0 before the first."""
        return sum(clips for _, clips, _ in self.steps) / self.seconds if self.steps else 0.0

    @property
    def waited(self) -> float:
        """The share of the time that was spent waiting for data."""
        return sum(waited for *_, waited in self.steps) / self.seconds if self.steps else 0.0
