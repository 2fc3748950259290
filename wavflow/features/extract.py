"""Turning a table of videos and captions into feature files and the table that training reads.

`<out>/features/<id>.pth`, or `<pth_dir>/<id>.pth` of a configuration, is a dict with some of
clip_features, sync_features and text_features (float32), `seconds`, the length of a video that was
encoded whole, `source`, what they were made from and with, and `wavflow`, the version that wrote
it. A file whose source still matches is kept, so that an interrupted job goes on where it stopped.
Many processes may share a table and a folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavflow.base import processes
from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, load_tensors, locked, working_in
from wavflow.base.version import __version__
from wavflow.config.load import load_config
from wavflow.config.schema import Config, DataConfig, DecodingConfig, EncodersConfig
from wavflow.data.manifest import (
    ReportRow,
    Row,
    check_report,
    check_table,
    needed,
    read_manifest,
    write_csv,
    write_report,
)
from wavflow.data.recording import read_features
from wavflow.features import provenance
from wavflow.features.encode import (
    WHOLE,
    encode_captions,
    encode_video,
    encode_whole_video,
    load_encoders,
)
from wavflow.features.encoder import Encoders
from wavflow.features.index import Index

log = logging.getLogger("wavflow")

#: Columns of the table that is written.
COLUMNS = ("id", "audio_path", "features_path", "video_exist", "text_exist")


@dataclass(frozen=True)
class ExtractResult:
    """What became of a table, or of one shard of it.

    Attributes:
        csv: the table that training reads: the rows of all shards that have features.
        report: status and reason of every row of the shard.
        done, kept, failed: how many rows of the shard went each way.
        unfinished: shards that have not ended; until they have, rows may be missing in `csv`.
    """

    csv: Path
    report: Path
    done: int
    kept: int
    failed: int
    unfinished: int


def extract(
    csv_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    config: Config | str = "toy_8k",
    encoders: str | None = None,
    seconds: float | str | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractResult:
    """Encodes every row of a table and writes the table that training reads.

    Args:
        csv_path: a table of id, audio_path, caption; video_path, without which no row has a video;
            optional video_exist, text_exist and source, which goes into the training table.
        out: a folder; it gets features/<id>.pth, features.json (`wavflow.features.provenance`),
            <stem of csv_path>.csv and report.csv, of a shard report.<i>-of-<n>.csv.
        table: where the training table goes instead; the features then lie in `out` itself, and
            the table names them by absolute paths, as the public system's tables may.
        data_root: where relative paths of the table start, by default its folder.
        config: a `Config`, YAML file or preset; names the encoders, the seconds and the limits on
            decoding.
        encoders: name of the encoders, instead of the configuration's.
        seconds: length of each video that is encoded, instead of the configuration's; "whole" for
            all of it, in memory that does not grow with its length.
        shard: (i, n) with 0 <= i < n: one row of n, from row i on, while other processes take the
            others; default the rank and number of torchrun's processes. Each ends by writing the
            table of all rows that have features, in the order of `csv_path`: the last, all.
        overwrite: whether features of other encoders, weights or seconds are replaced.
        workers: number of rows worked on at a time, each video decoded in a process of its own;
            default one per core.
        progress: called with (rows finished, rows in all).

    Raises:
        InputError: the table cannot be read, a column is missing, unknown encoders or weights that
            cannot be had, a shard that cannot be, or features of other encoders, weights or seconds
            in `out`. A row that cannot be encoded raises nothing: it is left out and reported.
    """
    config = config if isinstance(config, Config) else load_config(config)
    model = config.model
    if not isinstance(model, EncodersConfig):
        raise InputError(
            f"system {config.system} has no encoders; wanted a configuration with model.encoders"
        )
    model = replace(model, encoders=encoders or model.encoders)
    seconds = seconds or config.extraction.duration_sec or config.data.audio_duration
    if isinstance(seconds, str) and seconds != WHOLE:
        raise InputError(f"seconds is {seconds!r}; wanted a number or {WHOLE}")
    part = _Shard(*(shard or processes.rank_and_size()))
    used = load_encoders(model)
    csv_path, out = Path(csv_path), Path(out)
    folder, target = out / "features", out / f"{csv_path.stem}.csv"
    if table is not None:
        folder, target = out.resolve(), Path(table)
    if target.resolve() == csv_path.resolve():
        raise InputError(f"{target}: the table written there would replace {csv_path}")
    check_table(target, COLUMNS, overwrite=overwrite)
    check_report(out / part.report, csv_path, overwrite=overwrite)
    manifest = read_manifest(csv_path, ("id", "audio_path", "caption"), data_root=data_root)
    if "video_path" not in manifest.columns:
        found = ", ".join(manifest.columns)
        log.warning("%s: no column 'video_path', found %s: captions alone", csv_path, found)
    mine = [row for row in manifest if row.number in part]
    cores = processes.own_cores()
    workers = max(1, min(cores if workers is None else workers, len(mine)))

    def described() -> dict[str, Any]:
        video, text = any(r.video_exist for r in manifest), any(r.text_exist for r in manifest)
        return provenance.describe(used, seconds, video=video, text=text)

    with (
        working_in(out, "features"),
        Index(out / "index", part.name) as index,
        ThreadPoolExecutor(workers) as pool,
    ):
        record = provenance.agree(out, described(), overwrite=overwrite)
        (out / part.report).unlink(missing_ok=True)  # where it is, the shard has ended
        job = _Job(folder, used, seconds, config.decoding, record, index)
        outcome = {
            e.row_number: ReportRow(e.id, "failed", str(e))
            for e in manifest.errors
            if e.row_number in part
        }
        todo = []
        for row, known in zip(mine, pool.map(job.known, mine), strict=True):
            if known is None:
                todo.append(row)
            else:
                outcome[row.number] = known
        finished = len(mine) - len(todo)
        if progress is not None:
            progress(finished, len(mine))
        _load(used, todo)
        # Facts about weights that were fetched just now are new.
        job = replace(job, record=provenance.save(out, described(), overwrite=overwrite))
        for row, result in _run(pool, job, todo, max(1, cores // workers)):
            outcome[row.number] = result
            finished += 1
            if progress is not None:
                progress(finished, len(mine))
        report = [row for _, row in sorted(outcome.items())]
        write_report(out / part.report, report)

        good = {row.number for row in mine if outcome[row.number].status != "failed"}
        with locked(out / provenance.RECORD):  # whoever comes last sees all
            index.refresh()
            others = [row for row in manifest if row.number not in part]
            noted = zip(others, pool.map(job.is_noted, others), strict=True)
            good |= {row.number for row, is_noted in noted if is_noted}
            listed = [row for row in manifest if row.number in good]
            _write_table(target, listed, "features" if table is None else folder, manifest.columns)
            unfinished = sum(not (out / each.report).exists() for each in part.all)
    kept = sum(row.status == "skipped" for row in report)
    failed = sum(row.status == "failed" for row in report)
    done = len(report) - kept - failed
    return ExtractResult(target, out / part.report, done, kept, failed, unfinished)


def extract_config(
    config: Config[Any, DataConfig],
    *,
    encoders: str | None = None,
    seconds: float | str | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractResult:
    """Extracts as a configuration says: from `data.csv_path`, whose relative paths start at
    `data.data_root`, to `<output.pth_dir>/<id>.pth` and the training table `output.csv_path`.

    Args:
        encoders, seconds, shard, overwrite, progress: as in `extract`.
        workers: instead of `extraction.num_workers`.

    Raises:
        InputError: one of the three paths is not set; as `extract`.
    """
    csv_path, folder, table = config.data.csv_path, config.output.pth_dir, config.output.csv_path
    if csv_path is None or folder is None or table is None:
        given = {"data.csv_path": csv_path, "output.pth_dir": folder, "output.csv_path": table}
        key = next(key for key, value in given.items() if value is None)
        raise InputError(f"{key} is not set in the configuration")
    return extract(
        csv_path,
        folder,
        table=table,
        data_root=config.data.data_root,
        config=config,
        encoders=encoders,
        seconds=seconds,
        shard=shard,
        overwrite=overwrite,
        workers=config.extraction.num_workers if workers is None else workers,
        progress=progress,
    )


def _load(encoders: Encoders, rows: list[Row]) -> None:
    """Loads, before anything is decoded, the weights that the rows need and no others."""
    if any(row.video_exist for row in rows):
        encoders.video.load()
    if any(row.text_exist for row in rows):
        encoders.text.load()


@dataclass(frozen=True)
class _Shard:
    """One of `count` parts of a table, that takes every count-th row."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise InputError(
                f"shard {self.number}/{self.count} does not exist; wanted 0/{max(self.count, 1)} "
                f"to {max(self.count, 1) - 1}/{max(self.count, 1)}"
            )

    def __contains__(self, row_number: int) -> bool:
        return (row_number - 2) % self.count == self.number  # row 1 is the header

    @property
    def name(self) -> str:
        return f"{self.number}-of-{self.count}"

    @property
    def report(self) -> str:
        return "report.csv" if self.count == 1 else f"report.{self.name}.csv"

    @property
    def all(self) -> list[_Shard]:
        return [_Shard(number, self.count) for number in range(self.count)]


@dataclass(frozen=True)
class _Job:
    """What all rows have in common. Its methods may be called from many threads."""

    folder: Path
    encoders: Encoders
    seconds: float | str
    limits: DecodingConfig
    record: dict[str, Any]
    index: Index

    def path(self, row: Row) -> Path:
        return self.folder / f"{row.id}.pth"

    def known(self, row: Row) -> ReportRow | None:
        """What became of a row without encoding it; None where that is to be done."""
        try:
            source, path = self._source(row), self.path(row)
            if not self.index.knows(path, source):
                if not self._holds(path, source):
                    return None
                self.index.note(path, source)
        except InputError as error:
            return ReportRow(row.id, "failed", f"row {row.number}: {error}")
        return ReportRow(row.id, "skipped", "kept: made earlier from the same source")

    def is_noted(self, row: Row) -> bool:
        """Whether a process has noted the row's features in the index."""
        try:
            return self.index.knows(self.path(row), self._source(row))
        except InputError:  # its own shard reports it
            return False

    def encode(self, row: Row, threads: int) -> ReportRow:
        """Writes the row's features, decoding with that many threads."""
        try:
            source, path = self._source(row), self.path(row)
            features: dict[str, Tensor] = {}
            facts: dict[str, Any] = {}
            if row.video_exist:
                video, options = needed(row.video_path), (self.limits, threads)
                if isinstance(self.seconds, str):  # WHOLE
                    features, facts["seconds"] = encode_whole_video(self.encoders, video, *options)
                else:
                    features = encode_video(self.encoders, video, self.seconds, *options)
            if row.text_exist:
                features |= encode_captions(self.encoders, [row.caption])[0]
            for key, value in features.items():
                if not value.isfinite().all():
                    raise InputError(f"{key} of the encoders hold non-finite values")
                features[key] = value.float().contiguous().clone()
            facts |= {"source": source, "wavflow": __version__}
            with atomic_write(path, durable=False) as file:
                torch.save(features | facts, file)
            self.index.note(path, source)
        except InputError as error:
            return ReportRow(row.id, "failed", f"row {row.number}: {error}")
        except Exception as error:  # one row must not take the batch along
            return ReportRow(row.id, "failed", f"row {row.number}: {type(error).__name__}: {error}")
        return ReportRow(row.id, "ok")

    def _source(self, row: Row) -> dict[str, Any]:
        """What the row's features are made from, and with."""
        if not needed(row.audio_path).is_file():
            raise InputError(f"{row.audio_path}: no such audio file")
        source = {key: self.record[key] for key in ("encoders", "seconds")}
        if row.video_exist:
            if row.video_path is None:
                raise InputError("video_exist is 1 and there is no video_path")
            if not row.video_path.is_file():
                raise InputError(f"{row.video_path}: no such video file")
            stat = row.video_path.stat()
            source["video"] = self.record["video"]
            source["video_file"] = f"{row.video_path.name} {stat.st_size} {stat.st_mtime_ns}"
        if row.text_exist:
            source["text"] = self.record["text"]
            source["caption"] = row.caption
        return source

    def _holds(self, path: Path, source: dict[str, Any]) -> bool:
        """Whether a features file is whole and of that source, by reading it."""
        facts = {**source.get("video", {}), **source.get("text", {})}
        keys = (*self.encoders.video.keys, self.encoders.text.key)
        shapes = {key: tuple(facts[key]) for key in keys if key in facts}
        try:
            read_features(path, shapes, shapes)
        except InputError:
            return False
        return load_tensors(path, "features file").get("source") == source


def _run(
    pool: ThreadPoolExecutor, job: _Job, rows: list[Row], threads: int
) -> Iterator[tuple[Row, ReportRow]]:
    """Encodes rows; yields each with what became of it, as they are done."""
    try:
        futures = {pool.submit(job.encode, row, threads): row for row in rows}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _write_table(
    path: Path, rows: Iterable[Row], folder: str | Path, columns: Iterable[str]
) -> None:
    more = [name for name in ("source",) if name in columns]
    cells = (
        {
            "id": row.id,
            "audio_path": needed(row.audio_path).resolve(),
            "features_path": f"{folder}/{row.id}.pth",
            "video_exist": row.video_exist,
            "text_exist": row.text_exist,
            **{name: row.fields[name] for name in more},
        }
        for row in rows
    )
    write_csv(path, cells, [*COLUMNS, *more])
