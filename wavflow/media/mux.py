"""Putting a sound into a video's container."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, keep_apart
from wavflow.media.container import open_media

#: Containers that `mux` writes, and FFmpeg's names for them.
MUXED = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


def mux(
    video: str | os.PathLike[str],
    wave: Tensor,
    rate: int,
    path: str | os.PathLike[str],
) -> None:
    """Writes a copy of a video's pictures with `wave` (t,) at `rate` Hz as its only sound.

    Pictures are copied as they are encoded, to the wave's end; sound becomes AAC of 192 kbit/s.

    Args:
        video: with a video track; its own sound is left out.
        wave: float32 in [-1, 1].
        rate: in Hz.
        path: the suffix, .mp4, .mov or .mkv, is the container.

    Raises:
        InputError: no video track, unreadable, or a track the container cannot hold.
        ValueError: another suffix.
    """
    import av

    path, seconds = Path(path), wave.numel() / rate
    if path.suffix.lower() not in MUXED:
        raise ValueError(f"{path}: suffix {path.suffix!r}, wanted {', '.join(MUXED)}")
    keep_apart(path, video)
    pcm = np.clip(wave.detach().cpu().numpy(), -1, 1).astype(np.float32)[None]
    try:
        with open_media(Path(video), "video") as source, atomic_write(path) as file:
            if not source.streams.video:
                raise InputError(f"{video}: no video track")
            pictures = source.streams.video[0]
            with av.open(file, "w", format=MUXED[path.suffix.lower()]) as out:
                try:
                    shown = out.add_stream_from_template(pictures)
                except ValueError as error:  # PyAV's own: the container cannot hold the codec
                    raise InputError(
                        f"{video}: cannot be muxed into {path.name} ({error})"
                    ) from None
                heard = out.add_stream("aac", rate=rate, layout="mono", bit_rate=192_000)
                for packet in source.demux(pictures):
                    if packet.dts is None:
                        continue
                    base = pictures.time_base
                    if packet.pts is not None and base is not None and packet.pts * base >= seconds:
                        continue
                    packet.stream = shown
                    out.mux(packet)
                frame = av.AudioFrame.from_ndarray(pcm, format="fltp", layout="mono")
                # With a time of its own AAC's delay of 1024 samples is cut by the container.
                frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
                for packet in (*heard.encode(frame), *heard.encode(None)):
                    out.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{video}: cannot be muxed into {path.name} ({error.strerror})") from None
