"""The training set: clips that are read by index, and a CSV that lists them."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.config.schema import DataConfig
from wavflow.data.crop import Grid
from wavflow.data.manifest import Manifest, ReportRow, Row, read_manifest, write_report
from wavflow.data.order import Order
from wavflow.data.recording import Level, Recording, RowReader, source
from wavflow.data.tracks import Track, columns, flags, present

log = logging.getLogger("wavflow")

Same = TypeVar("Same", bound="Clips")


@dataclass(frozen=True)
class Clip:
    """One clip: wave (t,) float32 at the configured rate; missing features have no key."""

    id: str
    wave: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class ClipBatch:
    """Clips side by side: waves zero-padded on the right, absent features zero.

    Attributes:
        ids: the clips' ids.
        wave: (b t) float32.
        lengths: (b,) int64, length of each wave in samples.
        features: (b rows width) float32, by a track's key.
        present: (b,) bool, whether a clip has the features of a flag ("video", "text").
        levels: (b 2) float32, mean square and peak of the clips' recordings; None where clips are
            lifted by their own.
    """

    ids: list[str]
    wave: Tensor
    lengths: Tensor
    features: dict[str, Tensor]
    present: dict[str, Tensor]
    levels: Tensor | None = None

    def pin_memory(self) -> ClipBatch:
        """The same batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> ClipBatch:
        """The same batch on a device; a copy from page-locked memory is not waited for."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ClipBatch:
        return ClipBatch(
            ids=self.ids,
            wave=function(self.wave),
            lengths=function(self.lengths),
            features={key: function(value) for key, value in self.features.items()},
            present={flag: function(value) for flag, value in self.present.items()},
            levels=None if self.levels is None else function(self.levels),
        )


@dataclass(frozen=True)
class Loaded:
    """A batch, and why clips in it could not be read, by their place.

    Such a clip's row is one sample of silence without features.
    """

    batch: ClipBatch
    problems: dict[int, str]


class Clips(ABC):
    """Clips by index: what the trainer reads, wherever the recordings are.

    Batches are filled by numpy: torch would start OpenMP threads beside each loader thread, and
    they slow down a training step on the CPU.

    Args:
        path: where the clips come from, for messages.
        config: crop, order and sizes.
        tracks: the features that are read.
        ids: the clips' ids.
        sources: the clips' sources, "" for none.
        shards: number of each clip's shard; None where there are no shards.

    Raises:
        InputError: `source_weights` names another set of sources; random crops of sizes that
            allow none; `shuffle` is "shards" and there are no shards.
    """

    def __init__(
        self,
        path: Path,
        config: DataConfig,
        tracks: Iterable[Track],
        ids: Sequence[str],
        sources: Sequence[str],
        shards: Sequence[int] | None = None,
    ) -> None:
        self.path, self.config, self.tracks = path, config, tuple(tracks)
        self.ids, self._sources, self._shards = list(ids), list(sources), shards
        self.grid = Grid(config, self.tracks)
        if config.shuffle == "shards" and shards is None:
            raise InputError(f"{path}: data.shuffle is shards; wanted a folder of `wavflow pack`")
        if config.source_weights is not None:
            self._check_sources(config.source_weights.keys())

    @abstractmethod
    def recording(self, index: int) -> Recording:
        """The whole recording of the clip at `index`.

        Raises:
            InputError: it cannot be read.
        """

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Clip:
        """The first window at `index`; its wave is the whole one where that is lifted by itself."""
        window = self._first(self.recording(index))
        wave = np.empty(window.wave.size, np.float32)
        window.write_wave(wave)
        features = {
            key: torch.from_numpy(value.astype(np.float32))
            for key, value in window.features.items()
        }
        return Clip(self.ids[index], torch.from_numpy(wave), features)

    def id(self, index: int) -> str:
        """Id of the clip at `index`, without reading it."""
        return self.ids[index]

    def order(self, seed: int) -> Order:
        """The order of a run's examples; every source gets its share of `source_weights`."""
        sources: dict[str, list[int]] = {}
        for index, name in enumerate(self._sources):
            sources.setdefault(name, []).append(index)
        weights = self.config.source_weights
        if weights is not None:
            weights = {name: weights[name] for name in sources}
            if not any(weights.values()):
                raise InputError(f"{self.path}: data.source_weights gives no share to any clip")
        shards = self._shards if self.config.shuffle == "shards" else None
        return Order(seed, sources, weights, shards=shards, group=self.config.shuffle_shards)

    def load(self, indices: Sequence[int], draw: Draw) -> Loaded:
        """The clips at `indices` side by side, cropped by `draw`, their examples' randomness.

        With `crop` "first" and `lift` "clip" waves are whole, for their loudness, and features
        those of the first window. Else a longer recording gives one window, and what fills up its
        last token. A clip that cannot be read is a problem, not an error. Called from loader
        threads.
        """
        windows: dict[int, Recording] = {}
        problems: dict[int, str] = {}
        chance = draw.uniform("crop").tolist() if self.config.crop == "random" else None
        for place, index in enumerate(indices):
            try:
                recording = self.recording(index)
                if chance is None:
                    windows[place] = self._first(recording)
                else:
                    windows[place] = self._random(recording, chance[place])
            except InputError as error:
                problems[place] = str(error)
        return Loaded(self._batch([self.ids[i] for i in indices], windows), problems)

    def fingerprint(self) -> str:
        """A hash that changes with the usable clips, their sources and their order in the file."""
        lines = (f"{id}\0{source}\n" for id, source in zip(self.ids, self._sources, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def subset(self: Same, count: int) -> Same:
        """The same set with its first `count` clips alone."""
        if count < 1:
            raise ValueError(f"a subset of {count} clips; wanted at least 1")
        few = copy.copy(self)
        few.ids, few._sources = self.ids[:count], self._sources[:count]
        return few

    def _batch(self, ids: list[str], windows: dict[int, Recording]) -> ClipBatch:
        count = len(ids)
        lengths = np.ones(count, np.int64)
        there = {flag: np.zeros(count, bool) for flag in flags(self.tracks)}
        levels = np.zeros((count, 2), np.float32)
        for place, window in windows.items():
            lengths[place] = window.wave.size
            for flag in present(self.tracks, window.features):
                there[flag][place] = True
            levels[place] = window.level.mean_square, window.level.peak
        wave = np.zeros((count, lengths.max(initial=1)), np.float32)
        features = {track.key: np.zeros((count, *track.shape), np.float32) for track in self.tracks}
        for place, window in windows.items():
            window.write_wave(wave[place, : window.wave.size])
            for key, value in window.features.items():
                np.copyto(features[key][place], value)
        return ClipBatch(
            ids=ids,
            wave=torch.from_numpy(wave),
            lengths=torch.from_numpy(lengths),
            features={key: torch.from_numpy(value) for key, value in features.items()},
            present={flag: torch.from_numpy(value) for flag, value in there.items()},
            levels=torch.from_numpy(levels) if self.config.lift == "recording" else None,
        )

    def _first(self, recording: Recording) -> Recording:
        stop = self.config.read_samples if self.config.by_windows else None
        features = {
            track.key: recording.features[track.key][: track.rows]
            for track in self.tracks
            if track.key in recording.features
        }
        return Recording(recording.wave[:stop], features, recording.level)

    def _random(self, recording: Recording, chance: float) -> Recording:
        """The window that `chance`, in (0, 1), picks."""
        place = self.grid.pick(chance, recording.wave.size, recording.rows)
        features = {}
        for track in self.tracks:
            if track.key in recording.features:
                row = place.rows.get(track.key, 0)
                features[track.key] = recording.features[track.key][row : row + track.rows]
        stop = place.sample + self.config.read_samples
        return Recording(recording.wave[place.sample : stop], features, recording.level)

    def _check_sources(self, weighted: Iterable[str]) -> None:
        there, weighted = set(self._sources), set(weighted)
        if there != weighted:
            unknown, missing = sorted(weighted - there), sorted(there - weighted)
            said = [f"no clip is of {', '.join(map(repr, unknown))}"] * bool(unknown)
            said += [f"no share for {', '.join(map(repr, missing))}"] * bool(missing)
            raise InputError(f"{self.path}: data.source_weights: {'; '.join(said)}")


class ClipDataset(Clips):
    """Clips listed in a CSV: id, audio_path, features_path, video_exist, text_exist, [source].

    Columns that only tracks need may be missing without tracks (`wavflow.data.tracks.columns`).
    Every row is read once when the set is opened: rows that cannot be used are left out, named
    in one warning each and in `report`. What is read whole stays in memory up to `config.cache_mb`.
    A modality whose flag is 0 is missing, whatever the file holds.

    Args:
        csv_path: the table of clips.
        config: rate, sizes, crop and order.
        tracks: the features that are read.
        report: a CSV to write: what became of every row.
        workers: threads that read.
        progress: called with (rows read, rows in all).

    Raises:
        InputError: a missing file or column, no usable row, or what `Clips` raises.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike[str],
        config: DataConfig,
        tracks: Iterable[Track],
        *,
        report: str | os.PathLike[str] | None = None,
        workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        tracks = tuple(tracks)
        manifest = read_manifest(csv_path, columns(tracks), data_root=config.data_root)
        self._room = config.cache_mb * 2**20
        self.cached: dict[str, Recording] = {}
        self._levels: dict[str, Level] = {}
        self._lock = threading.Lock()
        self._read = RowReader(config, tracks)
        self._rows = list(manifest)
        outcome = unusable(manifest)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            problems = pool.map(self._problem, range(len(manifest)))
            for done, (row, problem) in enumerate(zip(manifest, problems, strict=True), 1):
                status = "skipped" if problem else "ok"
                outcome[row.number] = ReportRow(row.id, status, problem or "")
                if progress is not None:
                    progress(done, len(manifest))
        rows = [outcome[number] for number in sorted(outcome)]
        if report is not None:
            write_report(report, rows)
        refuse_none(manifest.path, rows)
        self._rows = [row for row in manifest if outcome[row.number].status == "ok"]
        ids = [row.id for row in self._rows]
        sources = [source(row) for row in self._rows]
        super().__init__(manifest.path, config, tracks, ids, sources)

    def recording(self, index: int) -> Recording:
        row = self._rows[index]
        return self.cached.get(row.id) or self._keep(row)

    def _problem(self, index: int) -> str | None:
        row = self._rows[index]
        try:
            self._keep(row)
        except InputError as error:
            return f"row {row.number}: {error}"
        return None

    def _keep(self, row: Row) -> Recording:
        recording = self._read(row, self._levels.get(row.id))
        with self._lock:
            self._levels[row.id] = recording.level
            if row.id in self.cached or self._read.is_long(recording.wave.size):
                return recording
            if recording.nbytes <= self._room:
                self._room -= recording.nbytes
                self.cached[row.id] = recording
        return recording


def unusable(manifest: Manifest) -> dict[int, ReportRow]:
    """Reports on the rows that the table itself makes unusable, by row number."""
    return {e.row_number: ReportRow(e.id, "skipped", str(e)) for e in manifest.errors}


def refuse_none(path: Path, report: Iterable[ReportRow]) -> None:
    """Warns of every row that is skipped.

    Raises:
        InputError: all rows are skipped.
    """
    report = list(report)
    skipped = [row for row in report if row.status == "skipped"]
    for bad in skipped:
        log.warning("%s: %s skipped: %s", path, bad.id, bad.reason)
    if len(skipped) == len(report):
        raise InputError(f"{path}: no usable row; the first: {skipped[0].reason}")
