"""What the features of a folder were made with: `features.json` beside them.

    {"wavflow": version, "encoders": name, "seconds": length, "video": facts, "text": facts}

A modality's facts are those of its encoder (`VideoEncoder.facts`), its frame rates, and the shapes
of its features; one that no row has is not there. Where videos are encoded to their ends the length
is "whole", and their features have null rows. The version is the last writer's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wavflow.base.errors import InputError
from wavflow.base.files import locked, read_json, write_json
from wavflow.base.version import __version__
from wavflow.config.schema import EncodersConfig
from wavflow.features.encoder import Encoders

RECORD = "features.json"


def describe(
    encoders: Encoders, seconds: float | str, *, video: bool, text: bool
) -> dict[str, Any]:
    """The record of features that `encoders` make of clips of that length.

    Args:
        encoders: the encoders that make them.
        seconds: length of the clips, or a word where every video has its own.
        video, text: whether any row has one; an encoder that no row needs is not asked.

    Raises:
        InputError: as the encoders' sizes and facts raise.
    """
    length = seconds if isinstance(seconds, str) else float(seconds)
    record: dict[str, Any]
    record = {"wavflow": __version__, "encoders": encoders.name, "seconds": length}
    if video:
        see = encoders.video
        rows = [
            None if isinstance(seconds, str) else count(seconds)
            for count in (see.clip_rows, see.sync_rows)
        ]
        shapes = zip(rows, (see.clip_dim, see.sync_dim), strict=True)
        record["video"] = {
            **see.facts(),
            "frames": [f"{s.fps} a second, {s.size} pixels, {s.resize}" for s in see.streams],
            **dict(zip(see.keys, map(list, shapes), strict=True)),
        }
    if text:
        read = encoders.text
        record["text"] = {**read.facts(), read.key: [read.length, read.dim]}
    return record


def agree(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Joins what `folder` records with what `wanted` knows beyond it, and returns that.

    Raises:
        InputError: they contradict each other in more than the version, unless `overwrite` says
            that `wanted` alone counts then.
    """
    found = _read(folder / RECORD) if (folder / RECORD).exists() else {}
    for key, has, wants in _contradictions(found, wanted):
        if overwrite:
            return wanted
        raise InputError(
            f"{folder / RECORD}: {key} is {has}, wanted {wants}; --overwrite extracts all "
            "features again, another folder keeps both"
        )
    return _joined(found, wanted)


def save(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Writes what `agree` returns, and returns it; many processes may do so."""
    with locked(folder / RECORD):
        agreed = agree(folder, wanted, overwrite=overwrite)
        write_json(folder / RECORD, agreed)
    return agreed


def check_model(csv_path: str | os.PathLike[str], model: EncodersConfig) -> None:
    """Checks that features beside a table were made with the encoders of a configuration.

    Raises:
        InputError: a record lies beside the table, and names other encoders than `model` does.
    """
    path = Path(csv_path).parent / RECORD
    if not path.is_file():
        return
    names = {"clip_model_name": model.clip_model_name}
    if not Path(model.clip_pretrained).is_file():
        names["clip_pretrained"] = model.clip_pretrained
    wanted = {"encoders": model.encoders, "video": names, "text": names}
    for key, has, wants in _contradictions(_read(path), wanted):
        raise InputError(
            f"{path}: {key} is {has}; wanted {wants}, as model.{key.rpartition('.')[2]} of the "
            "configuration says"
        )


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: wanted an object as `wavflow extract` writes it")
    return found


def _contradictions(
    found: Mapping[str, Any], wanted: Mapping[str, Any], of: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields key, value found and value wanted where both are known and differ."""
    for key, value in wanted.items():
        if key not in found or key == "wavflow":
            continue
        if isinstance(value, Mapping) and isinstance(found[key], Mapping):
            yield from _contradictions(found[key], value, f"{of}{key}.")
        elif found[key] != value:
            yield of + key, found[key], value


def _joined(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    inner = {k: _joined(found.get(k, {}), v) for k, v in wanted.items() if isinstance(v, Mapping)}
    return {**found, **wanted, **inner}
