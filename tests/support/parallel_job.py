"""What test_parallel.py starts under torchrun: `parallel_job.py OUT JOBS`.

JOBS is a JSON list of {"kind": ..., "name": ..., setting: value, ...}, done one after the other.
They train the toy task in OUT/<name>; the first process leaves its weights there, whole, in
weights.pth.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from support.toy_task import SETTINGS, Fit, Points, make_trainer
from wavflow.base.console import show_log
from wavflow.base.errors import InputError
from wavflow.base.processes import World, join
from wavflow.training.parallel import whole


class Dying(Points):
    """Cannot be read in the second process after a few steps."""

    def load(self, indices, draw):
        if os.environ["RANK"] == "1" and min(draw.positions) > 20:
            raise InputError("the disk of the second machine is gone")
        return super().load(indices, draw)


class FallsOnce(Points):
    """Kills the second process in the middle of the run, the first time."""

    def load(self, indices, draw):
        if os.environ["RANK"] == "1" and min(draw.positions) > 50 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(indices, draw)


KINDS = {"gradients": Points, "train": Points, "dies": Dying, "falls once": FallsOnce}


def work(
    world: World, out: Path, kind: str, dtype: str = "float64", missing: tuple = (), **options
) -> None:
    """One job."""
    dataset = KINDS[kind](missing=missing, dtype=getattr(torch, dtype))
    dataset.mark = out / "fell"
    out.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(
        out / "run",
        replace(SETTINGS, **options),
        Fit(dtype=dataset.x.dtype),
        dataset,
        world,
        validation=Points(5, dtype=dataset.x.dtype),
    )
    trainer.resume()
    if kind == "gradients":
        trainer.train_step(trainer.batches())
        left = {n: whole(p.grad) for n, p in trainer.model.named_parameters()}
    else:
        trainer.run()
        left = {n: whole(p.detach()) for n, p in trainer.model.named_parameters()}
    if world.is_main:
        torch.save(left, out / "weights.pth")


if __name__ == "__main__":
    show_log()
    try:
        with join("cpu") as world:
            for job in json.loads(sys.argv[2]):
                work(world, Path(sys.argv[1]) / job.pop("name"), **job)
    except InputError as error:
        sys.exit(f"job: {error}")
