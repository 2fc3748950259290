"""What a long sound is generated from, window by window."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from wavflow.base.seconds import exact
from wavflow.config.schema import DecodingConfig
from wavflow.data.crop import Grid
from wavflow.features.encode import encode_video
from wavflow.features.encoder import Encoders
from wavflow.media import video_worker
from wavflow.media.video import finest
from wavflow.sampling.scene import Scene
from wavflow.systems.wavflow.config import VIDEO_KEYS, WavflowDataConfig


def film(
    encoders: Encoders,
    path: Path,
    text: Mapping[str, Tensor],
    seconds: float,
    window: float,
    limits: DecodingConfig | None = None,
) -> Scene:
    """A scene of a video file: each window is encoded from its own frames, when it is wanted.

    Args:
        encoders: encode the frames.
        path: the file.
        text: features of the caption.
        seconds: length of the sound; the last picture is held for the rest of the last window.
        window: seconds of a window.
        limits: what the video may take before it is refused.

    Raises:
        InputError: the file cannot be decoded, or not up to `seconds`.
    """
    stream = finest(encoders.video.streams)
    grid = Fraction(1, stream.fps)
    whole, length = exact(seconds), exact(window)
    video_worker.decode(path, [stream], grid, limits, start=(whole - grid) // grid * grid)

    def video(time: Fraction) -> dict[str, Tensor]:
        hold = max(Fraction(0), time + length - whole)
        return encode_video(encoders, path, window, limits, start=time, hold=hold)

    return Scene(text, video, grid)


def stored(features: Mapping[str, Tensor], data: WavflowDataConfig) -> Scene:
    """A scene out of the features of the whole sound, as one features file holds them.

    A window's rows are those from its start on (`wavflow.data.crop` says where windows may begin);
    beyond the end the last row or segment is repeated.

    Args:
        features: with as many rows as the sound is long.
        data: sizes of one window.
    """
    text = {key: value for key, value in features.items() if key not in VIDEO_KEYS}
    if VIDEO_KEYS[0] not in features:
        return Scene(text)
    grid = Grid(data, data.tracks)
    timed = [(track, track.timing) for track in data.tracks if track.timing is not None]

    def video(time: Fraction) -> dict[str, Tensor]:
        place, found = grid.place(int(time / grid.step)), {}
        for track, timing in timed:
            held = features[track.key]
            rows = place.rows[track.key] + torch.arange(track.rows)
            beyond = (rows - len(held)).div(timing.rows, rounding_mode="floor") + 1
            found[track.key] = held[rows - timing.rows * beyond.clamp(min=0)]
        return found

    return Scene(text, video, grid.step)
