"""From a table of videos and captions to feature files and the table that training reads.

`<out>/features/<id>.pth` is a dict with some of clip_features, sync_features and text_features
(float32), and `source`: what it was made from. A file whose source still matches is kept, so an
interrupted job goes on where it stopped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavflow.config import Config, DecodingConfig, ModelConfig, load_config
from wavflow.data.dataset import COLUMNS
from wavflow.data.manifest import ReportRow, Row, read_manifest, write_csv, write_report
from wavflow.data.recording import TEXT_KEYS, VIDEO_KEYS, read_features
from wavflow.errors import InputError
from wavflow.features import guard
from wavflow.features.base import Encoders, get_encoders
from wavflow.files import atomic_write, load_tensors


@dataclass(frozen=True)
class ExtractResult:
    """What became of a table: where its files are, how many rows went each way."""

    csv: Path
    report: Path
    done: int
    kept: int
    failed: int


@dataclass(frozen=True)
class _Job:
    row: Row
    path: Path
    model: ModelConfig
    seconds: float
    limits: DecodingConfig


def extract(
    csv_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: Config | str = "toy_8k",
    encoders: str | None = None,
    seconds: float | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractResult:
    """Encodes every row of a table and writes the table that training reads.

    Args:
        csv_path: columns id, audio_path, video_path, caption; optional video_exist, text_exist
            and source, which goes into the training table.
        out: gets features/<id>.pth, <stem of csv_path>.csv and report.csv.
        config: a `Config`, YAML file or preset; names the encoders, the seconds and the limits on
            decoding.
        encoders, seconds: instead of the configuration's.
        workers: rows worked on at a time, each video decoded in a process of its own; default one
            per core.
        progress: called with (rows finished, rows in all).

    Raises:
        InputError: the table cannot be read, a column is missing, unknown encoders or weights that
            cannot be had. A row that cannot be encoded raises nothing: it is left out and reported.
    """
    config = config if isinstance(config, Config) else load_config(config)
    model = replace(config.model, encoders=encoders or config.model.encoders)
    seconds = seconds or config.data.audio_duration
    used = load_encoders(model)
    csv_path, out = Path(csv_path), Path(out)
    target = out / f"{csv_path.stem}.csv"
    if target.resolve() == csv_path.resolve():
        raise InputError(f"{out}: the table written there would replace {csv_path}")
    manifest = read_manifest(csv_path, ("id", "audio_path", "video_path", "caption"))
    (out / "features").mkdir(parents=True, exist_ok=True)

    jobs = [
        _Job(row, out / "features" / f"{row.id}.pth", model, seconds, config.decoding)
        for row in manifest
    ]
    _load(used, [job.row for job in jobs if not job.path.is_file()])
    outcome = {e.row_number: ReportRow(e.id, "failed", str(e)) for e in manifest.errors}
    for count, (job, status, reason) in enumerate(_run(jobs, workers), 1):
        outcome[job.row.number] = ReportRow(job.row.id, status, reason)
        if progress is not None:
            progress(count, len(jobs))

    good = [job for job in jobs if outcome[job.row.number].status != "failed"]
    more = [name for name in ("source",) if name in manifest.columns]
    rows = [_table_row(job, out) | {n: job.row.fields[n] for n in more} for job in good]
    write_csv(target, rows, [*COLUMNS, *more])
    report = [row for _, row in sorted(outcome.items())]
    write_report(out / "report.csv", report)
    kept = sum(row.status == "skipped" for row in report)
    return ExtractResult(
        target, out / "report.csv", len(good) - kept, kept, len(report) - len(good)
    )


def load_encoders(model: ModelConfig, device: torch.device | str = "auto") -> Encoders:
    """The encoders of a configuration, made once per process.

    Raises:
        InputError: as `get_encoders`.
    """
    return _encoders(**model.encoder_options, device=device)


def encode_video(
    encoders: Encoders,
    path: Path,
    seconds: float,
    limits: DecodingConfig | None = None,
    threads: int = 0,
) -> dict[str, Tensor]:
    """Features of one video file, under the keys of a features file.

    It is decoded in another process, with that many threads (0: one a core).

    Raises:
        InputError: the file cannot be decoded, passes a limit or is too short.
    """
    frames = guard.decode(path, encoders.video.streams, seconds, limits, threads)
    clip, sync = encoders.video.encode(frames, seconds)
    return {VIDEO_KEYS[0]: clip, VIDEO_KEYS[1]: sync}


def encode_captions(encoders: Encoders, captions: list[str]) -> list[dict[str, Tensor]]:
    """Features of each caption, under the key of a features file."""
    return [{TEXT_KEYS[0]: rows} for rows in encoders.text.encode(captions)] if captions else []


_encoders = functools.cache(get_encoders)


def _load(encoders: Encoders, rows: list[Row]) -> None:
    """Before anything is decoded: what the rows need, and no more."""
    if any(row.video_exist for row in rows):
        encoders.video.load()
    if any(row.text_exist for row in rows):
        encoders.text.load()


def _table_row(job: _Job, out: Path) -> dict[str, Any]:
    return {
        "id": job.row.id,
        "audio_path": job.row.audio_path.resolve(),
        "features_path": job.path.relative_to(out),
        "video_exist": job.row.video_exist,
        "text_exist": job.row.text_exist,
    }


def _run(jobs: list[_Job], workers: int | None) -> Iterator[tuple[_Job, str, str]]:
    cores = os.cpu_count() or 1
    workers = max(1, min(cores if workers is None else workers, len(jobs)))
    with ThreadPoolExecutor(workers) as pool:
        try:
            threads = max(1, cores // workers)
            futures = {pool.submit(_extract_row, job, threads): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], *future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _extract_row(job: _Job, threads: int) -> tuple[str, str]:
    """Status and reason of one row: done is `ok`, kept from an earlier run is `skipped`."""
    try:
        source = _source(job)
        if _is_current(job, source):
            return "skipped", "kept: made earlier from the same source"
        encoders = load_encoders(job.model)
        features: dict[str, Any] = {}
        if job.row.video_exist:
            features |= encode_video(encoders, job.row.video_path, job.seconds, job.limits, threads)
        if job.row.text_exist:
            features |= encode_captions(encoders, [job.row.caption])[0]
        features = {key: value.float().contiguous().clone() for key, value in features.items()}
        with atomic_write(job.path, durable=False) as file:
            torch.save({**features, "source": source}, file)
    except InputError as error:
        return "failed", f"row {job.row.number}: {error}"
    except Exception as error:  # one row must not take the batch along
        return "failed", f"row {job.row.number}: {type(error).__name__}: {error}"
    return "ok", ""


def _source(job: _Job) -> dict[str, Any]:
    row = job.row
    if not row.audio_path.is_file():
        raise InputError(f"{row.audio_path}: no such audio file")
    name = load_encoders(job.model).name
    source: dict[str, Any] = {"encoders": name, "seconds": float(job.seconds)}
    if row.video_exist:
        if row.video_path is None or not row.video_path.is_file():
            raise InputError(f"{row.video_path}: no such video file")
        stat = row.video_path.stat()
        source["video"] = f"{row.video_path.name} {stat.st_size} {stat.st_mtime_ns}"
    if row.text_exist:
        source["caption"] = row.caption
    return source


def _is_current(job: _Job, source: dict[str, Any]) -> bool:
    if not job.path.is_file():
        return False
    encoders = load_encoders(job.model)
    video, text = encoders.video, encoders.text
    shapes: dict[str, tuple[int, int]] = {}
    if job.row.video_exist:
        shapes["clip_features"] = (video.clip_rows(job.seconds), video.clip_dim)
        shapes["sync_features"] = (video.sync_rows(job.seconds), video.sync_dim)
    if job.row.text_exist:
        shapes["text_features"] = (text.length, text.dim)
    try:
        read_features(job.path, shapes, shapes)
    except InputError:
        return False
    return load_tensors(job.path, "features file").get("source") == source
