"""`wavflow train`: the run of a configuration, from its data to its last checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from wavflow.base import precision, processes
from wavflow.base.console import counter, show_log
from wavflow.base.errors import InputError
from wavflow.base.files import alone_in, check_folder
from wavflow.config.load import load_config, save_config
from wavflow.config.schema import Config, DataConfig, EncodersConfig, ModelConfig, TrainingConfig
from wavflow.data.dataset import Clips
from wavflow.data.manifest import check_report
from wavflow.data.open import open_dataset
from wavflow.data.tracks import Track
from wavflow.features import provenance
from wavflow.systems import system
from wavflow.training.checkpoint import read_weights
from wavflow.training.dry_run import DryRun, dry_run
from wavflow.training.trainer import Trainer, TrainResult


def train(config: Config | str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainResult:
    """Trains a system as a configuration says, or goes on with the run it describes.

    The run lives in `<training.output_dir>/<experiment_id>/`, with `training.overfit` in
    `<experiment_id>_overfit_<clips>/`. Under torchrun every process calls it.

    Args:
        config: a `Config`, YAML file or preset.
        overrides: `key=value` on top of a file or preset.

    Returns:
        What the run came to: its folder, checkpoint, steps and loss.

    Raises:
        InputError: anything wrong with the configuration, the data or an existing checkpoint.
    """
    config = _resolve(config, overrides)
    with _prepare(config, write=True) as trainer:
        if not trainer.resume():
            _start_from(trainer, config)
        return trainer.run()


def try_out(
    config: Config | str | os.PathLike[str], overrides: Iterable[str] = (), seconds: float = 20
) -> DryRun:
    """What `train` would need, by a few real steps; writes nothing into the run's folder.

    Args:
        config, overrides: as in `train`.
        seconds: for how long steps are taken, about.

    Raises:
        InputError: as `train` does.
    """
    config = _resolve(config, overrides)
    with _prepare(config, write=False) as trainer:
        if not trainer.resume():
            _start_from(trainer, config)
        return dry_run(trainer, seconds)


def _resolve(config: Config | str | os.PathLike[str], overrides: Iterable[str]) -> Config:
    overrides = list(overrides)
    if not isinstance(config, Config):
        return load_config(config, overrides)
    if overrides:
        raise InputError(
            "overrides go with a file or a preset; use dataclasses.replace on a Config"
        )
    return config


@contextmanager
def _prepare(config: Config[ModelConfig, DataConfig], *, write: bool) -> Iterator[Trainer]:
    """The trainer of a configuration, while its processes are joined."""
    settings, parts = config.training, system(config.system)
    tracks = parts.tracks(config)
    show_log()
    # A run on a few clips has a folder of its own: the whole run must not go on from it.
    part = "" if settings.overfit is None else f"_overfit_{settings.overfit}"
    name = config.experiment_id or "wavflow"
    out = Path(settings.output_dir) / f"{name}{part}"
    group, patience = settings.strategy == "fsdp", config.comm.init_timeout_seconds
    with (
        processes.join(settings.device, group, patience) as world,
        _owned(out) if write and world.is_main else nullcontext(),
    ):
        if not world.is_main:
            logging.getLogger("wavflow").setLevel(logging.WARNING)
        for table in (config.data.csv_path, config.data.val_csv_path):
            if table is not None and isinstance(config.model, EncodersConfig):
                provenance.check_model(table, config.model)
        with world.main_first():
            report = out / "report.csv" if write and world.is_main else None
            dataset = _open(config.data, tracks, settings, report)
            validation = None
            if config.data.val_csv_path is not None:
                validation = _open(_validation(config.data), tracks, settings, None)
        if settings.overfit is not None:
            dataset = dataset.subset(settings.overfit)
        torch.manual_seed(settings.seed)
        trainer = Trainer(
            parts.objective(config),
            dataset,
            settings,
            out,
            config=config.to_dict(),
            world=world,
            dtype=precision.resolve_dtype(settings.dtype, world.device),
            validation=validation,
        )
        if write and world.is_main:
            save_config(out / "config.yaml", config)
        yield trainer


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Keeps other runs, and files of others, out of a run's folder.

    Raises:
        InputError: a run is at work there; it has a configuration or report of something else.
    """
    check_folder(out)
    begun = (out / "training.log").exists() or any(out.glob("checkpoint_*"))
    if (out / "config.yaml").exists() and not (begun or (out / ".lock").exists()):
        raise InputError(
            f"{out / 'config.yaml'}: it is there, and no run; wanted another training.output_dir "
            "or experiment_id"
        )
    check_report(out / "report.csv")
    is_new = not out.exists()
    with alone_in(out, "to wait for its end, or another training.output_dir or experiment_id"):
        try:
            yield
        except InputError:
            if is_new and [path.name for path in out.iterdir()] == [".lock"]:
                (out / ".lock").unlink()  # a run that could not begin leaves nothing
                out.rmdir()
            raise


def _open(
    data: DataConfig, tracks: tuple[Track, ...], settings: TrainingConfig, report: Path | None
) -> Clips:
    with counter("reading") as progress:
        return open_dataset(
            data, tracks, report=report, workers=settings.num_workers, progress=progress
        )


def _validation(data: DataConfig) -> DataConfig:
    """The data section for the validation clips: all of them, in order, their first windows."""
    return replace(
        data,
        csv_path=data.val_csv_path,
        store=None,
        source_weights=None,
        shuffle="full",
        crop="first",
    )


def _start_from(trainer: Trainer, config: Config) -> None:
    initial = config.checkpoint
    if initial.initial_load_path is None:
        return
    path = Path(initial.initial_load_path)
    if not initial.initial_load_model_only:
        trainer.restore(path)
        return
    trainer.start_from(read_weights(path, "none").state, path)
