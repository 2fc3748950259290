"""A toy Foley world made of real files: things that are struck, the sounds they make, captions.

Every clip has one kind of object and 1-3 impacts (for 2 s). At each impact a mallet meets the
object, which flashes and jolts, and its sound starts exactly with that frame. Held-out clips use
schedules of impacts and sentence patterns that no training clip has.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wavflow.base.files import atomic_write, check_folder, check_output, read_json, write_json
from wavflow.data.manifest import write_csv
from wavflow.toy.look import draw
from wavflow.toy.scene import FPS, Scene, make_scene
from wavflow.toy.sound import synthesize

SIDE = 96
EVENTS = "events.json"
COLUMNS = ("id", "audio_path", "video_path", "caption", "video_exist", "text_exist")


def write_video(path: Path, frames: np.ndarray, pcm: np.ndarray, rate: int) -> None:
    """Write frames (t h w 3) uint8 at 25 fps and pcm (samples,) int16 as an H.264 + AAC mp4."""
    import av

    aac = av.Codec("aac", "w")
    audio_rate = min((r for r in aac.audio_rates or () if r >= rate), default=48000)
    with atomic_write(path, durable=False) as file, av.open(file, "w", format="mp4") as mp4:
        video = mp4.add_stream("libx264", rate=FPS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        video.options = {"preset": "ultrafast", "crf": "20"}
        audio = mp4.add_stream("aac", rate=audio_rate, layout="mono")
        audio.bit_rate = 4 * audio_rate
        # The default search takes as long as drawing and coding the pictures together.
        audio.codec_context.options = {"aac_coder": "fast"}
        for picture in frames:
            mp4.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        mp4.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts = rate, 0
        mp4.mux(audio.encode(sound))
        mp4.mux(audio.encode(None))


def _write_clip(scene: Scene, out: Path, seconds: float, rate: int) -> None:
    import soundfile

    pcm = synthesize(scene, seconds, rate)
    with atomic_write(out / "audio" / f"{scene.id}.wav", durable=False) as file:
        soundfile.write(file, pcm, rate, format="WAV", subtype="PCM_16")
    if scene.video_exist:
        frames = draw(scene, round(seconds * FPS), SIDE)
        write_video(out / "videos" / f"{scene.id}.mp4", frames, pcm, rate)


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    if workers == 1:
        yield map
        return
    # fork needs no `if __name__ == "__main__"` in the caller's script and starts at once; it is
    # safe because the workers use numpy and FFmpeg alone. Elsewhere than on Linux it is not.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield partial(pool.map, chunksize=8)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_toy_world(
    out: str | os.PathLike[str],
    clips: int,
    seed: int,
    *,
    heldout: int = 64,
    seconds: float = 2.0,
    rate: int = 8000,
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Write `clips` training and `heldout` held-out clips of `seconds` s under the folder `out`.

    Files: videos/<id>.mp4 (H.264 96x96 at 25 fps + AAC), audio/<id>.wav (16-bit, `rate` Hz),
    train.csv and heldout.csv (paths relative to their folder), events.json
    {id: {kind, times in seconds, split}}. A clip depends on seed, split, index, seconds and rate
    only, never on the number of `workers` (default: the cores this process may use). Of the
    training rows a third are text-only, without a video file, and a tenth video-only.
    """
    if clips < 1 or heldout < 0:
        raise ValueError(f"toy world: {clips} clips, {heldout} held out, wanted >= 1 and >= 0")
    _check_place(Path(out))
    (Path(out) / EVENTS).unlink(missing_ok=True)
    for split, count in (("train", clips), ("heldout", heldout)):
        write_split(
            out,
            split,
            count,
            seed,
            seconds=seconds,
            rate=rate,
            workers=workers,
            progress=progress,
        )


def write_split(
    out: str | os.PathLike[str],
    split: str,
    clips: int,
    seed: int,
    *,
    seconds: float = 2.0,
    rate: int = 8000,
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Write one part of a world, "train" or "heldout": its files, its table, its events.

    events.json keeps those of the other part, which must be of the same seed, seconds and rate.
    """
    if not 1.0 <= seconds <= 60.0:
        raise ValueError(f"toy world: clips of {seconds} s, wanted 1 to 60")
    if not 8000 <= rate <= 48000:
        raise ValueError(f"toy world: {rate} Hz, wanted 8000 to 48000")
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"toy world: {workers} workers, wanted at least 1")
    out = Path(out)
    for name in ("videos", "audio"):
        (out / name).mkdir(parents=True, exist_ok=True)
    scenes = [make_scene(seed, split, i, seconds) for i in range(clips)]
    write = partial(_write_clip, out=out, seconds=seconds, rate=rate)
    with _mapper(workers) as mapper:
        done = mapper(write, scenes)
        if progress:
            from rich.progress import track

            done = track(done, description=f"toy world, {split}", total=len(scenes))
        for _ in done:
            pass
    # The lists come last: where they are, every clip they name is.
    write_csv(out / f"{split}.csv", [_row(scene) for scene in scenes], COLUMNS)
    events = read_json(out / EVENTS) if (out / EVENTS).exists() else {}
    events = {id: scene for id, scene in events.items() if scene["split"] != split}
    events |= {
        scene.id: {"kind": scene.kind, "times": scene.times, "split": split} for scene in scenes
    }
    write_json(out / EVENTS, events)


def _check_place(out: Path) -> None:
    """Refuses a folder with tables or events that no toy world wrote."""
    check_folder(out)
    if (out / EVENTS).exists():
        events = read_json(out / EVENTS)
        scenes = events.values() if isinstance(events, dict) else [None]
        is_ours = all(
            isinstance(s, dict) and {"kind", "times", "split"} <= s.keys() for s in scenes
        )
        check_output(out / EVENTS, overwrite=is_ours)
    for split in ("train", "heldout"):
        path = out / f"{split}.csv"
        if path.exists():
            begins = f"{','.join(COLUMNS)}\n".encode()
            with open(path, "rb") as file:
                found = file.read(len(begins) + len(split) + 1)
            is_ours = found in (begins, begins + f"{split}_".encode())
            check_output(path, overwrite=is_ours)


def _row(scene: Scene) -> dict[str, object]:
    return {
        "id": scene.id,
        "audio_path": f"audio/{scene.id}.wav",
        "video_path": f"videos/{scene.id}.mp4" if scene.video_exist else "",
        "caption": scene.caption,
        "video_exist": scene.video_exist,
        "text_exist": scene.text_exist,
    }
