"""One recording as it is kept, and how it is read from a sound file and a file of features."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import load_tensors
from wavflow.config.schema import DataConfig
from wavflow.data.crop import Grid
from wavflow.data.manifest import Row, needed
from wavflow.data.tracks import Track
from wavflow.media.audio import SILENCE_PEAK, SoundFile, is_seekable_sound, load_audio

# An int16 sample over 32768 is a float32 sample, exactly.
INT16_STEP = np.float32(2.0**-15)
# Length, in windows, up to which a recording is read, and cached, whole. Of longer ones windows are
# read.
WHOLE_WINDOWS = 4
# Samples that are measured at a time.
_BLOCK = 2**20

log = logging.getLogger("wavflow")


@dataclass(frozen=True)
class Level:
    """How loud a recording is: mean square and largest magnitude of all its samples."""

    mean_square: float
    peak: float


def measure(wave: np.ndarray | SoundFile) -> Level:
    """The level of a wave (t,) float32, in memory that does not grow with its length."""
    total, peak = 0.0, 0.0
    for start in range(0, wave.size, _BLOCK):
        block = wave[start : start + _BLOCK]
        total += float(np.square(block, dtype=np.float64).sum())
        peak = max(peak, float(np.abs(block).max()))
    return Level(total / wave.size, peak)


@dataclass(frozen=True)
class Recording:
    """A recording, or a window of one, as it is kept: arrays that nobody writes to.

    Attributes:
        wave: (t,) float32, or int16 that stands for steps of 1/32768. A file is read where it is
            sliced.
        features: float32 or float16 (rows, width), by key; all rows of the recording, or the
            window's.
        level: level of the whole recording.
    """

    wave: np.ndarray | SoundFile
    features: dict[str, np.ndarray]
    level: Level

    @property
    def nbytes(self) -> int:
        assert isinstance(self.wave, np.ndarray)  # a file is not kept in memory
        return self.wave.nbytes + sum(value.nbytes for value in self.features.values())

    @property
    def rows(self) -> dict[str, int]:
        """How many rows the features have, by key."""
        return {key: len(value) for key, value in self.features.items()}

    def write_wave(self, out: np.ndarray) -> None:
        """Writes the wave into `out`, (t,) float32."""
        assert isinstance(self.wave, np.ndarray)  # as a file's windows are
        if self.wave.dtype == np.int16:
            np.multiply(self.wave, INT16_STEP, out=out)
        else:
            np.copyto(out, self.wave)


class RowReader:
    """Reads the recording of a CSV's row: its audio at the configured rate, all its features.

    Where windows are what is wanted (`DataConfig.by_windows`), long recordings in wav and flac
    files stay on the disk, as do their features: slices of them are read.

    Args:
        config: rate and duration of a clip, and how recordings are cropped.
        tracks: the features that are read.

    Raises:
        InputError: as `Grid` raises.
    """

    def __init__(self, config: DataConfig, tracks: Iterable[Track]) -> None:
        self.config, self.tracks = config, tuple(tracks)
        self.grid = Grid(config, self.tracks)

    def is_long(self, samples: int) -> bool:
        """Whether windows of a recording of so many samples are read, and it is not cached."""
        return self.config.by_windows and samples > WHOLE_WINDOWS * self.config.samples

    def __call__(self, row: Row, level: Level | None = None) -> Recording:
        """Reads the recording of a row.

        Args:
            row: the row of the table.
            level: the level that an earlier call found. A long recording is then not read through
                again.

        Raises:
            InputError: a file is missing or unreadable, the audio is silent, features are missing,
                of a wrong size or not finite.
        """
        wave = self._wave(needed(row.audio_path), first=level is None)
        known, level = level is not None, level or measure(wave)
        if not known and isinstance(wave, SoundFile):
            wave.phase.check(wave.path, wave.size)
        if level.peak <= SILENCE_PEAK:
            raise InputError(f"{row.audio_path}: the audio is silent")
        # Of features that lie in time all rows are read, however long the recording is.
        shapes = {
            track.key: (track.rows if track.timing is None else None, track.width)
            for track in self.tracks
            if row.has(track.flag)
        }
        features = {}
        if shapes:
            mapped = self.is_long(wave.size)
            features = _read_arrays(
                needed(row.features_path), shapes, shapes, mapped=mapped, finite=mapped and known
            )
        recording = Recording(wave, features, level)
        self.grid.check(row.features_path, recording.rows)
        return recording

    def _wave(self, path: Path, *, first: bool) -> np.ndarray | SoundFile:
        rate = self.config.target_sample_rate
        if self.config.by_windows and is_seekable_sound(path):
            file = SoundFile(path, rate)
            if self.is_long(file.size) and file.agrees:
                return file
        wave = load_audio(path, rate).numpy()
        if first and self.is_long(wave.size):
            wanted = "a pack, or .wav or .flac of a common rate"
            log.warning("%s: read whole for every window; wanted %s", path, wanted)
        return wave


def source(row: Row) -> str:
    """The row's cell in the column `source`, "" without one."""
    return row.fields.get("source", "").strip()


def read_features(
    path: str | os.PathLike[str], shapes: dict[str, tuple[int, int]], keys: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Reads a features file: those of the keys of `shapes` that it holds, float32.

    Args:
        path: a `.pth` dict.
        shapes: key -> (rows, width) wanted.
        keys: the keys that must be there.

    Raises:
        InputError: missing or unreadable file, missing key, wrong shape, non-finite value;
            names the file, the key, what was found and what was wanted.
    """
    arrays = _read_arrays(path, shapes, keys)
    return {key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays.items()}


def _read_arrays(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int | None, int]],
    keys: Iterable[str],
    *,
    mapped: bool = False,
    finite: bool = False,
) -> dict[str, np.ndarray]:
    """Like `read_features`; float16 stays, and rows of None are any number above 0.

    `mapped` arrays are read where they are touched; those known to be `finite` are not looked at.
    """
    path = Path(path)
    content = load_tensors(path, "features file", mapped=mapped)
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a dict of features, found {type(content).__name__}")
    for key in keys:
        if key not in content:
            found = ", ".join(map(str, content)) or "nothing"
            raise InputError(f"{path}: no {key}, found {found}")
    features = {}
    for key, (rows, width) in shapes.items():
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InputError(f"{path}: {key} is a {type(value).__name__}; wanted a dense tensor")
        if value.nbytes > value.untyped_storage().nbytes():  # one number may stand for millions
            raise InputError(f"{path}: {key} repeats its numbers; wanted every one written out")
        shape = tuple(value.shape)
        if len(shape) != 2 or not shape[0] or shape != (rows or shape[0], width):
            wanted = f"({rows or 'rows'}, {width})"
            raise InputError(f"{path}: {key} is {shape}; wanted {wanted}")
        features[key] = _array(value)
        if not finite and not np.isfinite(features[key]).all():
            raise InputError(f"{path}: {key} holds non-finite values")
    return features


def _array(value: Tensor) -> np.ndarray:
    """A tensor as float32, or as float16 if it is that."""
    value = value.detach()
    if value.dtype == torch.bfloat16:  # the upper half of a float32; numpy has no such type
        bits = value.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return (bits << 16).view(np.float32)
    array = value.numpy()
    return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)
