"""Sounds for a table of videos and captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavflow.base.errors import InputError
from wavflow.base.files import working_in, write_json
from wavflow.base.version import __version__
from wavflow.config.schema import Config
from wavflow.data.manifest import ReportRow, Row, needed, read_manifest, write_report
from wavflow.features.weights import identity
from wavflow.pipeline.request import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from wavflow.media.sound import Sound
    from wavflow.pipeline.request import Options
    from wavflow.pipeline.sampler import Sampler
    from wavflow.sampling.scene import Features


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
    loudness: float | None = -23.0,
    format: str = "wav",
    mux: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
    trim: bool = True,
    **options: Unpack[Options],
) -> InferResult:
    """Generates `<out>/<id>.wav` for every row of a table, and `<id>.json` beside it.

    Columns: video_path, caption, video_exist, text_exist, id; the id is by default the video's
    stem, else row_%05d. video_exist 0 decodes nothing, text_exist 0 ignores the caption.

    The JSON holds everything the sound depends on. A row whose sound is there with the same JSON is
    left as it is, so that the same call goes on after an interruption.

    Args:
        sampler: the loaded model.
        csv_path: the table.
        out: folder that gets the sounds and report.csv.
        data_root: where relative video paths start, by default the table's folder.
        seed: base seed; each row's own is `row_seed`.
        loudness: LUFS of the sounds; None leaves them as they were generated.
        format: "wav" or "flac".
        mux: whether rows with a video also get `<id>.mp4`, the video with the sound.
        overwrite: whether sounds that were made from something else are replaced; else their rows
            fail.
        progress: called with (rows finished, rows in all).
        seconds: length of every sound, by default as trained.
        trim: whether sounds are cut to the asked duration; else whole tokens are kept.
        options: as in `wavflow.pipeline.request.Settings`.

    Raises:
        InputError: the table cannot be read, or has neither video_path nor caption. A row that
            cannot be used raises nothing: it is left out and reported.
    """
    out = Path(out)
    rows = read_manifest(csv_path, data_root=data_root)
    if not {"video_path", "caption"} & set(rows.columns):
        raise InputError(f"{csv_path}: no column 'video_path' or 'caption'")
    weights = dict(sampler.weights)
    if weights:
        weights["sha256"] = identity(weights["file"])
    settings = Settings(trim=trim, **options)
    job = _Job(sampler, weights, out, seed, seconds, loudness, format, mux, settings)
    batch_size = settings.batch_size  # rows that are decoded together, too
    outcome = {e.row_number: ReportRow(e.id, "skipped", str(e)) for e in rows.errors}
    todo = []
    for row in rows:
        kept = None if overwrite else job.kept(row)
        if kept is None:
            todo.append(row)
        else:
            outcome[row.number] = kept
    finished = len(rows) - len(todo)
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]
    with working_in(out), ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        ahead = [pool.submit(job.encode, row) for row in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            encoded = [future.result() for future in ahead]
            # The next rows are decoded while these are generated.
            ahead = [pool.submit(job.encode, row) for row in chain(*batches[number + 1 :][:1])]
            good = [(r, f) for r, f in zip(batch, encoded, strict=True) if not isinstance(f, str)]
            sounds = sampler.generate_features(
                [f for _, f in good],
                [row_seed(seed, row.id) for row, _ in good],
                seconds=seconds,
                trim=trim,
                **options,
            )
            for row, reason in zip(batch, encoded, strict=True):
                if isinstance(reason, str):
                    outcome[row.number] = ReportRow(row.id, "failed", reason)
            for (row, _), sound in zip(good, sounds, strict=True):
                outcome[row.number] = job.save(row, sound)
            finished += len(batch)
            if progress is not None:
                progress(finished, len(rows))
    report = [row for _, row in sorted(outcome.items())]
    write_report(out / "report.csv", report)
    done = sum(row.status == "ok" for row in report)
    return InferResult(out, out / "report.csv", done, len(report) - done)


@dataclass(frozen=True)
class _Job:
    """What all rows of a table have in common, and what is done with one."""

    sampler: Sampler
    weights: dict[str, Any]
    out: Path
    seed: int
    seconds: float | None
    loudness: float | None
    format: str
    mux: bool
    how: Settings

    def settings(self, row: Row) -> dict[str, Any]:
        """Everything the row's sound depends on, but for rounding."""
        plan = asdict(self.how.plan(self.sampler.config))
        return {
            "id": row.id,
            "caption": row.caption if row.text_exist else None,
            "video": str(row.video_path) if row.video_exist else None,
            "seed": row_seed(self.seed, row.id),
            "seconds": self.seconds or self.sampler.maker.seconds,
            "window": self.how.window,
            "overlap": self.how.overlap,
            "trim": self.how.trim,
            **plan,
            "guidance_interval": list(plan["guidance_interval"]),
            "loudness": self.loudness,
            "sample_rate": self.sampler.sample_rate,
            "weights": self.weights,
            "dtype": str(self.sampler.dtype).removeprefix("torch."),
            "wavflow": __version__,
        }

    def paths(self, row: Row) -> tuple[Path, Path, Path | None]:
        """Paths of the row's sound, of its JSON, and of the video with the sound."""
        muxed = self.out / f"{row.id}.mp4" if self.mux and row.video_exist else None
        return self.out / f"{row.id}.{self.format}", self.out / f"{row.id}.json", muxed

    def kept(self, row: Row) -> ReportRow | None:
        """What became of the row before, or None where it is to be generated."""
        sound, sidecar, muxed = self.paths(row)
        if not sound.exists():
            return None
        try:
            found = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found == self.settings(row):
            whole = muxed is None or muxed.exists()
            return ReportRow(row.id, "ok", "was there") if whole else None
        reason = "is there, made from something else; wanted --overwrite or another folder"
        return ReportRow(row.id, "failed", f"row {row.number}: {sound} {reason}")

    def encode(self, row: Row) -> Features | str:
        """The row's features, or why there are none."""
        try:
            return self.sampler.encode(
                row.caption if row.text_exist else None,
                row.video_path if row.video_exist else None,
                self.seconds,
                window=self.how.window,
            )
        except InputError as error:
            return f"row {row.number}: {error}"
        except Exception as error:  # one row must not take the batch along
            return f"row {row.number}: {type(error).__name__}: {error}"

    def save(self, row: Row, sound: Sound) -> ReportRow:
        """Writes the row's files, the sound last: where it is, all are."""
        path, sidecar, muxed = self.paths(row)
        try:
            if self.loudness is not None:
                sound = sound.loud(self.loudness)
            path.unlink(missing_ok=True)
            write_json(sidecar, self.settings(row))
            if muxed is not None:
                sound.save_video(needed(row.video_path), muxed)
            sound.save(path)
        except InputError as error:
            return ReportRow(row.id, "failed", f"row {row.number}: {error}")
        return ReportRow(row.id, "ok")


def infer_config(
    config: Config, *, progress: Callable[[int, int], None] | None = None
) -> InferResult:
    """Generates as a configuration says, into `<output.output_dir>/<experiment_id>/`.

    Raises:
        InputError: model.ckpt_path or data.csv_path is not set; else as in `Sampler.load` and
            `infer`.
    """
    from wavflow.pipeline.sampler import Sampler

    checkpoint, table = config.model.ckpt_path, config.data.csv_path
    if checkpoint is None or table is None:
        key = "model.ckpt_path" if checkpoint is None else "data.csv_path"
        raise InputError(f"{key} is not set in the configuration")
    inference, output = config.inference, config.output
    if len(inference.guidance_interval) != 2:
        raise InputError(
            f"inference.guidance_interval is {inference.guidance_interval}; wanted two times"
        )
    low, high = inference.guidance_interval
    sampler = Sampler.load(checkpoint, inference.device, inference.dtype, config.model.ema, config)
    return infer(
        sampler,
        table,
        Path(output.output_dir) / config.experiment_id,
        data_root=config.data.data_root,
        seed=inference.seed,
        guidance=inference.cfg,
        guidance_interval=(low, high),
        guidance_rescale=inference.guidance_rescale,
        times=inference.times,
        steps=config.sampling.num_steps,
        solver=config.sampling.method,
        batch_size=inference.batch_size,
        trim=inference.trim_to_duration,
        loudness=output.loudness_target_lufs if output.loudness_norm else None,
        format=output.format,
        mux=output.mux,
        overwrite=output.overwrite,
        progress=progress,
    )
