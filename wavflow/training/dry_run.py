"""What a run will need, by taking a few of its steps."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from wavflow.base.memory import used_memory
from wavflow.training.trainer import Trainer

#: Steps before the clock starts; in them kernels are compiled and optimiser states made.
WARMUP = 2


@dataclass(frozen=True)
class DryRun:
    """What a run will need, as its first steps tell.

    Attributes:
        parameters: how many numbers the model has.
        clips, step_clips: how many clips there are, and how many of them a step takes.
        first_step, total_steps: steps that the run begins with and ends at.
        loss: mean loss of the steps taken.
        seconds: duration of a step.
        data_wait: the share of it that waits for data.
        mfu: floating-point operations a second over those of the machine's matrix product.
        memory_bytes: what this process took at most.
        checkpoint_bytes, free_bytes: size of one checkpoint, and what is free on its disk.
        max_seconds: bound on the run's length, or None.
    """

    parameters: int
    clips: int
    step_clips: int
    first_step: int
    total_steps: int
    loss: float
    seconds: float
    data_wait: float
    mfu: float
    memory_bytes: int
    checkpoint_bytes: int
    free_bytes: int
    max_seconds: float | None

    @property
    def run_seconds(self) -> float:
        """How many seconds the steps take that are left."""
        left = (self.total_steps - self.first_step) * self.seconds
        return left if self.max_seconds is None else min(left, self.max_seconds)

    def __str__(self) -> str:
        hours = self.run_seconds / 3600
        steps = min(self.total_steps - self.first_step, self.run_seconds / self.seconds)
        return "\n".join(
            (
                f"model       {self.parameters / 1e6:.1f} M parameters",
                f"data        {self.clips} clips, {self.step_clips} a step",
                f"speed       {self.seconds:.3f} s a step, {self.step_clips / self.seconds:.1f} "
                f"clips/s, {100 * self.mfu:.0f} % MFU, {100 * self.data_wait:.1f} % waiting for "
                "data",
                f"loss        {self.loss:.4f} at the start",
                f"memory      {self.memory_bytes / 1e9:.2f} GB a process",
                f"disk        {self.checkpoint_bytes / 1e9:.2f} GB a checkpoint, two are kept; "
                f"{self.free_bytes / 1e9:.0f} GB are free",
                f"the run     {steps:.0f} steps from step {self.first_step}, about {hours:.1f} h",
            )
        )


def dry_run(trainer: Trainer, seconds: float) -> DryRun:
    """Takes steps for about `seconds`, in memory alone; the trainer is of no use afterwards."""
    first, total = trainer.step, trainer.total_steps
    batches = trainer.batches()
    world, warm = trainer.world, min(WARMUP, max(total - first - 1, 0))
    begun, taken = time.monotonic(), 0
    try:
        while trainer.step < total:
            if trainer.step - first == warm:
                _wait(trainer.device)
                begun, taken = time.monotonic(), 0
            trainer.train_step(batches)
            taken += 1
            _wait(trainer.device)
            if world.largest([time.monotonic() - begun])[0] > seconds and taken > warm:
                break
    finally:
        batches.close()
    each = (time.monotonic() - begun) / max(taken, 1)
    trainer.recent.absorb()
    found = trainer.recent.means(world)
    place = next(p for p in (trainer.out, *trainer.out.resolve().parents) if p.is_dir())
    rate = trainer.flops * trainer.step_examples / each
    return DryRun(
        parameters=trainer.parameters,
        clips=len(trainer.dataset),
        step_clips=trainer.step_examples,
        first_step=first,
        total_steps=total,
        loss=found.get("loss", math.nan),
        seconds=each,
        data_wait=trainer.pace.waited,
        mfu=rate / (trainer.matmul_rate * world.size),
        memory_bytes=used_memory(trainer.device),
        checkpoint_bytes=trainer.state.nbytes,
        free_bytes=shutil.disk_usage(Path(place)).free,
        max_seconds=trainer.settings.max_seconds,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
