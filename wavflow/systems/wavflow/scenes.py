"""What a long sound is generated from, window by window."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from wavflow.base.seconds import exact
from wavflow.config.schema import DataConfig, DecodingConfig
from wavflow.data.crop import SEGMENT_ROWS, Grid
from wavflow.data.recording import VIDEO_KEYS
from wavflow.features.encode import encode_video
from wavflow.features.encoder import Encoders
from wavflow.media import video_worker
from wavflow.media.video import finest
from wavflow.sampling.scene import Scene


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
        encoders: of the video.
        path: the file.
        text: features of its caption.
        seconds: of the sound; the last picture is held for the rest of the last window.
        window: seconds of a window.

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


def stored(features: Mapping[str, Tensor], data: DataConfig) -> Scene:
    """A scene of the features of the whole sound, as one features file holds them.

    A window's rows are those from its start on (`wavflow.data.crop` says where windows may begin),
    beyond the end the last row or segment again.

    Args:
        features: with as many rows as the sound is long.
        data: sizes of one window.
    """
    text = {key: value for key, value in features.items() if key not in VIDEO_KEYS}
    if VIDEO_KEYS[0] not in features:
        return Scene(text)
    grid = Grid(data)
    clip, sync = (features[key] for key in VIDEO_KEYS)
    unit = SEGMENT_ROWS if grid.segments else 1

    def video(time: Fraction) -> dict[str, Tensor]:
        place = grid.place(int(time / grid.step))
        clip_rows = (place.clip_row + torch.arange(data.clip_seq_len)).clamp(max=len(clip) - 1)
        sync_rows = place.sync_row + torch.arange(data.sync_seq_len)
        beyond = (sync_rows - len(sync)).div(unit, rounding_mode="floor") + 1
        sync_rows = sync_rows - unit * beyond.clamp(min=0)
        return {VIDEO_KEYS[0]: clip[clip_rows], VIDEO_KEYS[1]: sync[sync_rows]}

    return Scene(text, video, grid.step)
