"""The training set: a CSV of clips, each a wav and a file of features; its order; its batches."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wavflow.config import DataConfig
from wavflow.data.manifest import ReportRow, Row, read_manifest, write_report
from wavflow.errors import InputError

log = logging.getLogger("wavflow")

COLUMNS = ("id", "audio_path", "features_path", "video_exist", "text_exist")
VIDEO_KEYS = ("clip_features", "sync_features")
TEXT_KEYS = ("text_features",)

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """One clip: wave (t,) float32 at the configured rate; a feature is None where it is missing."""

    id: str
    wave: Tensor
    features: dict[str, Tensor]

    @property
    def has_video(self) -> bool:
        return VIDEO_KEYS[0] in self.features

    @property
    def has_text(self) -> bool:
        return TEXT_KEYS[0] in self.features

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.wave, *self.features.values()))


@dataclass(frozen=True)
class ClipBatch:
    """Clips side by side: waves zero-padded on the right, absent features zero.

    Shapes: wave (b t), lengths (b,) int64, features[key] (b rows width), has_video and has_text
    (b,) bool.
    """

    ids: list[str]
    wave: Tensor
    lengths: Tensor
    features: dict[str, Tensor]
    has_video: Tensor
    has_text: Tensor


def read_features(
    path: str | os.PathLike[str], shapes: dict[str, tuple[int, int]], keys: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Reads a features file: those of the named keys that it holds, float32.

    Args:
        path: a `.pth` dict.
        shapes: key -> (rows, width) wanted.
        keys: the keys that must be there.

    Raises:
        InputError: missing or unreadable file, missing key, wrong shape, non-finite value;
            names the file, the key, what was found and what was wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such features file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds, from EOFError to KeyError
        raise InputError(f"{path}: not a readable features file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a dict of features, found {type(content).__name__}")
    for key in keys:
        if key not in content:
            found = ", ".join(map(str, content)) or "nothing"
            raise InputError(f"{path}: no {key}, found {found}")
    features = {}
    for key, shape in shapes.items():
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {key} is a {type(value).__name__}; wanted a tensor")
        if tuple(value.shape) != shape:
            raise InputError(f"{path}: {key} is {tuple(value.shape)}; wanted {shape}")
        value = value.float()
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {key} holds non-finite values")
        features[key] = value
    return features


class ClipDataset:
    """Clips listed in a CSV (id, audio_path, features_path, video_exist, text_exist).

    Every row is read once when the set is opened: rows that cannot be used are left out, named
    in one warning each and in `report`. What is read stays in memory up to `config.cache_mb`.
    A modality whose flag is 0 is missing, whatever the file holds.

    Raises:
        InputError: a missing file or column, or no usable row.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike[str],
        config: DataConfig,
        *,
        report: str | os.PathLike[str] | None = None,
        workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path = Path(csv_path)
        self.config = config
        self._room = config.cache_mb * 2**20
        self._cache: dict[str, Clip] = {}
        self._lock = threading.Lock()
        manifest = read_manifest(csv_path, COLUMNS, data_root=config.data_root)
        outcome = {e.row_number: ReportRow(e.id, "skipped", str(e)) for e in manifest.errors}
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for done, (row, problem) in enumerate(
                zip(manifest, pool.map(self._problem, manifest), strict=True), 1
            ):
                status = "skipped" if problem else "ok"
                outcome[row.number] = ReportRow(row.id, status, problem or "")
                if progress is not None:
                    progress(done, len(manifest))
        self.rows = [row for row in manifest if outcome[row.number].status == "ok"]
        self.skipped = [r for _, r in sorted(outcome.items()) if r.status != "ok"]
        if report is not None:
            write_report(report, [r for _, r in sorted(outcome.items())])
        for bad in self.skipped:
            log.warning("%s: %s skipped: %s", self.path, bad.id, bad.reason)
        if not self.rows:
            raise InputError(f"{self.path}: no usable row; the first: {self.skipped[0].reason}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        row = self.rows[index]
        return self._cache.get(row.id) or self._read(row)

    def id(self, index: int) -> str:
        """Id of the clip at `index`, without reading it."""
        return self.rows[index].id

    def batch(self, indices: Iterable[int]) -> ClipBatch:
        """The clips at `indices` side by side."""
        return collate([self[i] for i in indices], self.config.feature_shapes)

    def fingerprint(self) -> str:
        """Changes when the usable clips or their order in the file change."""
        return hashlib.sha256("\0".join(row.id for row in self.rows).encode()).hexdigest()

    def _problem(self, row: Row) -> str | None:
        try:
            self._read(row)
        except InputError as error:
            return f"row {row.number}: {error}"
        return None

    def _read(self, row: Row) -> Clip:
        from wavflow.audio import is_silent, load_audio

        wave = load_audio(row.audio_path, self.config.target_sample_rate)
        if is_silent(wave):
            raise InputError(f"{row.audio_path}: the audio is silent")
        keys = VIDEO_KEYS * row.video_exist + TEXT_KEYS * row.text_exist
        shapes = {key: self.config.feature_shapes[key] for key in keys}
        features = read_features(row.features_path, shapes, keys) if keys else {}
        clip = Clip(row.id, wave, features)
        with self._lock:
            if row.id not in self._cache and clip.nbytes <= self._room:
                self._room -= clip.nbytes
                self._cache[row.id] = clip
        return clip


def collate(clips: list[Clip], shapes: dict[str, tuple[int, int]]) -> ClipBatch:
    """Puts clips side by side."""
    lengths = torch.tensor([clip.wave.numel() for clip in clips])
    wave = torch.zeros(len(clips), int(lengths.max()))
    for row, clip in zip(wave, clips, strict=True):
        row[: clip.wave.numel()] = clip.wave
    features = {}
    for key, shape in shapes.items():
        features[key] = torch.stack([clip.features.get(key, torch.zeros(shape)) for clip in clips])
    return ClipBatch(
        ids=[clip.id for clip in clips],
        wave=wave,
        lengths=lengths,
        features=features,
        has_video=torch.tensor([clip.has_video for clip in clips]),
        has_text=torch.tensor([clip.has_text for clip in clips]),
    )


@dataclass(frozen=True)
class Work:
    """One step's share of an epoch: which clips, in which order."""

    epoch: int
    step: int
    indices: list[int]


def steps_per_epoch(items: int, batch_size: int) -> int:
    """Whole batches in an epoch; the rest is left out, and differs from epoch to epoch."""
    return max(items // batch_size, 1)


def plan(items: int, batch_size: int, seed: int, epoch: int, step: int) -> Iterator[Work]:
    """Batches without end from (epoch, step) on. The order depends on (seed, epoch) alone."""
    count = steps_per_epoch(items, batch_size)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(items, generator=generator).tolist()
        for at in range(step, count):
            yield Work(epoch, at, order[at * batch_size : (at + 1) * batch_size])
        epoch, step = epoch + 1, 0


def prefetch(
    load: Callable[[Work], T], work: Iterable[Work], workers: int, ahead: int
) -> Iterator[tuple[Work, T]]:
    """Loads in `workers` threads up to `workers * ahead` batches early, in order; 0 = no thread."""
    if workers == 0:
        for item in work:
            yield item, load(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="wavflow-data")
    pending: deque[tuple[Work, Any]] = deque()
    try:
        for item in work:
            pending.append((item, pool.submit(load, item)))
            if len(pending) > workers * ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
