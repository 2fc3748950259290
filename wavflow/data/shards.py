"""A packed data set, read through memory maps of its shards.

A pack is a folder of WebDataset shards: uncompressed tar files whose members `<key>.wave.npy`, one
`<key>.<name>.npy` for each track of features that the clip has (`wavflow.data.tracks`; WavFlow's
are clip, sync and text) and `<key>.json` make one clip. `<key>` is the clip's id with "%" as "%25"
and "." as "%2E", since WebDataset ends a key at its first dot; the JSON holds the id itself. Beside
each shard-000000.tar its index shard-000000.json says where the arrays lie and how loud the
recordings are; pack.json, written last, names all shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wavflow.base.errors import InputError
from wavflow.base.files import sha256
from wavflow.config.schema import DataConfig
from wavflow.data.dataset import Clips
from wavflow.data.recording import Level, Recording
from wavflow.data.tracks import Track

SCHEMA = 2
PACK = "pack.json"
# What follows a clip's key in the name of the member that holds its sound; features: `Track.name`.
WAVE = "wave"
PACK_KEYS = ("config", "table", "clips", "shards", "skipped")
SHARD_KEYS = ("config", "table", "bytes", "sha256", "next", "clips", "skipped")
DTYPES = ("<i2", "<f2", "<f4")


class PackedDataset(Clips):
    """Clips of a folder that `wavflow pack` made, read through memory maps of its shards.

    Args:
        folder: the pack's folder.
        config: rate, sizes, crop and order.
        tracks: the features that are read.
        verify: whether to read every shard and compare its SHA-256 with the index.

    Raises:
        InputError: not a whole pack, a shard of another size than its index says, a pack made with
            another rate or other sizes, or what `Clips` raises.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: DataConfig,
        tracks: Iterable[Track],
        *,
        verify: bool = False,
    ) -> None:
        folder, tracks = Path(folder), tuple(tracks)
        self.index = read_index(folder / PACK, PACK_KEYS)
        check_config(folder / PACK, self.index, config)
        self._maps: list[np.ndarray] = []
        ids: list[str] = []
        sources: list[str] = []
        shards: list[int] = []
        places: list[np.ndarray] = []
        levels: list[tuple[float, float]] = []
        for number, name in enumerate(self.index["shards"]):
            index = read_shard(folder, name)
            tar = folder / f"{name}.tar"
            if verify and (found := sha256(tar)) != index["sha256"]:
                raise InputError(f"{tar}: its SHA-256 is {found}; wanted {index['sha256']}")
            self._maps.append(np.memmap(tar, np.uint8, "r"))
            places.append(_places(folder / f"{name}.json", index, tracks))
            ids += [clip["id"] for clip in index["clips"]]
            sources += [clip["source"] for clip in index["clips"]]
            shards += [number] * len(index["clips"])
            levels += [clip["level"] for clip in index["clips"]]
        # (clips, members, 3): byte offset, number of the dtype, rows; all 0 for what is missing.
        self._places = np.concatenate(places)
        self._levels = np.array(levels)  # (clips, 2) float64: mean square, peak
        self._shard_of = shards
        super().__init__(folder, config, tracks, ids, sources, shards)

    def recording(self, index: int) -> Recording:
        data = self._maps[self._shard_of[index]]
        (offset, dtype, samples), *places = self._places[index].tolist()
        wave = np.ndarray((samples,), DTYPES[dtype], data, offset)
        features = {}
        for track, (offset, dtype, rows) in zip(self.tracks, places, strict=True):
            if rows:
                shape = (rows, track.width)
                features[track.key] = np.ndarray(shape, DTYPES[dtype], data, offset)
        return Recording(wave, features, Level(*self._levels[index].tolist()))


def read_index(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads an index file of a pack.

    Raises:
        InputError: missing, unreadable, of another version, or without one of `keys`.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, wanted a whole pack; pack it again") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    found = index.get("schema") if isinstance(index, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: its schema is {found}; wanted {SCHEMA}")
    if missing := [key for key in keys if key not in index]:
        raise InputError(f"{path}: no {', '.join(missing)}; wanted an index of a pack")
    return index


def read_shard(folder: Path, name: str) -> dict[str, Any]:
    """Reads a shard's index and compares the shard's size with it.

    Raises:
        InputError: either is missing or unreadable, or the sizes differ.
    """
    index, tar = read_index(folder / f"{name}.json", SHARD_KEYS), folder / f"{name}.tar"
    size = tar.stat().st_size if tar.is_file() else None
    if size != index["bytes"]:
        found = "missing" if size is None else f"{size} bytes long"
        raise InputError(f"{tar}: {found}; its index wants {index['bytes']} bytes")
    return index


def check_config(path: Path, index: dict[str, Any], config: DataConfig) -> None:
    """Checks that a pack, whose index was read from `path`, has the rate and sizes of `config`.

    Raises:
        InputError: the pack was made with another rate or other sizes than `config` has.
    """
    for key in config.PACK_KEYS:
        found, wanted = index["config"].get(key), getattr(config, key)
        if found != wanted:
            raise InputError(
                f"{path}: packed with data.{key} {found}, wanted {wanted}; pack the table into "
                "another folder"
            )


def _places(path: Path, index: dict[str, Any], tracks: tuple[Track, ...]) -> np.ndarray:
    """Where the arrays of a shard's clips lie, (clips, members, 3) int64: the sound, each track."""
    widths: dict[str, list[int]] = {WAVE: [], **{track.name: [track.width] for track in tracks}}
    members = list(widths)
    places = np.zeros((len(index["clips"]), len(members), 3), np.int64)
    for clip, row in zip(index["clips"], places, strict=True):
        for name in clip["arrays"].keys() & widths.keys():
            array, wanted = clip["arrays"][name], widths[name]
            offset, dtype, (rows, *width) = array["offset"], array["dtype"], array["shape"]
            end = offset + rows * int(np.prod(width)) * np.dtype(dtype).itemsize
            good = dtype in DTYPES and width == wanted and rows > 0 and end <= index["bytes"]
            if not good or offset % np.dtype(dtype).itemsize:
                raise InputError(f"{path}: {name} of clip {clip['id']} cannot be {array}")
            row[members.index(name)] = offset, DTYPES.index(dtype), rows
    return places
