"""Encoding one video or some captions with the encoders of a configuration."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from wavflow.base import processes
from wavflow.base.errors import InputError
from wavflow.config.schema import DecodingConfig, EncodersConfig
from wavflow.features.encoder import Encoders
from wavflow.features.registry import get_encoders
from wavflow.media import video_worker
from wavflow.media.video import finest

#: Instead of a number of seconds: each video to its end.
WHOLE = "whole"

#: Seconds of a whole video that are in memory at a time, at 7 MB each for the public encoders.
PIECE = 32


def load_encoders(model: EncodersConfig, device: torch.device | str = "auto") -> Encoders:
    """The encoders of a configuration, made once per process.

    Raises:
        InputError: as `get_encoders` raises.
    """
    return _encoders(**model.encoder_options, device=processes.own_device(device))


def encode_video(
    encoders: Encoders,
    path: Path,
    seconds: float,
    limits: DecodingConfig | None = None,
    threads: int = 0,
    *,
    start: float | Fraction = 0,
    hold: float | Fraction = 0,
) -> dict[str, Tensor]:
    """Features of `seconds` of a video file from `start` on, under the keys of a features file.

    It is decoded in another process, with `threads` threads (0: one a core); its last picture
    lasts for `hold` seconds more.

    Raises:
        InputError: the file cannot be decoded, passes a limit or is too short.
    """
    streams = encoders.video.streams
    frames = video_worker.decode(path, streams, seconds, limits, threads, start=start, hold=hold)
    rows = encoders.video.encode(frames, seconds)
    return dict(zip(encoders.video.keys, rows, strict=True))


def encode_whole_video(
    encoders: Encoders, path: Path, limits: DecodingConfig | None = None, threads: int = 0
) -> tuple[dict[str, Tensor], float]:
    """Features of a video file to its end, as `encode_video` gives them, and its seconds.

    It is decoded and encoded `PIECE` seconds at a time, each within `limits`.

    Raises:
        InputError: the file cannot be decoded, passes a limit or is too short.
    """
    streams, length = encoders.video.streams, Fraction(0)
    fine = finest(streams)

    def pieces() -> Iterator[list[Tensor]]:
        nonlocal length
        is_over = False
        while not is_over:
            frames = video_worker.decode(
                path, streams, PIECE, limits, threads, start=length, to_end=True
            )
            count = len(frames[streams.index(fine)])
            is_over = count < fine.count(PIECE)
            length += Fraction(count, fine.fps)
            if count:
                yield frames
        if not length:
            raise InputError(f"{path}: shorter than a frame at {fine.fps} a second")

    rows = encoders.video.encode_pieces(pieces())
    return dict(zip(encoders.video.keys, rows, strict=True)), float(length)


def encode_captions(encoders: Encoders, captions: list[str]) -> list[dict[str, Tensor]]:
    """Features of each caption, under the key of a features file."""
    text = encoders.text
    return [{text.key: rows} for rows in text.encode(captions)] if captions else []


_encoders = functools.cache(get_encoders)
