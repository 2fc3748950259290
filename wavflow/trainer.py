"""The training loop. It drives an objective (a model and its loss) and knows nothing of either."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wavflow import checkpoint, precision, runlog
from wavflow.config import TrainingConfig
from wavflow.data.dataset import Work, plan, prefetch, steps_per_epoch
from wavflow.draw import Draw
from wavflow.ema import Ema
from wavflow.errors import InputError
from wavflow.memory import keep_freed_memory

log = logging.getLogger("wavflow")


class Objective(Protocol):
    """What is trained: a model, and the loss of a batch."""

    model: nn.Module

    def loss(self, batch: Any, draw: Draw) -> Tensor:
        """Loss of every item of `batch`, (b,), differentiable in the model's parameters."""
        ...

    def write_samples(self, folder: Path, dataset: Any, weights: dict[str, Tensor]) -> None:
        """Leaves in `folder` what the model makes with `weights` in place of its parameters."""
        ...


class Dataset(Protocol):
    """Where batches come from. `batch` is called from loader threads."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def batch(self, indices: list[int]) -> Any: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    out: Path
    checkpoint: Path
    steps: int
    epochs: int
    loss: float
    seconds: float
    parameters: int


class Trainer:
    """Trains `objective.model` on `dataset`; the run lives in `out` and goes on from there.

    `out` gets checkpoint_latest.pth, checkpoint_epoch_<N>.pth, ema_epoch_<N>.pth, training.log
    and metrics.jsonl. The run ends after `epochs`, `max_steps` or `max_seconds`, whichever comes
    first, and the learning rate follows the nearest of these ends. SIGINT and SIGTERM finish the
    step, write checkpoint_latest.pth and end the run by KeyboardInterrupt or SystemExit(143). On a
    CPU the process keeps the memory it frees from then on (``wavflow.memory``).

    Args:
        objective: the model, already on `device`, and its loss.
        dataset: where batches come from.
        settings: optimiser, schedule, length.
        out: the run's folder.
        config: plain dict stored in every checkpoint.
        device, dtype: autocast runs where dtype is not float32.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        settings: TrainingConfig,
        out: Path,
        *,
        config: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.objective, self.dataset, self.settings = objective, dataset, settings
        self.model, self.out, self.config = objective.model, Path(out), config
        self.device, self.dtype = device, dtype
        self.optimizer = make_optimizer(self.model, settings)
        self.emas = {
            "ema1": Ema(self.model, settings.ema_decay1),
            "ema2": Ema(self.model, settings.ema_decay2),
        }
        self.epoch_steps = steps_per_epoch(len(dataset), settings.batch_size)
        self.epoch, self.step_in_epoch = settings.start_epoch, 0
        self.step = 0
        self.ema_age = 0
        self.elapsed = 0.0
        self.loss = math.nan
        self.recent: list[float] = []

    # Where the run stands

    @property
    def total_steps(self) -> int:
        steps = self.settings.epochs * self.epoch_steps
        return min(steps, self.settings.max_steps or steps)

    def progress(self) -> float:
        """How much of the run is done, 0 to 1: by steps or by time, whichever is further."""
        done = self.step / self.total_steps
        if self.settings.max_seconds is not None:
            done = max(done, self.elapsed / self.settings.max_seconds)
        return min(done, 1.0)

    def learning_rate(self) -> float:
        """Linear warm-up, then constant, a cosine to `min_lr`, or steps by epoch."""
        s = self.settings
        peak = s.peak_lr
        if s.lr_schedule == "cosine":
            floor = min(s.min_lr, peak)
            peak = floor + (peak - floor) * (1 + math.cos(math.pi * self.progress())) / 2
        elif s.lr_schedule == "step":
            peak *= s.lr_schedule_gamma ** sum(self.epoch >= at for at in s.lr_schedule_steps)
        return peak * min(1.0, (self.step + 1) / max(s.warmup_steps, 1))

    # The loop

    def run(self) -> TrainResult:
        """Trains to the end.

        Raises:
            InputError: a loss or gradient that is not finite; the ids of its clips are named.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (
            runlog.log_file(self.out / "training.log"),
            _signals() as caught,
            runlog.display() as show,
        ):
            log.info("%s", precision.describe(self.device, self.dtype))
            log.info(
                "%d parameters, %d clips, batch %d, from step %d to %d",
                count_parameters(self.model),
                len(self.dataset),
                self.settings.batch_size,
                self.step,
                self.total_steps,
            )
            if self.device.type == "cpu":
                keep_freed_memory()
            self.model.train()
            started, resumed_at = time.monotonic(), self.elapsed
            # On the CPU a loader thread's own OpenMP pool fights the step's: 1.5 times the time.
            workers = 0 if self.device.type == "cpu" else self.settings.num_workers
            batches = prefetch(
                lambda work: self.dataset.batch(work.indices),
                plan(
                    len(self.dataset),
                    self.settings.batch_size,
                    self.settings.seed,
                    self.epoch,
                    self.step_in_epoch,
                ),
                workers,
                self.settings.dataloader_prefetch_factor,
            )
            speed = runlog.Speed()
            try:
                while self.progress() < 1.0:
                    work, batch = next(batches)
                    figures = self._train_step(work, batch)
                    self.elapsed = resumed_at + time.monotonic() - started
                    self._advance(work)
                    self.recent.append(figures["loss"])
                    speed.add(len(work.indices))
                    show(self.progress(), self.elapsed, self._status(speed))
                    if self.step % self.settings.log_freq == 0 or self.progress() >= 1.0:
                        self._log_metrics(figures, speed)
                    if self.step_in_epoch == 0:
                        self._end_of_epoch()
                    if caught:
                        self._stop(caught[0])
            finally:
                batches.close()
            self.save(checkpoint.LATEST)
            log.info("done: %d steps in %.0f s, loss %.4f", self.step, self.elapsed, self.loss)
        return TrainResult(
            out=self.out,
            checkpoint=self.out / checkpoint.LATEST,
            steps=self.step,
            epochs=self.epoch,
            loss=self.loss,
            seconds=self.elapsed,
            parameters=count_parameters(self.model),
        )

    def _train_step(self, work: Work, batch: Any) -> dict[str, float]:
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draw = Draw(self.settings.seed, self.step, work.indices)
        with self._autocast():
            losses = self.objective.loss(batch, draw)
        loss = losses.mean()
        if not math.isfinite(value := loss.item()):
            bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
            self._refuse("loss", [work.indices[i] for i in bad])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        if not math.isfinite(norm := norm.item()):
            self._refuse("gradient", work.indices)
        self.optimizer.step()
        for ema in self.emas.values():
            ema.update(self.model, self.ema_age)
        return {"loss": value, "grad_norm": norm, "lr": rate}

    def _refuse(self, what: str, indices: list[int]) -> None:
        ids = ", ".join(self.dataset.id(i) for i in indices[:16])
        raise InputError(f"step {self.step}: the {what} is not finite; clips: {ids}")

    def _advance(self, work: Work) -> None:
        self.step += 1
        self.ema_age += 1
        self.epoch, self.step_in_epoch = work.epoch, work.step + 1
        if self.step_in_epoch == self.epoch_steps:
            self.epoch, self.step_in_epoch = work.epoch + 1, 0

    def _end_of_epoch(self) -> None:
        s = self.settings
        if self.epoch % s.checkpoint_freq == 0 and self.progress() < 1.0:
            self.save(checkpoint.LATEST)
        if s.checkpoint_save_epoch and self.epoch % s.checkpoint_save_epoch == 0:
            self.save(f"checkpoint_epoch_{self.epoch}.pth")
        if s.ema_checkpoint_save_epoch and self.epoch % s.ema_checkpoint_save_epoch == 0:
            state = {**self.model.state_dict(), **self.emas["ema1"].values}
            checkpoint.save(self.out / f"ema_epoch_{self.epoch}.pth", state)

        if s.gen_train_freq and self.epoch % s.gen_train_freq == 0:
            folder = self.out / "samples" / f"epoch_{self.epoch}"
            self.objective.write_samples(folder, self.dataset, self.emas["ema1"].values)

    def _stop(self, signum: int) -> None:
        self.save(checkpoint.LATEST)
        log.warning(
            "%s at step %d: saved %s; the same command goes on from there",
            signal.Signals(signum).name,
            self.step,
            self.out / checkpoint.LATEST,
        )
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def _autocast(self) -> Any:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _status(self, speed: runlog.Speed) -> str:
        loss = self.recent[-1] if self.recent else self.loss
        return f"step {self.step}  loss {loss:.3f}  {speed.clips_per_second:.1f} clips/s"

    def _log_metrics(self, figures: dict[str, float], speed: runlog.Speed) -> None:
        """Writes one line; its loss is the mean since the line before."""
        self.loss, self.recent = sum(self.recent) / len(self.recent), []
        line = {
            "step": self.step,
            "epoch": self.epoch,
            **figures,
            "loss": self.loss,
            "clips_per_second": round(speed.clips_per_second, 2),
            "seconds": round(self.elapsed, 2),
        }
        runlog.append_metrics(self.out / "metrics.jsonl", line)

    # Files

    def save(self, name: str) -> None:
        """Writes a whole checkpoint to `out/name`."""
        checkpoint.save(
            self.out / name,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "global_step": self.step,
                "model_ema1": self.emas["ema1"].values,
                "model_ema2": self.emas["ema2"].values,
                "ema_age": self.ema_age,
                "ema_decay": {name: ema.decay for name, ema in self.emas.items()},
                "position": {
                    "step_in_epoch": self.step_in_epoch,
                    "clips": self.dataset.fingerprint(),
                },
                "elapsed": self.elapsed,
                "loss": self.loss,
                "recent": self.recent,
                "rng": torch.get_rng_state(),
                "config": self.config,
            },
        )

    def resume(self) -> bool:
        """Goes on from checkpoint_latest.pth in `out`, if there is one."""
        path = self.out / checkpoint.LATEST
        if not path.exists():
            return False
        self.restore(path)
        return True

    def reset_averages(self) -> None:
        """Starts both averages from the model's present weights."""
        for ema in self.emas.values():
            ema.load(dict(self.model.named_parameters()), self.out)

    def restore(self, path: Path) -> None:
        """Takes weights, averages, optimiser and position from a training checkpoint.

        Raises:
            InputError: unreadable, of another model, or of another optimiser layout.
        """
        content = checkpoint.load_training(path)
        checkpoint.load_into(self.model, content["model"], path)
        for name, ema in self.emas.items():
            ema.load(content.get(f"model_{name}") or content["model"], path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise InputError(f"{path}: its optimizer state does not fit ({error})") from None
        self.epoch, self.step = int(content["epoch"]), int(content["global_step"])
        self.ema_age = int(content.get("ema_age", self.step))
        self.elapsed = float(content.get("elapsed", 0.0))
        self.loss, self.recent = float(content.get("loss", math.nan)), content.get("recent", [])
        if changed := _changes(content.get("config") or {}, self.config):
            log.warning("%s: made with other settings: %s", path, ", ".join(changed))
        position = content.get("position", {})
        if position.get("clips", self.dataset.fingerprint()) != self.dataset.fingerprint():
            log.warning("%s: the usable clips have changed; the epoch starts anew", path)
            position = {}
        self.step_in_epoch = min(int(position.get("step_in_epoch", 0)), self.epoch_steps - 1)
        if "rng" in content:
            torch.set_rng_state(content["rng"])
        runlog.drop_metrics_after(self.out / "metrics.jsonl", self.step)
        log.info("resumed %s at step %d", path, self.step)


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.95), fused; weight decay on tensors with two or more axes only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.95), fused=True)


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(p.numel() for p in model.parameters())


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Settings that differ, as `section.key was -> is`."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = [_changes(before[k], now[k], f"{key}.{k}") for k in before if k in now]
        return [line for lines in found for line in lines]
    return [] if before == now else [f"{key.lstrip('.')} {before} -> {now}"]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as it would without us."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        restore()
        print("stopping after this step", file=sys.stderr)

    for signum in before:
        signal.signal(signum, handle)
    try:
        yield caught
    finally:
        restore()
