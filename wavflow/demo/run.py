"""The demo from nothing to a report: toy world, extraction, training, generation, figures."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wavflow import __version__
from wavflow.build import build_model, empty_caption
from wavflow.checkpoint import LATEST
from wavflow.config import Config, load_config
from wavflow.console import console, counter, progress_bar
from wavflow.data.dataset import ClipDataset
from wavflow.demo.score import CONTROLS, MODES, recompute
from wavflow.demo.sounds import BATCH, generate_all
from wavflow.errors import InputError
from wavflow.files import read_json, write_json
from wavflow.precision import resolve_device, resolve_dtype
from wavflow.trainer import TrainResult
from wavflow_kernels import cpu

#: Seconds of training, at most, and the steps that a machine must manage in them.
TRAIN_SECONDS = 225.0
MIN_STEPS = 800
#: What a machine gets that is too slow for the preset as it is.
SMALLER = ("model.hidden_dim=64", "model.num_heads=1", "model.depth=3", "model.fused_depth=1")
TRAIN_CLIPS, HELDOUT_CLIPS = 1200, 64
#: Seconds that scoring and the report take, for the forecast.
_REST_SECONDS = 25.0
_PARTS = ("toy", "features", "run", "wav", "video", "img")


def run_demo(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    preset: str = "toy_8k",
    overrides: Sequence[str] = (),
    train_seconds: float = TRAIN_SECONDS,
    min_steps: int = MIN_STEPS,
    clips: int = TRAIN_CLIPS,
    heldout: int = HELDOUT_CLIPS,
    fresh: bool = False,
) -> dict[str, Any]:
    """Runs the demo in the folder `out` and returns what it writes to metrics.json.

    What an earlier run with the same settings left is used again: the world, the features, a
    training run (which goes on where it stopped) and the sounds.

    Args:
        out: gets report.html, report.png, events.json, metrics.json, wav/ and video/, and the
            material they are made from in toy/, features/ and run/.
        seed: of the world, the training and the noise.
        preset: a packaged configuration or YAML file.
        overrides: `key=value` on top of it.
        train_seconds: wall-clock seconds of training, at most.
        min_steps: a machine that cannot do as many in that time trains a smaller network.
        clips, heldout: sizes of the world.
        fresh: delete what an earlier run left in `out` first.

    Raises:
        InputError: matplotlib or scikit-learn is missing, or a setting is out of range.
    """
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"the demo needs {package}: pip install 'wavflow[demo]'")
    if clips < 8 or heldout < 8:
        raise InputError(f"clips is {clips}, heldout is {heldout}; the demo wants at least 8")
    started = time.monotonic()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for part in _PARTS:
            shutil.rmtree(out / part, ignore_errors=True)
    demo = _Demo(out, seed, clips, heldout)
    config = _config(demo, preset, overrides, train_seconds)

    with demo.stage("1/5", "toy world", "toy"):
        demo.make_world(config)
    with demo.stage("2/5", "features of videos and captions", "extract"):
        demo.extract(config)
    with demo.stage("3/5", f"training for at most {train_seconds:.0f} s", "train"):
        smaller = _config(demo, preset, [*overrides, *SMALLER], train_seconds)
        if not _is_begun(config):
            demo.small = _is_begun(smaller) or demo.is_slow(config, smaller, min_steps, started)
        config = smaller if demo.small else config
        trained = demo.train(config)
    with demo.stage("4/5", f"sounds for {heldout} unseen clips", "generate"):
        demo.generate(trained, config)
    with demo.stage("5/5", "figures and report", "report"):
        figures = recompute(out)
        metrics = {
            "seconds_total": 0.0,
            "seconds_train": trained.seconds,
            "seconds": demo.seconds,
            "reused": demo.reused,
            "train_steps": trained.steps,
            "train_loss": trained.loss,
            "parameters": trained.parameters,
            "preset": config.model.name,
            "overrides": [*overrides, *(SMALLER if demo.small else ())],
            **_machine(config),
            "seed": seed,
            **figures,
        }
        from wavflow.demo.page import write_page
        from wavflow.demo.report import draw_pictures

        draw_pictures(out, metrics, demo.losses(config))
    metrics["seconds_total"] = time.monotonic() - started
    write_json(out / "metrics.json", metrics)
    write_page(out, metrics)
    show(out, metrics)
    return metrics


@dataclass
class _Demo:
    """One run of the demo: its settings, and what it took."""

    out: Path
    seed: int
    clips: int
    heldout: int

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.small = False

    @contextmanager
    def stage(self, number: str, what: str, name: str) -> Iterator[None]:
        _say(f"[bold]{number}[/bold] {what}")
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun
        _say(f"    {self.seconds[name]:.0f} s")

    def _is_kept(self, path: Path, settings: Any, what: str) -> bool:
        """Whether `path` says that its folder was finished with these settings."""
        if path.is_file() and read_json(path) == settings:
            self.reused.append(what)
            _say("    kept from an earlier run with the same settings")
            return True
        path.unlink(missing_ok=True)
        return False

    def world(self, config: Config) -> dict[str, Any]:
        data = config.data
        return {
            "wavflow": __version__,
            "seed": self.seed,
            "clips": self.clips,
            "heldout": self.heldout,
            "seconds": data.audio_duration,
            "rate": data.target_sample_rate,
        }

    def make_world(self, config: Config) -> None:
        from wavflow.data.toy import write_toy_world

        settings = self.world(config)
        folder = self.out / "toy"
        if self._is_kept(folder / "settings.json", settings, "toy"):
            return
        write_toy_world(
            folder,
            self.clips,
            self.seed,
            heldout=self.heldout,
            seconds=settings["seconds"],
            rate=settings["rate"],
            progress=console().is_terminal,
        )
        write_json(folder / "settings.json", settings)

    def extract(self, config: Config) -> None:
        from wavflow.features.extract import extract

        kept = 0
        for split in ("train", "heldout"):
            with counter(f"extract {split}") as progress:
                result = extract(
                    self.out / "toy" / f"{split}.csv",
                    self.out / "features",
                    config=config,
                    overwrite=True,
                    progress=progress,
                )
            if result.failed:
                raise InputError(f"{result.failed} clips have no features; see {result.report}")
            kept += result.kept
        if kept == self.clips + self.heldout:
            self.reused.append("features")

    def is_slow(self, config: Config, smaller: Config, min_steps: int, started: float) -> bool:
        """Whether this machine needs the smaller network; says what to expect."""
        csv = self.out / "features" / "heldout.csv"
        limit = config.training.max_seconds
        assert limit is not None
        step, sound = measure(config, csv)
        slow = limit / step < min_steps
        if slow:
            _say(
                f"    a step takes {step:.2f} s here: {limit / step:.0f} steps in {limit:.0f} s, "
                f"{min_steps} are needed. [bold]Taking a smaller network:[/bold] "
                f"{' '.join(SMALLER)}"
            )
            step, sound = measure(smaller, csv)
            if limit / step < min_steps:
                _say("    that is too slow as well: expect figures below the bars")
        sounds = sound * self.heldout * len(MODES) * (1 + len(CONTROLS))
        spent = time.monotonic() - started
        minutes, seconds = divmod(int(spent + limit + sounds + _REST_SECONDS), 60)
        _say(
            f"    {step * 1000:.0f} ms a step, about {limit / step:.0f} steps; {sounds:.0f} s for "
            f"the sounds; expected in all: [bold]{minutes} min {seconds:02d} s[/bold]"
        )
        return slow

    def train(self, config: Config) -> TrainResult:
        from wavflow.training import train

        if _is_begun(config):
            self.reused.append("training")
        return train(config)

    def generate(self, trained: TrainResult, config: Config) -> None:
        from wavflow.sampler import Sampler

        settings = {
            "run": config.experiment_id,
            "steps": trained.steps,
            "ema": config.model.ema,
            "sampling": dataclasses.asdict(config.sampling),
            "inference": dataclasses.asdict(config.inference),
        }
        path = self.out / "wav" / "settings.json"
        if not (self.out / "events.json").is_file():
            path.unlink(missing_ok=True)
        if self._is_kept(path, settings, "sounds"):
            return
        inference = config.inference
        sampler = Sampler.load(
            trained.checkpoint, inference.device, inference.dtype, config.model.ema, config
        )
        begun = time.monotonic()
        with progress_bar("{task.completed}/{task.total}  {task.fields[left]}") as bar:
            task = bar.add_task("generate", total=None, left="")

            def progress(what: str, done: int, total: int) -> None:
                left = int((time.monotonic() - begun) * (total - done) / done)
                text = f"{left // 60}:{left % 60:02d} left"
                name = f"generate {what}"
                bar.update(task, description=name, completed=done, total=total, left=text)

            generate_all(self.out, sampler, seed=self.seed, progress=progress)
        write_json(path, settings)

    def losses(self, config: Config) -> list[tuple[int, float]]:
        """Step and loss of every line of the training's metrics.jsonl."""
        text = (_run_folder(config) / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return [(line["step"], line["loss"]) for line in lines]


def _config(demo: _Demo, preset: str, overrides: Sequence[str], train_seconds: float) -> Config:
    """The run's configuration; its folder's name says what the result depends on."""
    told = [
        f"data.csv_path={json.dumps(str(demo.out / 'features' / 'train.csv'))}",
        f"training.output_dir={json.dumps(str(demo.out / 'run'))}",
        f"training.seed={demo.seed}",
        f"training.max_seconds={train_seconds}",
        "training.epochs=1000000",
    ]
    config = load_config(preset, [*overrides, *told])
    content = config.to_dict()
    del content["data"]["csv_path"], content["training"]["output_dir"]
    text = json.dumps([content, demo.world(config)], sort_keys=True)
    name = f"{config.model.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return dataclasses.replace(config, experiment_id=name)


def _run_folder(config: Config) -> Path:
    return Path(config.training.output_dir) / config.experiment_id


def _is_begun(config: Config) -> bool:
    return (_run_folder(config) / LATEST).exists()


def measure(config: Config, csv: Path, seconds: float = 3.0) -> tuple[float, float]:
    """Seconds that a training step takes, and the generation of one sound.

    Takes real steps for so many seconds, on a network that is thrown away.
    """
    from wavflow.sampler import Sampler
    from wavflow.training import try_out

    data = dataclasses.replace(config.data, csv_path=str(csv))
    per_step = try_out(dataclasses.replace(config, data=data), seconds=seconds).seconds
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    dataset = ClipDataset(csv, config.data)
    model = build_model(config, empty_caption(config)).to(device)
    sampler = Sampler(model, config, device, dtype)
    features = [dataset[i % len(dataset)].features for i in range(BATCH)]
    begun = time.monotonic()
    probe = 2
    sampler.generate_features(
        features, list(range(BATCH)), guidance=config.inference.cfg, steps=probe, batch_size=BATCH
    )
    per_sound = (time.monotonic() - begun) / probe / BATCH * config.sampling.num_steps
    return per_step, per_sound


def _machine(config: Config) -> dict[str, Any]:
    device = resolve_device(config.training.device)
    name = cpu.name()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(resolve_dtype(config.training.dtype, device)).removeprefix("torch."),
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

    for mode in MODES:
        row(mode, metrics[mode], mode, mode == MODES[-1])
    for control in CONTROLS:
        for mode in MODES:
            values = metrics["controls"][control][mode]
            row(f"{control} {mode}", values, f"{control}.{mode}", mode == MODES[-1])
    row("chance", metrics["chance"])
    row("ceiling", metrics["ceiling"])
    console().print(table)
    missed = sum(not bar["passed"] for bar in checked.values())
    minutes, seconds = divmod(int(metrics["seconds_total"]), 60)
    _say(
        f"{'all bars passed' if not missed else f'{missed} bars missed'}; "
        f"{minutes} min {seconds:02d} s in all, of which training "
        f"{metrics['seconds_train']:.0f} s ({metrics['train_steps']} steps, "
        f"{metrics['parameters'] / 1e6:.1f} M parameters)"
    )
    _say(f"look and listen: [bold]{out / 'report.html'}[/bold]")


def _say(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=True)
