"""The demo's sounds: every held-out clip in every mode, the controls, and videos with sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavflow.build import build_model, empty_caption
from wavflow.config import Config
from wavflow.data.manifest import Row, needed, read_manifest
from wavflow.data.recording import TEXT_KEYS, VIDEO_KEYS, read_features
from wavflow.demo.score import CONTROLS, MODES
from wavflow.errors import InputError
from wavflow.files import atomic_write, read_json, write_json
from wavflow.infer import row_seed
from wavflow.precision import resolve_device, resolve_dtype
from wavflow.sampler import Sampler

#: Which features a mode gives.
GIVEN = {"vt2a": VIDEO_KEYS + TEXT_KEYS, "v2a": VIDEO_KEYS, "t2a": TEXT_KEYS}
#: Modes whose sounds are also put to their videos.
FILMED = ("vt2a", "v2a")
#: Clips generated at a time.
BATCH = 16


def untrained(config: Config) -> Sampler:
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


def read_heldout(
    out: Path, config: Config
) -> tuple[list[Row], list[dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The held-out clips of the world in `out/toy`: rows, all their features, scenes by id.

    Raises:
        InputError: a clip that cannot be read.
    """
    rows = read_manifest(out / "toy" / "heldout.csv", ("id", "audio_path", "video_path"))
    table = read_manifest(out / "features" / "heldout.csv", ("id", "features_path"))
    features = {row.id: needed(row.features_path) for row in table}
    for row in rows:
        if row.id not in features:
            raise InputError(f"{table.path}: no row {row.id}")
    shapes = config.data.feature_shapes
    given = [read_features(features[row.id], shapes, shapes) for row in rows]
    return rows, given, read_json(out / "toy" / "events.json")


def generate_all(
    out: Path,
    sampler: Sampler,
    *,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Generates every held-out clip of the world in `out/toy` in every mode, then the controls.

    Writes wav/<mode>/<id>.wav, wav/<control>/<mode>/<id>.wav, wav/true/<id>.wav and events.json,
    whose content it returns.

    Args:
        out: the demo's folder, with toy/ and features/.
        sampler: the trained model.
        seed: base seed; the noise of a clip depends on it and on the clip's id.
        progress: called with (what is generated, sounds done, sounds in all).

    Raises:
        InputError: a clip that cannot be read.
    """
    rows, given, world = read_heldout(out, sampler.config)
    other = other_conditions([world[row.id]["kind"] for row in rows], seed)
    shuffled = [given[i] for i in other]

    entries = []
    done, total = 0, len(rows) * len(MODES) * (1 + len(CONTROLS))
    inits = untrained(sampler.config)
    for control, model, conditions in (
        (None, sampler, given),
        ("untrained", inits, given),
        ("shuffled", sampler, shuffled),
    ):
        for mode in MODES:
            sounds = model.generate_features(
                [{key: clip[key] for key in GIVEN[mode]} for clip in conditions],
                [row_seed(seed, row.id) for row in rows],
                guidance=model.config.inference.cfg,
                steps=model.config.sampling.num_steps,
                solver=model.config.sampling.method,
                batch_size=BATCH,
                progress=progress and partial(_advance, progress, control or mode, done, total),
            )
            done += len(rows)
            for index, (row, sound) in enumerate(zip(rows, sounds, strict=True)):
                path = Path("wav", *([control] if control else []), mode, f"{row.id}.wav")
                sound.loud().save(out / path)
                source = rows[other[index]] if control == "shuffled" else row
                entries.append(_entry(row, source.id, mode, control, world[row.id], path))
    for row in rows:
        with atomic_write(out / "wav" / "true" / f"{row.id}.wav", durable=False) as file:
            with open(needed(row.audio_path), "rb") as true:
                shutil.copyfileobj(true, file)
    write_json(out / "events.json", entries)
    return entries


def _entry(
    row: Row, condition: str, mode: str, control: str | None, scene: dict[str, Any], path: Path
) -> dict[str, Any]:
    return {
        "id": row.id,
        "mode": mode,
        "control": control,
        "kind": scene["kind"],
        "events": scene["times"],
        "caption": row.caption,
        "condition": condition,
        "generated": path.as_posix(),
        "true": f"wav/true/{row.id}.wav",
    }


def _advance(
    progress: Callable[[str, int, int], None], what: str, before: int, total: int, done: int, _: int
) -> None:
    progress(what, before + done, total)


def put_to_video(video: Path, wave: Tensor, rate: int, out: Path) -> None:
    """Writes an mp4 with the pictures of `video`, copied as they are, and `wave` (t,) as AAC.

    Raises:
        InputError: `video` cannot be read.
    """
    import av

    aac = av.Codec("aac", "w")
    audio_rate = min((r for r in aac.audio_rates or () if r >= rate), default=48000)
    pcm = (wave.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    try:
        with (
            atomic_write(out, durable=False) as file,
            av.open(str(video)) as source,
            av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            seen = source.streams.video[0]
            pictures = target.add_stream_from_template(seen)
            sound = target.add_stream("aac", rate=audio_rate, layout="mono")
            sound.bit_rate = 8 * audio_rate
            for packet in source.demux(seen):
                if packet.dts is not None:
                    packet.stream = pictures
                    target.mux(packet)
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            target.mux(sound.encode(frame))
            target.mux(sound.encode(None))
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{video}: its pictures cannot be copied ({error})") from None
