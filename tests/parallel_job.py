"""What test_parallel.py starts under torchrun: `parallel_job.py OUT JOB [key=value ...]`.

Jobs train the toy task; the first process leaves its weights, whole, in OUT/<JOB>.pth.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from toy_task import SETTINGS, Fit, Points, make_trainer

from wavflow.console import show_log
from wavflow.errors import InputError
from wavflow.parallel import join, whole


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


def main(out: Path, job: str, **options) -> None:
    dtype = getattr(torch, options.pop("dtype", "float64"))
    kind = {"dies": Dying, "falls once": FallsOnce}.get(job, Points)
    dataset = kind(missing=options.pop("missing", ()), dtype=dtype)
    dataset.mark = out / "fell"
    settings = replace(SETTINGS, **options)
    with join("cpu", group=settings.strategy == "fsdp") as world:
        trainer = make_trainer(
            out / "run",
            settings,
            Fit(dtype=dtype),
            dataset,
            world,
            validation=Points(5, dtype=dtype),
        )
        trainer.resume()
        if job == "gradients":
            trainer.train_step(trainer.batches())
            left = {n: whole(p.grad) for n, p in trainer.model.named_parameters()}
        else:
            trainer.run()
            left = {n: whole(p.detach()) for n, p in trainer.model.named_parameters()}
        if world.is_main:
            torch.save(left, out / f"{job}.pth")


if __name__ == "__main__":
    show_log()

    try:
        given = dict(option.split("=", 1) for option in sys.argv[3:])
        main(Path(sys.argv[1]), sys.argv[2], **{k: yaml.safe_load(v) for k, v in given.items()})
    except InputError as error:
        sys.exit(f"job: {error}")
