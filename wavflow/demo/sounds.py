"""The demo's sounds: every held-out clip in every mode, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import read_json
from wavflow.base.precision import resolve_device, resolve_dtype
from wavflow.data.manifest import Row, read_manifest
from wavflow.data.recording import read_features
from wavflow.demo.score import CONTROLS, MODES
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import row_seed
from wavflow.systems.wavflow.build import build_model, empty_caption
from wavflow.systems.wavflow.config import TEXT_KEYS, VIDEO_KEYS, RunConfig

#: Which features a mode gives.
GIVEN = {"vt2a": VIDEO_KEYS + TEXT_KEYS, "v2a": VIDEO_KEYS, "t2a": TEXT_KEYS}
#: Modes whose sounds are also put to their videos.
FILMED = ("vt2a", "v2a")
#: Clips generated at a time.
BATCH = 16


def untrained(config: RunConfig) -> Sampler:
    """The network as a training run starts it, before its first step."""
    torch.manual_seed(config.training.seed)
    device = resolve_device(config.inference.device)
    model = build_model(config, empty_caption(config))
    return Sampler(model, config, device, resolve_dtype(config.inference.dtype, device))


def other_conditions(kinds: list[str], seed: int) -> list[int]:
    """For each clip another one, each once, of another kind wherever the numbers allow it."""
    rng = np.random.default_rng(seed)
    order = sorted(rng.permutation(len(kinds)).tolist(), key=lambda i: kinds[i])
    by = max(kinds.count(kind) for kind in kinds)
    by = by if by < len(kinds) else 1
    others = dict(zip(order, order[by:] + order[:by], strict=True))
    return [others[i] for i in range(len(kinds))]


@dataclass(frozen=True)
class Heldout:
    """The held-out clips of a demo's world, in order: rows, all their features, their scenes."""

    rows: list[Row]
    features: list[dict[str, Tensor]]
    scenes: list[dict[str, Any]]

    def first(self, count: int | None) -> Heldout:
        """The first `count` of them; None for all."""
        return Heldout(self.rows[:count], self.features[:count], self.scenes[:count])


def read_heldout(out: Path, config: RunConfig) -> Heldout:
    """The held-out clips of the world in `out/toy`, with the features in `out/features`.

    Raises:
        InputError: a clip that cannot be read.
    """
    rows = read_manifest(out / "toy" / "heldout.csv", ("id", "audio_path", "video_path"))
    table = read_manifest(out / "features" / "heldout.csv", ("id", "features_path"))
    paths = {row.id: str(row.features_path) for row in table}
    for row in rows:
        if row.id not in paths:
            raise InputError(f"{table.path}: no row {row.id}")
    shapes = config.data.feature_shapes
    features = [read_features(paths[row.id], shapes, shapes) for row in rows]
    scenes = read_json(out / "toy" / "events.json")
    return Heldout(list(rows), features, [scenes[row.id] for row in rows])


@dataclass(frozen=True)
class Job:
    """A network's sounds for some clips in one mode.

    Attributes:
        series: whose sounds they are (`wavflow.demo.score.SERIES`), a folder in wav/.
        mode: what is given (`GIVEN`).
        sampler: the network.
        clips: whose events and kinds the sounds are judged by.
        others: for each clip the one whose video and caption are given instead of its own.
    """

    series: str
    mode: str
    sampler: Sampler
    clips: Heldout
    others: list[int] | None = None


def jobs_of(sampler: Sampler, series: str, clips: Heldout) -> list[Job]:
    """A job for each mode."""
    return [Job(series, mode, sampler, clips) for mode in MODES]


def control_jobs(sampler: Sampler, clips: Heldout, seed: int) -> list[Job]:
    """The controls: a network without training, and the trained one given other clips' inputs."""
    others = other_conditions([scene["kind"] for scene in clips.scenes], seed)
    start = untrained(sampler.config)
    networks = {"untrained": (start, None), "shuffled": (sampler, others)}
    return [
        Job(control, mode, networks[control][0], clips, networks[control][1])
        for control in CONTROLS
        for mode in MODES
    ]


def generate(
    out: Path,
    jobs: Sequence[Job],
    *,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Makes the sounds of all jobs, wav/<series>/<mode>/<id>.wav, each batch as it is done.

    They are generated in the library's default way (`wavflow.flow.solvers.BEST`), with the guidance
    of the network's configuration.

    Args:
        out: the demo's folder.
        jobs: what is generated.
        seed: base seed; the noise of a clip depends on it and on the clip's id.
        progress: called with (what is generated, sounds done, sounds in all).

    Returns:
        An entry of events.json for every sound.
    """
    entries: list[dict[str, Any]] = []
    total = sum(len(job.clips.rows) for job in jobs)
    for job in jobs:
        rows = job.clips.rows
        given = range(len(rows)) if job.others is None else job.others
        for at in range(0, len(rows), BATCH):
            places = range(at, min(at + BATCH, len(rows)))
            sounds = job.sampler.generate_features(
                [
                    {key: job.clips.features[given[i]][key] for key in GIVEN[job.mode]}
                    for i in places
                ],
                [row_seed(seed, rows[i].id) for i in places],
                batch_size=BATCH,
            )
            for i, sound in zip(places, sounds, strict=True):
                row, scene = rows[i], job.clips.scenes[i]
                path = Path("wav", job.series, job.mode, f"{row.id}.wav")
                sound.loud().save(out / path)
                entries.append(
                    {
                        "id": row.id,
                        "series": job.series,
                        "mode": job.mode,
                        "kind": scene["kind"],
                        "events": scene["times"],
                        "caption": row.caption,
                        "condition": rows[given[i]].id,
                        "generated": path.as_posix(),
                        "true": f"toy/audio/{row.id}.wav",
                    }
                )
            progress(f"{job.series} {job.mode}", len(entries), total)
    return entries
