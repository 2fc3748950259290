"""The demo: a toy world, sounds of the packaged network for it, figures, a training, a report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wavflow.base.console import console, counter
from wavflow.base.errors import InputError
from wavflow.base.files import read_json, sha256, write_json
from wavflow.base.version import __version__
from wavflow.config.load import load_config
from wavflow.config.schema import Config
from wavflow.demo.score import FULL, MODES, NAMES, QUICK, SERIES, SHIPPED, recompute
from wavflow.demo.sounds import Job, control_jobs, generate, jobs_of, read_heldout
from wavflow.evaluation.toy import CLASSIFIER_CLIPS, Listener
from wavflow.pipeline.sampler import Sampler
from wavflow.systems.wavflow.build import build_model
from wavflow.training.checkpoint import LATEST
from wavflow.training.run_log import METRICS, read_metrics
from wavflow.training.trainer import TrainResult
from wavflow_kernels import cpu

#: The packaged network, and the configuration it was trained by.
PRESET = "toy_8k"
#: How many training clips the world has, by the demo's training: what the listener learns from and
#: a minute of training can use, or as many as the packaged network had.
CLIPS = {QUICK: CLASSIFIER_CLIPS, FULL: 1200, "none": CLASSIFIER_CLIPS}
HELDOUT_CLIPS = 64
#: How many of them the controls and the training "quick" are heard with.
CONTROL_CLIPS = QUICK_CLIPS = 16
#: Seconds of the training "quick".
TRAIN_SECONDS = 60.0
_PARTS = ("toy", "features", "run", "wav", "video", "img")


def run_demo(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: str = QUICK,
    weights: str | os.PathLike[str] = PRESET,
    overrides: Sequence[str] = (),
    train_seconds: float = TRAIN_SECONDS,
    clips: int | None = None,
    heldout: int = HELDOUT_CLIPS,
    fresh: bool = False,
) -> dict[str, Any]:
    """Runs the demo in the folder `out` and returns what it writes to metrics.json.

    The report is there as soon as the packaged network is judged, and is written anew after the
    training. What an earlier run with the same settings left is used again: the world, the
    features, a training run (which goes on where it stopped) and the sounds.

    Args:
        out: gets report.html, report.png, events.json, metrics.json, wav/ and video/, and the
            material they are made from in toy/, features/ and run/.
        seed: what the world, the training and the noise depend on.
        train: how long a network is trained from nothing: "quick", for `train_seconds`, "full", for
            the steps of the configuration, or "none".
        weights: the checkpoint that is heard first.
        overrides: `key=value` on top of the configuration of the training.
        train_seconds: wall-clock seconds of the training "quick".
        clips: training clips of the world, by default those of `CLIPS`.
        heldout: held-out clips of the world.
        fresh: whether what an earlier run left in `out` is deleted first.

    Raises:
        InputError: matplotlib or scikit-learn is missing, or a setting is out of range.
    """
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"the demo needs {package}: pip install 'wavflow[demo]'")
    if train not in CLIPS:
        raise InputError(f"train is {train!r}; wanted one of {', '.join(CLIPS)}")
    if (clips is not None and clips < 8) or heldout < 8:
        raise InputError(f"clips is {clips}, heldout is {heldout}; the demo wants at least 8")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for part in _PARTS:
            shutil.rmtree(out / part, ignore_errors=True)
    config = load_config(PRESET, overrides)
    demo = Demo(
        out, seed, clips or CLIPS[train], heldout, config, stages=4 if train == "none" else 6
    )

    with demo.stage(f"{heldout} videos and captions that no network has met", "heldout"):
        demo.write_clips("heldout")
        demo.extract("heldout")
    with demo.stage("sounds of the packaged network", "sounds"):
        sampler = Sampler.load(weights)
        entries = demo.sounds_of_weights(sampler)
    with demo.stage(f"{demo.clips} clips to learn kinds of sound from", "clips"):
        demo.write_clips("train")
    with demo.stage("figures and report", "report"):
        metrics = demo.judge(entries, sampler, None)
    demo.report(metrics)
    if train != "none":
        run = demo.run_config(train, train_seconds)
        told = "at most " if train == QUICK else ""
        length = _minutes(train_seconds) if train == QUICK else f"{run.training.max_steps} steps"
        with demo.stage(f"training from nothing: {told}{length}", "train"):
            demo.extract("train")
            if train == FULL:
                demo.forecast(run)
            trained = demo.train(run)
        with demo.stage("its sounds, figures and report", "trained_sounds"):
            entries += demo.sounds_of_training(train, trained, run)
            metrics = demo.judge(entries, sampler, Training(train, trained, run))
        demo.report(metrics)
    show(out, metrics)
    return metrics


@dataclass(frozen=True)
class Training:
    """A training of the demo: "quick" or "full", what it came to, its configuration."""

    how: str
    result: TrainResult
    config: Config


@dataclass
class Demo:
    """One run of the demo: its settings, and what it took."""

    out: Path
    seed: int
    clips: int
    heldout: int
    config: Config
    stages: int
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    first_sounds: float | None = None

    @contextmanager
    def stage(self, what: str, name: str) -> Iterator[None]:
        """Says what begins, and how long it took."""
        _say(f"[bold]{len(self.seconds) + 1}/{self.stages}[/bold] {what}")
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun
        _say(f"    {self.seconds[name]:.0f} s")

    def _keep(self, what: str) -> None:
        self.reused.append(what)
        _say(f"    {what} kept from an earlier run with the same settings")

    def world(self, split: str) -> dict[str, Any]:
        """What the clips of "train" or "heldout" depend on."""
        return {
            "wavflow": __version__,
            "seed": self.seed,
            "clips": self.clips if split == "train" else self.heldout,
            "seconds": self.config.data.audio_duration,
            "rate": self.config.data.target_sample_rate,
        }

    def write_clips(self, split: str) -> None:
        """Writes the "heldout" clips of toy/, which come first, or those of "train"."""
        from wavflow.toy.world import write_split

        folder, settings = self.out / "toy", self.world(split)
        path = folder / f"{split}.json"
        if path.is_file() and read_json(path) == settings:
            self._keep(f"{split} clips")
            return
        if split == "heldout":  # what is there belongs to another world
            shutil.rmtree(folder, ignore_errors=True)
        path.unlink(missing_ok=True)
        write_split(
            folder,
            split,
            settings["clips"],
            self.seed,
            seconds=settings["seconds"],
            rate=settings["rate"],
            progress=console().is_terminal,
        )
        write_json(path, settings)

    def extract(self, split: str) -> None:
        """Writes the features of the "train" or "heldout" clips, where they are not there yet."""
        from wavflow.features.extract import extract

        with counter(f"{split} features") as progress:
            result = extract(
                self.out / "toy" / f"{split}.csv",
                self.out / "features",
                config=self.config,
                overwrite=True,
                progress=progress,
            )
        if result.failed:
            raise InputError(f"{result.failed} clips have no features; see {result.report}")
        if not result.done:
            self._keep(f"{split} features")

    # Sounds

    def sounds_of_weights(self, sampler: Sampler) -> list[dict[str, Any]]:
        """Entries of events.json for the packaged network's sounds and the controls'."""
        clips = read_heldout(self.out, sampler.config)

        def jobs() -> list[Job]:
            controls = control_jobs(sampler, clips.first(CONTROL_CLIPS), self.seed)
            return [*jobs_of(sampler, SHIPPED, clips), *controls]

        settings = {"sha256": sha256(sampler.weights["file"]), "controls": CONTROL_CLIPS}
        return self._sounds(SHIPPED, settings, jobs)

    def sounds_of_training(
        self, how: str, trained: TrainResult, config: Config
    ) -> list[dict[str, Any]]:
        """Entries of events.json for the sounds of a network that was trained here."""

        def jobs() -> list[Job]:
            inference = config.inference
            sampler = Sampler.load(
                trained.checkpoint, inference.device, inference.dtype, config.model.ema, config
            )
            clips = read_heldout(self.out, config)
            return jobs_of(sampler, how, clips.first(QUICK_CLIPS) if how == QUICK else clips)

        return self._sounds(how, {"run": config.experiment_id, "steps": trained.steps}, jobs)

    def _sounds(
        self, name: str, settings: dict[str, Any], jobs: Callable[[], list[Job]]
    ) -> list[dict[str, Any]]:
        path = self.out / "wav" / f"{name}.json"
        settings = {"world": self.world("heldout"), **settings}
        if path.is_file() and (found := read_json(path))["settings"] == settings:
            self._keep(f"{name} sounds")
            return found["entries"]
        path.unlink(missing_ok=True)
        with counter("sounds") as show:

            def progress(what: str, done: int, total: int) -> None:
                if self.first_sounds is None:
                    self.first_sounds = time.monotonic() - self.started
                    _say(f"    first sounds after {self.first_sounds:.0f} s: {path.parent / name}")
                show(done, total)

            entries = generate(self.out, jobs(), seed=self.seed, progress=progress)
        write_json(path, {"settings": settings, "entries": entries})
        return entries

    # Training

    def run_config(self, how: str, train_seconds: float) -> Config:
        """The training's configuration; its folder's name says what the result depends on."""
        settings = dataclasses.replace(
            self.config.training,
            seed=self.seed,
            tensorboard=False,
            max_seconds=train_seconds if how == QUICK else None,
        )
        text = json.dumps(
            [dataclasses.replace(self.config, training=settings).to_dict(), self.world("train")],
            sort_keys=True,
        )
        return dataclasses.replace(
            self.config,
            data=dataclasses.replace(
                self.config.data, csv_path=str(self.out / "features" / "train.csv")
            ),
            training=dataclasses.replace(settings, output_dir=str(self.out / "run")),
            experiment_id=f"{how}-{hashlib.sha256(text.encode()).hexdigest()[:10]}",
        )

    def forecast(self, config: Config) -> None:
        """Says how long the training takes here, by a few of its steps."""
        from wavflow.pipeline.train import try_out

        found = try_out(config, seconds=4)
        steps = found.total_steps - found.first_step
        _say(
            f"    {steps} steps, {found.seconds:.2f} s each here: the training takes about "
            f"[bold]{_minutes(found.run_seconds)}[/bold]"
        )

    def train(self, config: Config) -> TrainResult:
        """Trains, or goes on where an earlier run of the demo stopped."""
        from wavflow.pipeline.train import train

        if (Path(config.training.output_dir) / config.experiment_id / LATEST).exists():
            self._keep("training")
        return train(config)

    # The report

    @functools.cached_property
    def heard(self) -> Listener:
        """What listens to the sounds; it learns from the world's training clips."""
        return Listener(self.out / "toy" / "events.json")

    def judge(
        self, entries: list[dict[str, Any]], sampler: Sampler, training: Training | None
    ) -> dict[str, Any]:
        """Writes events.json and what the report shows; returns the metrics."""
        from wavflow.demo.report import draw_pictures

        write_json(self.out / "events.json", entries)
        metrics: dict[str, Any] = {
            "seconds_first_sounds": self.first_sounds,
            "reused": self.reused,
            "seed": self.seed,
            "weights": {
                "file": Path(sampler.weights["file"]).name,
                "steps": sampler.weights["global_step"],
                "parameters": sum(p.numel() for p in build_model(sampler.config).parameters()),
            },
            "training": None,
            **_machine(sampler),
            **recompute(self.out, self.heard),
        }
        losses: list[tuple[int, float]] = []
        if training is not None:
            result = training.result
            metrics["training"] = {
                "how": training.how,
                "steps": result.steps,
                "seconds": result.seconds,
                "loss": result.loss,
                "parameters": result.parameters,
            }
            lines = read_metrics(result.out / METRICS)
            losses = [(line["step"], line["loss"]) for line in lines if line.get("loss")]
        draw_pictures(self.out, metrics, losses)
        return metrics

    def report(self, metrics: dict[str, Any]) -> None:
        """Writes metrics.json and report.html, with the seconds that all took up to now."""
        from wavflow.demo.page import write_page

        metrics["seconds_total"] = time.monotonic() - self.started
        metrics["seconds"] = dict(self.seconds)
        write_json(self.out / "metrics.json", metrics)
        write_page(self.out, metrics)
        _say(f"    look and listen: [bold]{self.out / 'report.html'}[/bold]")


def _machine(sampler: Sampler) -> dict[str, Any]:
    name = cpu.name()
    if sampler.device.type == "cuda":
        name = torch.cuda.get_device_name(sampler.device)
    return {
        "device": sampler.device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "wavflow": __version__,
    }


def show(out: Path, metrics: dict[str, Any]) -> None:
    """Prints the figures, what was wanted of them, and where to listen."""
    from rich.table import Table

    checked = metrics["bars"]
    table = Table("")
    for title in ("onset recall", "onset precision", "kind of sound"):
        table.add_column(title, justify="right", no_wrap=True)

    def row(title: str, values: dict[str, float], bar: str = "", end_section: bool = False) -> None:
        cells = []
        for name in ("onset_recall", "onset_precision", "class_accuracy"):
            text = f"{values[name]:.3f}" if name in values else ""
            if (verdict := checked.get(f"{bar}.{name}")) is not None:
                colour, mark = ("green", "ok") if verdict["passed"] else ("bold red", "NO")
                text += f" [dim]{verdict['wanted']}[/dim] [{colour}]{mark}[/{colour}]"
            cells.append(text)
        table.add_row(title, *cells, end_section=end_section)

    for series in SERIES:
        for mode in MODES if series in metrics else ():
            title = f"{NAMES[series]}, {mode}"
            row(title, metrics[series][mode], f"{series}.{mode}", mode == MODES[-1])
    row("chance", metrics["chance"])
    row("ceiling", metrics["ceiling"])
    console().print(table)
    missed = sum(not bar["passed"] for bar in checked.values())
    training = metrics["training"]
    trained = (
        f", of which training {_minutes(training['seconds'])} ({training['steps']} steps)"
        if training
        else ""
    )
    _say(
        f"{'all bars passed' if not missed else f'{missed} bars missed'}; "
        f"{_minutes(metrics['seconds_total'])} in all{trained}"
    )
    _say(f"look and listen: [bold]{out / 'report.html'}[/bold]")


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _say(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=True)
