"""Packing a table of files into shards (`wavflow.data.shards`)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wavflow.base.errors import InputError
from wavflow.base.files import (
    alone_in,
    atomic_write,
    check_folder,
    remove_temporary,
    sha256,
    write_json,
)
from wavflow.config.schema import DataConfig
from wavflow.data.dataset import refuse_none, unusable
from wavflow.data.manifest import (
    Manifest,
    ReportRow,
    Row,
    check_report,
    read_manifest,
    write_report,
)
from wavflow.data.prefetch import prefetch
from wavflow.data.recording import Recording, RowReader, source
from wavflow.data.shards import (
    PACK,
    PACK_KEYS,
    SCHEMA,
    WAVE,
    check_config,
    read_index,
    read_shard,
)
from wavflow.data.tracks import FLAGS, Track, columns, present

# Recordings that a thread may read before the shard takes them.
AHEAD = 4

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackResult:
    """What became of a table: where its pack is, how many rows went each way."""

    folder: Path
    report: Path
    done: int
    failed: int


def pack(
    csv_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: DataConfig,
    tracks: Iterable[Track],
    *,
    shard_mb: int = 512,
    workers: int = 2,
    progress: Progress | None = None,
) -> PackResult:
    """Packs the clips of a training table into the shards of the folder `out`.

    Audio is decoded and resampled to `target_sample_rate`, once; it is stored as int16 where that
    is exact, else as float32. Training from the pack is equal to training from the files, bit for
    bit. An interrupted job goes on after its last whole shard; a whole pack is left as it is. Rows
    that cannot be used are left out; `out`/report.csv says why.

    Args:
        csv_path: a table of id, audio_path, features_path, video_exist, text_exist; optional
            source.
        out: the pack's folder.
        config: rate and sizes, and `data_root`.
        tracks: the features that are packed.
        shard_mb: a shard is closed when it has so many MB (2^20 bytes).
        workers: threads that read files.
        progress: called with (rows read, rows in all).

    Raises:
        InputError: the table cannot be read or has no usable row; `out` was begun with another
            table or other sizes; another process packs into `out`; `shard_mb` is below 1.
    """
    if shard_mb < 1:
        raise InputError(f"--shard-mb is {shard_mb}; wanted at least 1")
    out, tracks = Path(out), tuple(tracks)
    manifest = read_manifest(csv_path, columns(tracks), data_root=config.data_root)
    facts = {
        "schema": SCHEMA,
        "config": {key: getattr(config, key) for key in config.PACK_KEYS},
        "table": _fingerprint(manifest, config),
    }
    check_folder(out)
    check_report(out / "report.csv", csv_path)
    if (out / PACK).exists():
        whole = read_index(out / PACK, PACK_KEYS)
        _check_same(out / PACK, whole, facts, config)
    else:
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out, "to wait, or another folder"):
            whole = _Packer(manifest, out, config, tracks, facts).run(
                shard_mb * 2**20, workers, progress
            )
    outcome = {row.number: ReportRow(row.id, "ok") for row in manifest}
    outcome |= {number: ReportRow(id, "skipped", why) for number, id, why in whole["skipped"]}
    report = [row for _, row in sorted(outcome.items())]
    write_report(out / "report.csv", report)
    refuse_none(manifest.path, report)
    return PackResult(out, out / "report.csv", whole["clips"], len(whole["skipped"]))


class _Packer:
    """Writes the shards of a folder, from the first that is not there."""

    def __init__(
        self,
        manifest: Manifest,
        out: Path,
        config: DataConfig,
        tracks: tuple[Track, ...],
        facts: dict[str, Any],
    ) -> None:
        self.manifest, self.out, self.config, self.facts = manifest, out, config, facts
        self.read = RowReader(config, tracks)
        self.shards: list[str] = []
        self.clips = self.next = 0  # next: the first row that no shard has seen
        self.skipped: list[tuple[int, str, str]] = []  # row number, id, reason

    def run(self, limit: int, workers: int, progress: Progress | None) -> dict[str, Any]:
        """Writes what is missing; returns the content of pack.json."""
        remove_temporary(self.out)
        while (self.out / f"{self._name}.json").exists():
            index = read_shard(self.out, self._name)
            _check_same(self.out / f"{self._name}.json", index, self.facts, self.config)
            self.skipped += map(tuple, index["skipped"])
            self._count(index)
        rows = prefetch(self._read, self.manifest[self.next :], max(workers, 1), AHEAD)
        with contextlib.closing(rows):
            usable = self._usable(rows, progress)
            for first in usable:
                self._count(self._write_shard(itertools.chain([first], usable), limit))
        skipped = [(number, row.id, row.reason) for number, row in unusable(self.manifest).items()]
        whole = {
            **self.facts,
            "clips": self.clips,
            "shards": self.shards,
            "skipped": sorted(skipped + self.skipped),
        }
        if self.clips:
            write_json(self.out / PACK, whole)
        return whole

    @property
    def _name(self) -> str:
        return f"shard-{len(self.shards):06d}"

    def _count(self, index: dict[str, Any]) -> None:
        self.shards.append(self._name)
        self.clips += len(index["clips"])
        self.next = index["next"]

    def _read(self, row: Row) -> Recording | str:
        """Reads the row's recording; returns it, or why there is none."""
        try:
            return self.read(row)
        except InputError as error:
            return f"row {row.number}: {error}"

    def _usable(
        self, rows: Iterator[tuple[Row, Recording | str]], progress: Progress | None
    ) -> Iterator[tuple[int, Row, Recording]]:
        """Yields place in the table, row and recording where they can be used; notes the others."""
        for place, (row, recording) in enumerate(rows, self.next):
            if progress is not None:
                progress(place + 1, len(self.manifest))
            if isinstance(recording, Recording):
                yield place, row, recording
            else:
                self.skipped.append((row.number, row.id, recording))

    def _write_shard(
        self, clips: Iterator[tuple[int, Row, Recording]], limit: int
    ) -> dict[str, Any]:
        """Writes clips until the shard has `limit` bytes, then its index, which is returned."""
        entries = []
        path = self.out / f"{self._name}.tar"
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for place, row, recording in clips:
                following = place + 1
                entries.append(self._write_clip(tar, row, recording))
                if tar.offset >= limit:
                    break
        begun = self.manifest[self.next].number
        index = {
            **self.facts,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "next": following,
            "clips": entries,
            "skipped": [entry for entry in self.skipped if entry[0] >= begun],
        }
        write_json(self.out / f"{self._name}.json", index)
        return index

    def _write_clip(self, tar: tarfile.TarFile, row: Row, recording: Recording) -> dict[str, Any]:
        """Appends a clip's members; returns its entry in the index."""
        key = row.id.replace("%", "%25").replace(".", "%2E")
        arrays = {WAVE: _narrow(recording.wave[:])}
        arrays |= {
            track.name: recording.features[track.key]
            for track in self.read.tracks
            if track.key in recording.features
        }
        there = present(self.read.tracks, recording.features)
        places = {}
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            offset = _append(tar, f"{key}.{name}.npy", content.getvalue())
            places[name] = {
                "offset": offset + content.tell() - array.nbytes,
                "dtype": array.dtype.str,
                "shape": array.shape,
            }
        facts = {
            "id": row.id,
            "source": source(row),
            "caption": row.caption,
            **{f"{flag}_exist": flag in there for flag in FLAGS},
            "sample_rate": self.config.target_sample_rate,
            "samples": recording.wave.size,
        }
        _append(tar, f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())
        level = recording.level.mean_square, recording.level.peak
        return {"id": row.id, "source": source(row), "level": level, "arrays": places}


def _append(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Appends a member; returns where its content begins in the tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE)
    return tar.offset - blocks * tarfile.BLOCKSIZE


def _narrow(wave: np.ndarray) -> np.ndarray:
    """A float32 wave as int16 where that loses nothing."""
    steps = wave * np.float32(32768)
    narrow = np.clip(np.rint(steps), -32768, 32767).astype(np.int16)
    return narrow if np.array_equal(narrow, steps) else wave


def _fingerprint(manifest: Manifest, config: DataConfig) -> str:
    """A hash that changes with any cell of the table, and with where its paths lead."""
    digest = hashlib.sha256(repr((config.data_root, manifest.columns)).encode())
    for row in manifest:
        digest.update(repr(list(row.fields.items())).encode())
    for error in manifest.errors:
        digest.update(str(error).encode())
    return digest.hexdigest()


def _check_same(
    path: Path, index: dict[str, Any], facts: dict[str, Any], config: DataConfig
) -> None:
    check_config(path, index, config)
    if index["table"] != facts["table"]:
        raise InputError(
            f"{path}: packed from another table, or one that has changed since; pack this one "
            "into another folder"
        )
