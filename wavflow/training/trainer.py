"""The training loop. It drives an objective (a model and its loss) and knows nothing of either."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavflow.base import precision
from wavflow.base.errors import InputError
from wavflow.base.flops import count_flops, matmul_rate
from wavflow.base.interrupt import Interrupts
from wavflow.base.memory import keep_freed_memory, used_memory
from wavflow.base.processes import World
from wavflow.config.schema import TrainingConfig
from wavflow.data.order import Work, plan
from wavflow.data.prefetch import prefetch
from wavflow.training import checkpoint, run_log, validation
from wavflow.training.ema import Ema
from wavflow.training.micro_batch import BatchLoss
from wavflow.training.objective import Dataset, Loaded, Objective
from wavflow.training.optimizer import make_optimizer
from wavflow.training.parallel import Parallel, whole
from wavflow.training.run_state import State
from wavflow.training.step_figures import Pace, StepFigures, StepRecord
from wavflow.training.validation import validate

log = logging.getLogger("wavflow")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        out: the run's folder.
        checkpoint: its last checkpoint, a file or a folder of shards.
        steps, epochs: how far the run is.
        loss: mean loss when it was last logged; NaN where it never was.
        seconds: how long the run took, the time before it was resumed included.
        parameters: how many numbers the model has.
    """

    out: Path
    checkpoint: Path
    steps: int
    epochs: int
    loss: float
    seconds: float
    parameters: int


class Trainer:
    """Trains an objective's model on `dataset`; the run lives in `out` and goes on from there.

    `out` gets checkpoint_latest.pth, checkpoint_previous.pth, checkpoint_epoch_<N>.pth,
    ema_epoch_<N>.pth, training.log, metrics.jsonl and TensorBoard's events; with the strategy
    "fsdp" the checkpoints are folders of shards of the same names without ending.

    An example's clip, noise and time depend on the seed and its position in the run alone. So a run
    that is stopped at any moment and started again ends, on a CPU, with the same bits, and how many
    processes share a step changes nothing but rounding.

    The run ends after `epochs`, `max_steps` or `max_seconds`, whichever comes first, and the
    learning rate follows the nearest of these ends. SIGINT and SIGTERM finish the step, write the
    latest checkpoint and end the run by KeyboardInterrupt or SystemExit(143). A step with a loss
    or gradient that is not finite changes no weight; `max_bad_steps` of them in a row end the run.
    On a CPU the process keeps the memory it frees from then on (``wavflow.base.memory``).

    Args:
        objective: what is trained.
        dataset: where batches come from.
        settings: optimiser, schedule and length of the run.
        out: the run's folder.
        config: plain dict stored in every checkpoint.
        world: the processes, and this one's device.
        dtype: what autocast casts to; there is none in float32 and float64.
        validation: clips whose loss is taken every `val_steps` steps, always with the same noise
            and times.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        settings: TrainingConfig,
        out: Path,
        *,
        config: dict[str, Any],
        world: World,
        dtype: torch.dtype,
        validation: Dataset | None = None,
    ) -> None:
        self.objective, self.dataset, self.validation = objective, dataset, validation
        self.settings, self.out, self.config = settings, Path(out), config
        self.world, self.device, self.dtype = world, world.device, dtype
        self.order = dataset.order(settings.seed)
        self.model = objective.build().to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.flops = self._count_flops()
        self.matmul_rate = matmul_rate(self.device, dtype)
        self.parallel = Parallel(self.model, settings.strategy, world, compiled=settings.compile)
        self.batch_loss = self._batch_loss(self.parallel.forward, settings.seed)
        self.optimizer = make_optimizer(self.model, settings, world.size)
        self.emas = {
            "ema1": Ema(self.model, settings.ema_decay1),
            "ema2": Ema(self.model, settings.ema_decay2),
        }
        self.state = State(
            self.model,
            self.optimizer,
            self.emas,
            self.out,
            world,
            shards=settings.strategy == "fsdp",
        )
        self.position = settings.start_epoch * len(self.order)
        self.step = 0
        self.ema_age = 0
        self.elapsed = 0.0
        self.loss = math.nan
        self.recent, self.pace = StepFigures(), Pace()
        self.unreadable: set[str] = set()
        self.shown: run_log.RunLog | None = None
        self.saved_at = time.monotonic()

    # Where the run stands

    @property
    def step_examples(self) -> int:
        """How many clips a full step takes in all processes together."""
        return self.settings.batch_size * self.settings.accumulation * self.world.size

    @property
    def end(self) -> int:
        """How many examples the whole run takes."""
        return self.settings.epochs * len(self.order)

    @property
    def epoch(self) -> int:
        """How many epochs are over."""
        return self.position // len(self.order)

    @property
    def total_steps(self) -> int:
        """How many steps the run has at its end, those that are done among them."""
        steps = self.step + math.ceil(max(self.end - self.position, 0) / self.step_examples)
        return min(steps, self.settings.max_steps or steps)

    def progress(self) -> float:
        """How much of the run is done, 0 to 1: by steps or by time, whichever is further."""
        done = self.step / self.total_steps if self.total_steps else 1.0
        if self.settings.max_seconds is not None:
            done = max(done, self.elapsed / self.settings.max_seconds)
        return min(done, 1.0)

    def learning_rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then as `lr_schedule` says."""
        s = self.settings
        peak = s.peak_lr(self.world.size)
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
            InputError: too many steps in a row were not finite, or the disk is full.
        """
        if self.world.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.state.clean()
        self.world.gather(None)
        with Interrupts() as interrupts, self._log() as self.shown:
            self._introduce()
            if self.device.type == "cpu":
                keep_freed_memory()
            self.saved_at = started = time.monotonic()
            resumed_at = self.elapsed
            batches = self.batches()
            try:
                while self.progress() < 1.0:
                    epochs = self.train_step(batches)
                    now = time.monotonic()
                    due = now - self.saved_at > 60 * self.settings.checkpoint_minutes
                    signum, self.elapsed, save = self.world.largest(
                        [interrupts.signal, resumed_at + now - started, due]
                    )
                    self._after_step(epochs, save=bool(save))
                    if signum:
                        self.save(checkpoint.LATEST)
                        interrupts.end(int(signum), f"step {self.step}, saved in {self.out}")
            finally:
                batches.close()
            self.save(checkpoint.LATEST)
            log.info("done: %d steps in %.0f s%s", self.step, self.elapsed, loss_text(self.loss))
        return TrainResult(
            out=self.out,
            checkpoint=self.out / self.state.latest,
            steps=self.step,
            epochs=self.epoch,
            loss=self.loss,
            seconds=self.elapsed,
            parameters=self.parameters,
        )

    @contextmanager
    def _log(self) -> Iterator[run_log.RunLog | None]:
        """The run's log, in the first process; None in the others."""
        if not self.world.is_main:
            yield None
            return
        with (
            run_log.log_file(self.out / "training.log"),
            run_log.RunLog(
                self.out, tensorboard=self.settings.tensorboard, first_step=self.step
            ) as shown,
        ):
            yield shown

    def _introduce(self) -> None:
        log.info("%s", precision.describe(self.device, self.dtype))
        log.info(
            "%d parameters, %d clips, %d a step (batch %d, %d processes, %d accumulated), from "
            "step %d to %d",
            self.parameters,
            len(self.dataset),
            self.step_examples,
            self.settings.batch_size,
            self.world.size,
            self.settings.accumulation,
            self.step,
            self.total_steps,
        )
        # The latest checkpoint, the one before it, and the next while it is written.
        checkpoint.check_room(self.out, (3 - self.state.kept) * self.state.nbytes)

    def batches(self) -> Generator[tuple[Work, Loaded], None, None]:
        """This process's micro-batches from where the run stands."""
        work = plan(
            self.order,
            batch_size=self.settings.batch_size,
            accumulation=self.settings.accumulation,
            rank=self.world.rank,
            world=self.world.size,
            start=self.position,
            end=self.end,
        )
        ahead = self.settings.dataloader_prefetch_factor
        return prefetch(
            partial(self.batch_loss.load, self.dataset), work, self.settings.num_workers, ahead
        )

    def train_step(self, batches: Iterator[tuple[Work, Loaded]]) -> range:
        """One step of the optimiser; waits for no device. Returns the epochs that ended by it."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        record, waited, last = StepRecord(self.step), 0.0, False
        while not last:
            begun = time.monotonic()
            work, loaded = next(batches)
            waited += time.monotonic() - begun
            last = work.last
            self._note_problems(work, loaded)
            with self.parallel.gradients(shared=last):
                terms, counts = self.batch_loss(work, loaded)
                # Gradients are averaged over the processes.
                (terms.values.sum() * (self.world.size / work.step_examples)).backward()
            record.clips += work.indices or [0]
            record.values.append(terms.values.detach())
            record.counts.append(counts)
            if terms.t is not None:
                record.times.append(terms.t)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        record.norm = whole(norm.detach())
        # The fused optimiser leaves weights and states alone where this is 1, on the device.
        optimizer: Any = self.optimizer
        optimizer.found_inf = (~torch.isfinite(record.norm)).float()
        optimizer.grad_scale = None
        self.optimizer.step()
        for ema in self.emas.values():
            ema.update(self.model, self.ema_age)
        self.recent.add(record)
        self.pace.add(work.step_examples, waited)
        before = self.epoch
        self.position += work.step_examples
        self.step += 1
        self.ema_age += 1
        return range(before + 1, self.epoch + 1)

    def _count_flops(self) -> int:
        """Floating-point operations of one clip's forward and backward."""
        loss, work = self._batch_loss(self.model, self.settings.seed), Work([0], [0], 1, True)
        loaded = loss.load(self.dataset, work)
        with torch.random.fork_rng(self._generators()):
            flops = count_flops(lambda: loss(work, loaded)[0].values.sum().backward())
        self.model.zero_grad(set_to_none=True)
        return flops

    def _batch_loss(self, model: nn.Module, seed: int) -> BatchLoss:
        pinned = self.settings.dataloader_pin_memory
        return BatchLoss(self.objective, model, self.device, self.dtype, seed=seed, pinned=pinned)

    def _note_problems(self, work: Work, loaded: Loaded) -> None:
        for place, reason in loaded.problems.items():
            name = self.dataset.id(work.indices[place])
            if name not in self.unreadable:
                self.unreadable.add(name)
                log.warning("%s cannot be read any more and is left out: %s", name, reason)

    # Between steps

    def _after_step(self, epochs: range, *, save: bool) -> None:
        s, done = self.settings, self.progress()

        def reached(frequency: int) -> list[int]:
            return [epoch for epoch in epochs if frequency and epoch % frequency == 0]

        if self.step % s.log_freq == 0 or done >= 1.0:
            self._log_figures()
        if self.validation is not None and (self.step % s.val_steps == 0 or done >= 1.0):
            self._show(self.validate())
        if (save or reached(s.checkpoint_freq)) and done < 1.0:
            self.save(checkpoint.LATEST)
        for epoch in reached(s.checkpoint_save_epoch)[-1:]:
            self.save(f"checkpoint_epoch_{epoch}.pth")
        for epoch in reached(s.ema_checkpoint_save_epoch)[-1:]:
            average = self.state.average("ema1")
            if self.world.is_main:
                checkpoint.save(self.out / f"ema_epoch_{epoch}.pth", average)
        for epoch in reached(s.gen_train_freq)[-1:]:
            self._write_samples(epoch)
        if self.shown is not None:
            rate = self.pace.clips_per_second
            text = f"step {self.step}{loss_text(self.loss)}, {rate:.1f} clips/s"
            self.shown.progress(done, self.elapsed, text)

    def _absorb(self) -> None:
        """Brings the figures of the last steps to the CPU, and ends a run of bad ones.

        Raises:
            InputError: after `max_bad_steps` bad steps in a row.
        """
        bad = self.recent.absorb()
        if not bad:
            return
        named = [[self.dataset.id(i) for i in b.clips] for b in bad]
        by_rank = self.world.gather(named)
        path = self.out / "bad_steps.jsonl"
        if self.world.is_main:
            with open(path, "a", encoding="utf-8") as file:
                for i, step in enumerate(bad):
                    clips = sorted({name for rank in by_rank for name in rank[i]})
                    file.write(json.dumps({"step": step.step, "clips": clips}) + "\n")
                    names = ", ".join(clips[:8]) or "none alone"
                    log.warning("step %d skipped: not finite; clips: %s", step.step, names)
        if self.recent.in_a_row >= self.settings.max_bad_steps:
            raise InputError(
                f"step {self.step}: the last {self.recent.in_a_row} steps were not finite; their "
                f"clips are in {path}"
            )

    def _log_figures(self) -> None:
        """Shows the means since the last time."""
        self._absorb()
        means = self.recent.means(self.world)
        self.loss = means.get("loss", math.nan)
        figures = {
            "epoch": self.epoch,
            **means,
            "grad_norm": self.recent.norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "clips_per_second": self.pace.clips_per_second,
            "data_wait": self.pace.waited,
            "memory_gb": used_memory(self.device) / 1e9,
            "seconds": self.elapsed,
        }
        rate = self.flops * self.pace.clips_per_second
        figures["mfu"] = rate / (self.matmul_rate * self.world.size)
        if self.recent.skipped:
            figures["skipped_steps"] = self.recent.skipped
        if self.unreadable:
            figures["unreadable_clips"] = len(self.unreadable)
        self._show(figures)

    def _show(self, figures: dict[str, float]) -> None:
        if self.shown is not None:
            self.shown.metrics(self.step, figures)

    def validate(self) -> dict[str, float]:
        """The mean loss of the validation clips, with the weights and with their average."""
        assert self.validation is not None
        return validate(
            self._batch_loss(self.parallel.forward, validation.SEED),
            self.validation,
            self.model,
            self.emas["ema1"],
            self.world,
            self.settings.batch_size,
        )

    def _write_samples(self, epoch: int) -> None:
        average = self.state.average("ema1")
        if self.shown is None:
            return
        with torch.random.fork_rng(self._generators()):
            model = self.objective.build()
            model.load_state_dict(average)
            made = self.objective.samples(model.to(self.device).eval(), self.dataset)
        self.shown.samples(self.step, self.out / "samples" / f"epoch_{epoch}", made)

    def _generators(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    # Checkpoints

    def save(self, name: str) -> None:
        """Writes a whole checkpoint to `out/name`; all processes call it."""
        self._absorb()
        process = {"window": self.recent.sums, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            process["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {
            "epoch": self.epoch,
            "global_step": self.step,
            "ema_age": self.ema_age,
            "ema_decay": {name: ema.decay for name, ema in self.emas.items()},
            "position": self.position,
            "clips": self.dataset.fingerprint(),
            "elapsed": self.elapsed,
            "loss": self.loss,
            "bad_steps": [self.recent.in_a_row, self.recent.skipped],
            "processes": self.world.gather(process),
            "config": self.config,
        }
        self.state.save(name, meta)
        self.saved_at = time.monotonic()

    def resume(self) -> bool:
        """Goes on from the checkpoint in `out` that `settings.resume` asks for, if there is one."""
        path = self.state.find(self.settings.resume)
        if path is None:
            return False
        self.restore(path)
        return True

    def restore(self, path: Path) -> None:
        """Takes weights, averages, optimiser and position from a training checkpoint.

        Raises:
            InputError: it is unreadable, of another model, or of another optimiser layout.
        """
        meta = self.state.restore(path)
        self.step = int(meta["global_step"])
        self.ema_age = int(meta.get("ema_age", self.step))
        self.elapsed = float(meta.get("elapsed", 0.0))
        self.loss = float(meta.get("loss", math.nan))
        self.recent.in_a_row, self.recent.skipped = meta.get("bad_steps", (0, 0))
        if changed := _changes(meta.get("config") or {}, self.config):
            log.warning("%s: made with other settings: %s", path, ", ".join(changed))
        self.position = int(meta.get("position", int(meta["epoch"]) * len(self.order)))
        clips = self.dataset.fingerprint()
        if meta.get("clips", clips) != clips:
            self.position = int(meta["epoch"]) * len(self.order)
            log.warning("%s: the usable clips have changed; the epoch starts anew", path)
        self._restore_processes(meta.get("processes", []), path)
        log.info("resumed %s at step %d", path, self.step)

    def _restore_processes(self, found: list[dict[str, Tensor]], path: Path) -> None:
        if len(found) == self.world.size:
            own = found[self.world.rank]
            self.recent.sums = own["window"]
            torch.set_rng_state(own["rng"])
            if self.device.type == "cuda" and "rng_cuda" in own:
                torch.cuda.set_rng_state(own["rng_cuda"], self.device)
        elif found:
            log.warning("%s: of %d processes; there are %d", path, len(found), self.world.size)
            if self.world.is_main:
                sums: Any = sum(process["window"] for process in found)
                self.recent.sums = sums

    def start_from(self, weights: dict[str, Tensor], path: Path) -> None:
        """Starts model and averages from weights that were read from `path`."""
        self.state.fill_model(weights, path)
        for ema in self.emas.values():
            ema.reset(self.model)


def loss_text(loss: float) -> str:
    """How a line on a run goes on: with the loss, or with nothing where none is known yet."""
    return f", loss {loss:.4f}" if math.isfinite(loss) else ""


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Settings that differ, as `section.key was -> is`."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = [_changes(before[k], now[k], f"{key}.{k}") for k in before if k in now]
        return [line for lines in found for line in lines]
    return [] if before == now else [f"{key.lstrip('.')} {before} -> {now}"]
