"""Opening a data set, whether it is a table of files or a pack."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from wavflow.base.errors import InputError
from wavflow.config.schema import DataConfig
from wavflow.data.dataset import ClipDataset
from wavflow.data.manifest import ReportRow, write_report
from wavflow.data.pack import Progress, pack
from wavflow.data.shards import PackedDataset
from wavflow.data.tracks import Track


def open_dataset(
    config: DataConfig,
    tracks: Iterable[Track],
    *,
    report: str | os.PathLike[str] | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> ClipDataset | PackedDataset:
    """Opens `data.csv_path`: a CSV, or a folder made by `wavflow pack`.

    With `data.store` the CSV is packed into that folder, if it is not there yet, and the pack is
    opened. Only one process may do so at a time.

    Args:
        config: what to open, and how.
        tracks: the features that are read.
        report: a CSV to write: what became of every row.
        workers: threads that read files.
        progress: called with (rows read, rows in all).

    Raises:
        InputError: nothing to open, or what `pack`, `ClipDataset` and `PackedDataset` raise.
    """
    if config.csv_path is None:
        raise InputError("data.csv_path is not set; wanted a CSV made by `wavflow extract`")
    path, tracks = Path(config.csv_path), tuple(tracks)
    if config.store is not None:
        if path.is_dir():
            raise InputError(f"{path}: a folder; with data.store wanted the CSV to be packed")
        pack(path, config.store, config, tracks, workers=workers, progress=progress)
        path = Path(config.store)
    if not path.is_dir():
        return ClipDataset(path, config, tracks, report=report, workers=workers, progress=progress)
    dataset = PackedDataset(path, config, tracks)
    if report is not None:
        rows = [ReportRow(id, "skipped", why) for _, id, why in dataset.index["skipped"]]
        write_report(report, rows + [ReportRow(id, "ok") for id in dataset.ids])
    return dataset
