"""Generation from a table of videos and captions; `python -m wavflow.infer --config X.yaml`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavflow.config import Config
from wavflow.data.manifest import ReportRow, Row, read_manifest, write_report
from wavflow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from wavflow.sampler import Sampler, Sound


@dataclass(frozen=True)
class InferResult:
    """What became of a table: the folder of wavs, its report, how many rows went each way."""

    out: Path
    report: Path
    done: int
    failed: int


def row_seed(seed: int, id: str) -> int:
    """Seed of a row: depends on the base seed and the row's id, not on its place."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "big") >> 1


def infer(
    sampler: Sampler,
    csv_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    seed: int = 42,
    batch_size: int = 8,
    loudness: float | None = -23.0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> InferResult:
    """Generates `<out>/<id>.wav` for every row of a table.

    Columns: video_path, caption, video_exist, text_exist, id; the id is by default the video's
    stem, else row_%05d. video_exist 0 decodes nothing, text_exist 0 ignores the caption.

    Args:
        sampler: the loaded model.
        csv_path: the table.
        out: gets the wavs and report.csv.
        data_root: where relative video paths start, by default the table's folder.
        seed: base seed; each row's own is `row_seed`.
        batch_size: rows that are decoded together and generated at a time, at most.
        loudness: LUFS of the output, None leaves it.
        progress: called with (rows finished, rows in all).
        options: as of `Sampler.generate_features`.

    Raises:
        InputError: the table cannot be read, or has neither video_path nor caption. A row that
            cannot be used raises nothing: it is left out and reported.
    """
    out = Path(out)
    rows = read_manifest(csv_path, data_root=data_root)
    if not {"video_path", "caption"} & set(rows.columns):
        raise InputError(f"{csv_path}: no column 'video_path' or 'caption'")
    outcome = {e.row_number: ReportRow(e.id, "skipped", str(e)) for e in rows.errors}
    seconds = options.get("seconds")
    finished = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        for at in range(0, len(rows), batch_size):
            batch = rows[at : at + batch_size]
            encoded = list(pool.map(lambda row: _encode(sampler, row, seconds), batch))
            good = [(r, f) for r, f in zip(batch, encoded, strict=True) if not isinstance(f, str)]
            sounds = sampler.generate_features(
                [f for _, f in good],
                [row_seed(seed, row.id) for row, _ in good],
                batch_size=batch_size,
                **options,
            )
            for row, reason in zip(batch, encoded, strict=True):
                if isinstance(reason, str):
                    outcome[row.number] = ReportRow(row.id, "failed", reason)
            for (row, _), sound in zip(good, sounds, strict=True):
                outcome[row.number] = _save(sound, out, row, loudness)
            finished += len(batch)
            if progress is not None:
                progress(finished, len(rows))
    report = [row for _, row in sorted(outcome.items())]
    write_report(out / "report.csv", report)
    done = sum(row.status == "ok" for row in report)
    return InferResult(out, out / "report.csv", done, len(report) - done)


def infer_config(
    config: Config, *, progress: Callable[[int, int], None] | None = None
) -> InferResult:
    """Generates as a configuration says, into `<output.output_dir>/<experiment_id>/`.

    Raises:
        InputError: model.ckpt_path or data.csv_path is not set; as `Sampler.load` and `infer`.
    """
    from wavflow.sampler import Sampler

    for section, key in (("model", "ckpt_path"), ("data", "csv_path")):
        if getattr(getattr(config, section), key) is None:
            raise InputError(f"{section}.{key} is not set in the configuration")
    inference, output = config.inference, config.output
    sampler = Sampler.load(
        config.model.ckpt_path, inference.device, inference.dtype, config.model.ema, config
    )
    return infer(
        sampler,
        config.data.csv_path,
        Path(output.output_dir) / config.experiment_id,
        data_root=config.data.data_root,
        seed=inference.seed,
        guidance=inference.cfg,
        steps=config.sampling.num_steps,
        solver=config.sampling.method,
        batch_size=inference.batch_size,
        trim=inference.trim_to_duration,
        loudness=output.loudness_target_lufs if output.loudness_norm else None,
        progress=progress,
    )


def _encode(sampler: Sampler, row: Row, seconds: float | None) -> dict[str, Tensor] | str:
    try:
        return sampler.encode(
            row.caption if row.text_exist else None,
            row.video_path if row.video_exist else None,
            seconds,
        )
    except InputError as error:
        return f"row {row.number}: {error}"
    except Exception as error:  # one row must not take the batch along
        return f"row {row.number}: {type(error).__name__}: {error}"


def _save(sound: Sound, out: Path, row: Row, loudness: float | None) -> ReportRow:
    try:
        if loudness is not None:
            sound = sound.loud(loudness)
        sound.save(out / f"{row.id}.wav")
    except InputError as error:
        return ReportRow(row.id, "failed", f"row {row.number}: {error}")
    return ReportRow(row.id, "ok")


if __name__ == "__main__":
    from wavflow.cli import main

    main(["infer", *sys.argv[1:]])
