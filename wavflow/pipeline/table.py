"""Sounds for a table of videos and captions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavflow.base.errors import Cancelled, InputError
from wavflow.base.files import check_folder, working_in, write_json
from wavflow.base.version import __version__
from wavflow.config.schema import Config, EncodersConfig
from wavflow.data.manifest import (
    ReportRow,
    Row,
    check_report,
    needed,
    read_manifest,
    write_report,
)
from wavflow.features.weights import identity
from wavflow.pipeline.request import NOTHING, Settings, check_loudness

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from wavflow.media.sound import Sound
    from wavflow.pipeline.request import Options
    from wavflow.pipeline.sampler import Sampler
    from wavflow.sampling.scene import Features

log = logging.getLogger("wavflow")

REPORT = "report.csv"
FORMATS = ("wav", "flac")
#: Keys by which a JSON is known as one of a job's.
OURS = frozenset(("id", "seed", "weights", "wavflow", "files"))


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

    The JSON holds everything the sound depends on, and `files`, what was written. A row whose sound
    is there, made from the same, is left as it is, so that the same call goes on after an
    interruption. A file that no such JSON names is somebody's: its row fails.

    Args:
        sampler: the loaded model.
        csv_path: the table.
        out: folder that gets the sounds and report.csv.
        data_root: where relative video paths start, by default the table's folder.
        seed: base seed; each row's own is `row_seed`.
        loudness: LUFS of the sounds; None leaves them as they were generated.
        format: "wav" or "flac".
        mux: whether rows with a video also get `<id>.mp4`, the video with the sound.
        overwrite: whether sounds that were made from something else, and other files in their
            places, are replaced; else their rows fail. What is read is never replaced.
        progress: called with (rows finished, rows in all).
        seconds: length of every sound, by default as trained.
        trim: whether sounds are cut to the asked duration; else whole tokens are kept.
        options: as in `wavflow.pipeline.request.Settings`.

    Raises:
        InputError: the table cannot be read, or has neither video_path nor caption; an option out
            of range; `out` cannot be written to, or its report.csv is another file. A row that
            cannot be used, made or written raises nothing: it is left out and reported.
    """
    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; wanted {' or '.join(FORMATS)}")
    check_loudness(loudness)
    rows = read_manifest(csv_path, data_root=data_root)
    if not {"video_path", "caption"} & set(rows.columns):
        raise InputError(f"{csv_path}: no column 'video_path' or 'caption'")
    weights = dict(sampler.weights)
    if weights:
        weights["sha256"] = identity(weights["file"])
    settings = Settings(trim=trim, **options)
    settings.plan(sampler.config)
    sampler.generator.window(sampler.seconds(seconds, 1)[0], settings.window)
    inputs = frozenset(
        os.path.realpath(path)
        for path in (csv_path, sampler.weights.get("file"), *(row.video_path for row in rows))
        if path is not None
    )
    check_folder(out)
    check_report(out / REPORT, csv_path, overwrite=overwrite)
    job = _Job(
        sampler, weights, out, seed, seconds, loudness, format, mux, settings, overwrite, inputs
    )
    batch_size = settings.batch_size  # rows that are decoded together, too
    outcome = {e.row_number: ReportRow(e.id, "skipped", str(e)) for e in rows.errors}
    todo = []
    for row in rows:
        kept = job.settled(row)
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
            for row, reason in zip(batch, encoded, strict=True):
                if isinstance(reason, str):
                    outcome[row.number] = ReportRow(row.id, "failed", reason)
            for row, made in job.make(good):
                outcome[row.number] = (
                    ReportRow(row.id, "failed", made)
                    if isinstance(made, str)
                    else job.save(row, made)
                )
            finished += len(batch)
            if progress is not None:
                progress(finished, len(rows))
    report = [row for _, row in sorted(outcome.items())]
    try:
        write_report(out / REPORT, report)
    except OSError as error:
        for each in report:
            log.error("%s: %s %s", each.id, each.status, each.reason)
        raise InputError(f"{out / REPORT}: cannot be written ({error.strerror})") from None
    done = sum(row.status == "ok" for row in report)
    return InferResult(out, out / REPORT, done, len(report) - done)


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
    overwrite: bool
    inputs: frozenset[str]  # real paths

    def settings(self, row: Row) -> dict[str, Any]:
        """Everything the row's sound depends on, but for rounding."""
        config = self.sampler.config
        plan, model = asdict(self.how.plan(config)), config.model
        video = row.video_path if row.video_exist else None
        return {
            "id": row.id,
            "caption": row.caption if row.text_exist else None,
            "video": None if video is None else os.path.abspath(video),
            "video_sha256": None if video is None else identity(video),
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
            "encoders": model.encoder_options if isinstance(model, EncodersConfig) else None,
            **{key: getattr(model, key, None) for key in ("attention_window", "rope_scaling")},
            "dtype": str(self.sampler.dtype).removeprefix("torch."),
            "wavflow": __version__,
        }

    def paths(self, row: Row) -> tuple[Path, Path, Path | None]:
        """Paths of the row's sound, of its JSON, and of the video with the sound."""
        muxed = self.out / f"{row.id}.mp4" if self.mux and _is_seen(row) else None
        return self.out / f"{row.id}.{self.format}", self.out / f"{row.id}.json", muxed

    def settled(self, row: Row) -> ReportRow | None:
        """What becomes of the row without generating it, or None where that is to be done."""

        def failed(reason: str) -> ReportRow:
            return ReportRow(row.id, "failed", f"row {row.number}: {reason}")

        if not _is_seen(row) and not (row.text_exist and row.caption):
            return ReportRow(row.id, "skipped", f"row {row.number}: {NOTHING}")
        sound, sidecar, muxed = paths = self.paths(row)
        for path in filter(None, paths):
            if os.path.realpath(path) in self.inputs:
                return failed(f"{path}: it is read; wanted another folder to write to")
        if self.overwrite:
            return None
        found = self._found(row)
        written = found.get("files", [])
        for path in filter(None, paths):
            ours = found if path == sidecar else path.name in written
            if os.path.lexists(path) and not ours:
                return failed(
                    f"{path} is there, written by something else; wanted --overwrite or another "
                    "folder"
                )
        if not sound.exists():
            return None
        try:
            wanted = self.settings(row)
        except OSError as error:
            return failed(f"{row.video_path}: cannot be read ({error.strerror})")
        if _matter(found) == _matter(wanted):
            whole = muxed is None or muxed.exists()
            return ReportRow(row.id, "ok", "was there") if whole else None
        return failed(
            f"{sound} is there, made from something else; wanted --overwrite or another folder"
        )

    def _found(self, row: Row) -> dict[str, Any]:
        """What an earlier job wrote into the row's JSON; empty where none did."""
        try:
            found = json.loads(self.paths(row)[1].read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        is_ours = isinstance(found, dict) and OURS <= found.keys() and found["id"] == row.id
        return found if is_ours and isinstance(found["files"], list) else {}

    def make(self, rows: list[tuple[Row, Features]]) -> Iterator[tuple[Row, Sound | str]]:
        """Rows with their sounds, or with the reasons why there are none, as they are done."""
        left = dict(enumerate(rows))
        single = False
        while left:
            batch = list(left)[: 1 if single else None]
            try:
                made = self.sampler.features_as_completed(
                    [left[place][1] for place in batch],
                    [row_seed(self.seed, left[place][0].id) for place in batch],
                    seconds=self.seconds,
                    **self.how.options(),
                )
                for number, sound in made:
                    yield left.pop(batch[number])[0], sound
            except Cancelled:
                raise
            except Exception as error:
                if len(batch) == 1:  # else one of them is the reason: each by itself
                    row, _ = left.pop(batch[0])
                    yield row, f"row {row.number}: {_reason(error)}"
                single = True

    def encode(self, row: Row) -> Features | str:
        """The row's features, or why there are none."""
        try:
            if row.video_exist and row.video_path is not None and row.video_path.is_file():
                identity(row.video_path)  # read here, beside the others, and remembered
            return self.sampler.encode(
                row.caption if row.text_exist else None,
                row.video_path if row.video_exist else None,
                self.seconds,
                window=self.how.window,
            )
        except Exception as error:  # one row must not take the batch along
            return f"row {row.number}: {_reason(error)}"

    def save(self, row: Row, sound: Sound) -> ReportRow:
        """Writes the row's files, the sound last: where it is, all are."""
        path, sidecar, muxed = self.paths(row)
        before = [name for name in self._found(row).get("files", []) if isinstance(name, str)]
        names = {each.name for each in (path, muxed) if each is not None}
        names |= {name for name in before if (self.out / name).exists()}
        try:
            if self.loudness is not None:
                sound = sound.loud(self.loudness)
            path.unlink(missing_ok=True)
            write_json(sidecar, self.settings(row) | {"files": sorted(names)})
            if muxed is not None:
                sound.save_video(needed(row.video_path), muxed)
            sound.save(path)
        except Exception as error:  # a full disk, say; one row must not take the batch along
            reason = _reason(error)
            if isinstance(error, AssertionError):  # the library of sound files, which says no more
                reason = f"{path}: cannot be written"
            return ReportRow(row.id, "failed", f"row {row.number}: {reason}")
        return ReportRow(row.id, "ok")


def _is_seen(row: Row) -> bool:
    """Whether the row has a video to look at."""
    return row.video_exist and row.video_path is not None


def _matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what a sound does not depend on: where files lie, what was written."""
    weights = {k: v for k, v in (settings.get("weights") or {}).items() if k != "file"}
    kept = {k: v for k, v in settings.items() if k not in ("video", "files")}
    return kept | {"weights": weights}


def _reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


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
