"""One video decoder for all encoders: which frames, which colours, which size.

Frames are chosen as FFmpeg's `fps` filter with default rounding does, so that features agree with
pipelines built on that filter; they are resized as uint8, since a resize in float followed by
rounding differs by up to 24 levels on noisy images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from wavflow.errors import InputError

if TYPE_CHECKING:
    import av

#: Fewer pixels than this decode faster on one thread.
_THREADED_PIXELS = 320 * 240


@dataclass(frozen=True)
class FrameStream:
    """Frames at `fps` a second, `size` x `size` pixels.

    resize "squash": the whole picture, its aspect ratio not kept. "crop": the shorter side to
    `size`, the longer to floor(size * long / short), then the centre.
    """

    fps: int
    size: int
    resize: str

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.size <= 0:
            raise ValueError(f"FrameStream: fps {self.fps}, size {self.size}, wanted positive")
        if self.resize not in ("squash", "crop"):
            raise ValueError(f"FrameStream: resize {self.resize!r}, wanted 'squash' or 'crop'")

    def count(self, seconds: float) -> int:
        """Frames of a clip of that length: floor(fps * seconds), exact for decimal seconds."""
        return int(self.fps * Fraction(seconds).limit_denominator(1_000_000))

    def fit(self, picture: Tensor) -> Tensor:  # (h w 3) uint8 -> (3 size size) uint8
        """Resize one picture in uint8, bicubic and antialiased."""
        height, width = picture.shape[:2]
        if self.resize == "squash":
            target = (self.size, self.size)
        else:
            short = min(height, width)
            target = (self.size * height // short, self.size * width // short)
        batch = picture.permute(2, 0, 1)[None]
        if target != (height, width):
            batch = interpolate(
                batch, size=target, mode="bicubic", antialias=True, align_corners=False
            )
        top, left = (round((side - self.size) / 2) for side in target)
        return batch[0, :, top : top + self.size, left : left + self.size]


CLIP_STREAM = FrameStream(8, 384, "squash")
SYNC_STREAM = FrameStream(25, 224, "crop")


def _slot(time: Fraction, fps: int) -> int:
    """The output slot nearest to `time`, halves away from zero."""
    doubled = 2 * time * fps
    return int((abs(doubled) + 1) // 2) * (1 if doubled >= 0 else -1)


class _Selection:
    """Fills one stream: slot k shows the last frame whose own slot is at most k."""

    def __init__(self, stream: FrameStream, seconds: float) -> None:
        self.stream = stream
        self.wanted = stream.count(seconds)
        self.frames = torch.empty(self.wanted, 3, stream.size, stream.size, dtype=torch.uint8)
        self.filled = 0
        self.first: int | None = None  # slot of the first frame

    @property
    def full(self) -> bool:
        return self.filled == self.wanted

    def takes(self, until: Fraction) -> int:
        """How many slots the held frame gets when the next one starts at `until`."""
        end = _slot(until, self.stream.fps) - (self.first or 0)
        return max(0, min(end, self.wanted) - self.filled)

    def put(self, picture: Tensor, times: int) -> None:
        self.frames[self.filled : self.filled + times] = self.stream.fit(picture)
        self.filled += times


def decode(
    path: str | os.PathLike[str], streams: Sequence[FrameStream], seconds: float
) -> list[Tensor]:  # each (t 3 s s) uint8 RGB
    """Decode the first `seconds` of a video once, for all `streams`.

    Output j of a stream shows slot k = n_0 + j, where a frame at time t has slot
    n = floor(t * fps + 1/2) and slot k shows the last frame with n <= k; the last frame lasts for
    its duration. Only frames that are shown are converted to RGB (honouring the colour space the
    file names), and decoding ends when every stream is full. Rotation tags are not applied: a
    warning says so.

    Raises InputError naming the file when it is missing, is not a video, has no frames, is broken
    or is shorter than `seconds`; ValueError when `seconds` gives a stream no frame.
    """
    import av

    path = Path(path)
    selections = [_Selection(stream, seconds) for stream in streams]
    for stream, selection in zip(streams, selections, strict=True):
        if selection.wanted < 1:
            raise ValueError(f"{seconds} s at {stream.fps} fps is no frame, wanted at least one")
    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                kinds = sorted({s.type for s in container.streams}) or ["nothing"]
                raise InputError(f"{path}: no video stream, found {' and '.join(kinds)}")
            end = _decode_stream(path, container, selections)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not readable as video ({error.strerror})") from None
    for stream, selection in zip(streams, selections, strict=True):
        if not selection.full:
            raise InputError(
                f"{path}: {selection.filled} frames at {stream.fps} fps "
                f"({float(end):.3f} s), wanted {selection.wanted} ({seconds:g} s)"
            )
    return [selection.frames for selection in selections]


def _decode_stream(
    path: Path, container: av.container.InputContainer, selections: list[_Selection]
) -> Fraction:
    """Fill the selections; return the time in the file up to which frames were seen."""
    from av.video.reformatter import VideoReformatter

    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height >= _THREADED_PIXELS:
        stream.thread_type = "AUTO"
    # One converter for all frames, on one thread: a new one for every frame costs 3 times as much.
    reformatter = VideoReformatter()
    held: av.VideoFrame | None = None
    end = Fraction(0)

    def show(until: Fraction) -> None:
        takers = [(s, n) for s in selections if (n := s.takes(until)) > 0]
        if held is not None and takers:
            picture = torch.from_numpy(
                reformatter.reformat(held, format="rgb24", threads=1).to_ndarray()
            )
            for selection, times in takers:
                selection.put(picture, times)

    for frame in container.decode(stream):
        if frame.pts is None or frame.time_base is None:
            raise InputError(f"{path}: a frame without a time stamp")
        start = frame.pts * frame.time_base
        if held is None:
            if frame.rotation:
                warnings.warn(
                    f"{path}: the rotation tag ({frame.rotation} degrees) is not applied",
                    stacklevel=4,
                )
            for selection in selections:
                selection.first = _slot(start, selection.stream.fps)
        else:
            show(start)
        held = frame
        duration = frame.duration * frame.time_base if frame.duration else None
        end = start + (duration or 1 / Fraction(stream.average_rate or 25))
        if all(selection.full for selection in selections):
            return end
    if held is None:
        raise InputError(f"{path}: no frames in its video stream")
    show(end)
    return end
