"""Checkpoint files: written whole or not at all, read without running anything they carry.

A training checkpoint is a dict with `model` (state dict), `optimizer`, `epoch`, `global_step`,
`model_ema1` and `model_ema2` (parameter name -> tensor); ours add `config` (plain dict),
`ema_age`, `ema_decay`, `position`, `clips`, `elapsed` and `processes`. An EMA file is a flat state
dict. All are zip files with a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write
from wavflow.base.state_dict import load, unwrapped
from wavflow.training.ema import initial_share

log = logging.getLogger("wavflow")

LATEST, PREVIOUS = "checkpoint_latest.pth", "checkpoint_previous.pth"
#: The last file that is written into a folder of shards.
END_MARK = "whole.json"
SAFETENSORS = ".safetensors"
#: Where the weights are that come with the package.
PACKAGED = Path(__file__).parents[1] / "weights"

# Decays of the averages in files that record none.
PUBLIC_EMA_DECAY = {"ema1": 0.9999, "ema2": 0.9996}

# Above this share of the initial weights an average sounds like its initialisation.
YOUNG_EMA_SHARE = 0.01


@dataclass(frozen=True)
class Weights:
    """One set of weights out of a file.

    Attributes:
        path: the file.
        state: name -> tensor.
        which: `ema1`, `ema2`, `model`, or `flat` for a file that holds one set only.
        config: the run's configuration as plain dicts, or None where the file has none.
        global_step: optimiser steps behind the weights, or None.
        provenance: how the weights were made, and their figures, or None.
    """

    path: Path
    state: dict[str, Tensor]
    which: str
    config: dict[str, Any] | None
    global_step: int | None
    provenance: dict[str, Any] | None = None


def packaged() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob(f"*{SAFETENSORS}"))


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """The file of a checkpoint: a path, or a name out of `packaged()`. A file of that name wins.

    Raises:
        InputError: it is neither, and the packaged ones are named; or it is a folder, of a run or
            of shards.
    """
    path = Path(checkpoint)
    named = PACKAGED / f"{path}{SAFETENSORS}"
    if not path.is_file() and path.name == str(path) and named.is_file():
        return named
    if path.is_dir() and path != Path():
        if (path / LATEST).is_file():
            raise InputError(f"{path}: a folder; wanted a file, such as {path / LATEST}")
        shards = next(
            (p for p in (path, path / Path(LATEST).stem) if (p / END_MARK).exists()), path
        )
        raise InputError(
            f"{path}: a folder; wanted a file, as `wavflow convert {shards} FILE.pth` writes it "
            "from a checkpoint in shards"
        )
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; packaged ones: {', '.join(packaged()) or 'none'}"
        )
    return path


def save(
    path: str | os.PathLike[str], content: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Writes `content` to a temporary file in the same folder, then renames it to `path`.

    With `previous`, the file that was at `path` is kept under that name; at any moment one of the
    two is whole.

    Raises:
        InputError: it could not be written; what was there is as it was.
    """
    try:
        with atomic_write(path) as file:
            torch.save(dict(content), file)
            if previous is not None and Path(path).exists():
                _keep(Path(path), previous)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        raise InputError(f"{path}: not written, nothing was changed ({error})") from error


def _keep(path: Path, previous: Path) -> None:
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, previous)


def check_room(folder: Path, bytes_wanted: int) -> None:
    """Raises InputError where a checkpoint of that size does not fit beside what is in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < bytes_wanted:
        raise InputError(
            f"{folder}: a checkpoint takes {bytes_wanted / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
            "free; nothing was overwritten"
        )


def check_whole(path: Path) -> None:
    """Raises InputError unless every byte of a checkpoint's tensors is as it was written."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(
            f"{path}: not a whole checkpoint, {path.stat().st_size} bytes ({error})"
        ) from None
    if broken is not None:
        raise InputError(f"{path}: not a whole checkpoint; the checksum of {broken} is wrong")


def load_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Like `load`, and demands what a run needs to go on.

    Raises:
        InputError: as in `load`; or model, optimizer, epoch or global_step is missing.
    """
    content = load(path)
    missing = [k for k in ("model", "optimizer", "epoch", "global_step") if k not in content]
    if missing:
        raise InputError(f"{path}: not a training checkpoint, it lacks {', '.join(missing)}")
    for key in ("model", "model_ema1", "model_ema2"):
        if isinstance(content.get(key), Mapping):
            content[key] = unwrapped(content[key])
    return content


def read_weights(path: str | os.PathLike[str], ema: str = "ema1") -> Weights:
    """Reads one set of weights from a training checkpoint, a flat EMA file or a safetensors file.

    Names may begin with what DistributedDataParallel and torch.compile put before them.
    A young average is warned about with the share of the initialisation left in it.

    Args:
        path: the file, or the name of packaged weights (`find`).
        ema: `ema1`, `ema2`, or `none` for the weights as trained.

    Raises:
        InputError: as in `find` and `load`; or a training checkpoint without the average asked for.
    """
    if ema not in ("ema1", "ema2", "none"):
        raise InputError(f"ema is {ema!r}; wanted ema1, ema2 or none")
    path = find(path)
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    content = load(path)
    if "model" not in content:
        if not content or not all(isinstance(v, Tensor) for v in content.values()):
            found = ", ".join(map(str, list(content)[:3])) or "nothing"
            raise InputError(f"{path}: not a WavFlow checkpoint; it holds {found}")
        return Weights(path, unwrapped(content), "flat", None, None)
    state = unwrapped(content["model"])
    config, step = content.get("config"), content.get("global_step")
    if ema == "none":
        return Weights(path, state, "model", config, step)
    average = content.get(f"model_{ema}")
    if not average:
        raise InputError(f"{path}: it has no model_{ema}; ask for ema=none")
    _warn_if_young(path, ema, content)
    return Weights(path, {**state, **unwrapped(average)}, ema, config, step)


def save_weights(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes `weights` as a safetensors file that `read_weights` reads back; atomically."""
    about = {
        "config": weights.config,
        "which": weights.which,
        "global_step": weights.global_step,
        "provenance": weights.provenance,
    }
    state = {name: tensor.contiguous() for name, tensor in weights.state.items()}
    metadata = {"format": "pt", "wavflow": json.dumps(about, allow_nan=False)}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(state, metadata))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("wavflow", "{}"))
        found = [about.get(key) for key in ("config", "global_step", "provenance")]
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from None
    config, step, provenance = found
    which = about.get("which", "flat")
    return Weights(path, unwrapped(state), which, config, step, provenance)


def _warn_if_young(path: Path, ema: str, content: Mapping[str, Any]) -> None:
    warmed_up = "ema_age" in content
    updates = content.get("ema_age", content.get("global_step"))
    if updates is None:
        return
    decay = content.get("ema_decay", PUBLIC_EMA_DECAY)[ema]
    share = initial_share(decay, int(updates), warmed_up=warmed_up)
    if share > YOUNG_EMA_SHARE:
        log.warning(
            "%s: %s is too young: after %d updates at decay %g, %.0f %% of it is still the "
            "initialisation; ask for ema=none",
            path,
            ema,
            updates,
            decay,
            100 * share,
        )
