"""One video decoder for all encoders: which frames, which colours, which size.

Frames are chosen as FFmpeg's `fps` filter with default rounding does, so that features agree with
pipelines built on that filter; they are resized as uint8, since a resize in float followed by
rounding differs by up to 24 levels on noisy images.
"""

from __future__ import annotations

import errno
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

from wavflow.config import DecodingConfig
from wavflow.errors import InputError
from wavflow.media import open_media, unreadable

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

    def shape(self, seconds: float) -> tuple[int, int, int, int]:
        """(t, 3, s, s) of a clip of that length; ValueError when it has no frame."""
        count = self.count(seconds)
        if count < 1:
            raise ValueError(f"{seconds} s at {self.fps} fps is no frame, wanted at least one")
        return count, 3, self.size, self.size

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

    def __init__(self, stream: FrameStream, frames: Tensor) -> None:
        self.stream = stream
        self.frames = frames
        self.wanted = len(frames)
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


class _ToRGB:
    """Pictures as FFmpeg's `format=rgb24` filter makes them: (h w 3) uint8.

    The filter knows the place of chroma samples and converts interlaced pictures as whole ones.
    PyAV's `VideoFrame.reformat` does neither: it is off by up to 150 levels for interlaced video,
    50 for 10 bits and 30 for odd heights.
    """

    def __init__(self) -> None:
        self._form: tuple[int, int, str] | None = None

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        form = (frame.width, frame.height, frame.format.name)
        if form != self._form:
            self._build(frame)
            self._form = form
        self._source.push(frame)
        return torch.from_numpy(self._sink.pull().to_ndarray())

    def _build(self, frame: av.VideoFrame) -> None:
        import av

        graph = av.filter.Graph()
        graph.threads = 1
        self._source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format.name,
            time_base=frame.time_base,
        )
        rgb, self._sink = graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")
        self._source.link_to(rgb)
        rgb.link_to(self._sink)
        graph.configure()
        self._graph = graph  # its contexts do not keep it alive


def decode(
    path: str | os.PathLike[str],
    streams: Sequence[FrameStream],
    seconds: float,
    limits: DecodingConfig | None = None,
    threads: int = 0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # each (t 3 s s) uint8 RGB
    """Decode the first `seconds` of a video once, for all `streams`, in this process.

    Output j of a stream shows slot k = n_0 + j, where a frame at time t has slot
    n = floor(t * fps + 1/2) and slot k shows the last frame with n <= k; the last frame lasts for
    its duration, not at all where the file gives none. `limits.hold_seconds` is added to it where
    the video is too short, and a warning says so. Only frames that are shown are converted to
    RGB (honouring the colour space the file names), and decoding ends when every stream is full.
    Rotation tags and the shape of pixels are not applied: for a rotation a warning says so.

    The limits on what the file claims are checked here, those on time and memory by
    `wavflow.features.guard.decode`, which is what strangers' files go through. `threads` are the
    codec's, 0 for one a core. `out`, of the streams' shapes, is filled and returned.

    Raises InputError naming the file when it is missing, is not a video, has no frames, is broken,
    passes a limit or is shorter than `seconds`; ValueError when `seconds` gives a stream no frame;
    MemoryError.
    """
    import av

    path = Path(path)
    limits = limits or DecodingConfig()
    shapes = [stream.shape(seconds) for stream in streams]
    frames = [torch.empty(shape, dtype=torch.uint8) for shape in shapes] if out is None else out
    selections = [_Selection(*pair) for pair in zip(streams, frames, strict=True)]
    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted a video")
    size = path.stat().st_size / 1e9
    if size > limits.file_gb:
        raise passed(path, f"the file has {size:.3g} GB", "file_gb", limits.file_gb)
    try:
        with open_media(path, "video") as container:
            if not container.streams.video:
                kinds = sorted({s.type for s in container.streams}) or ["nothing"]
                raise InputError(f"{path}: no video stream, found {' and '.join(kinds)}")
            hours = (container.duration or 0) / av.time_base / 3600
            if hours > limits.hours:
                raise passed(path, f"the file claims {hours:.1f} hours", "hours", limits.hours)
            end = _decode_stream(path, container, selections, limits, threads)
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{path}: not enough memory") from None
        raise unreadable(path, "video", error.strerror) from None
    for stream, selection in zip(streams, selections, strict=True):
        if not selection.full:
            raise InputError(
                f"{path}: {selection.filled} frames at {stream.fps} fps "
                f"({float(end):.3f} s), wanted {selection.wanted} ({seconds:g} s)"
            )
    return list(frames)


def passed(path: Path, found: str, limit: str, allowed: float) -> InputError:
    """The error of a file that passes a limit of `DecodingConfig`."""
    return InputError(f"{path}: {found}, decoding.{limit} allows {allowed:g}")


def _decode_stream(
    path: Path,
    container: av.container.InputContainer,
    selections: list[_Selection],
    limits: DecodingConfig,
    threads: int,
) -> Fraction:
    """Fill the selections; return the time in the file up to which frames were seen."""
    stream = container.streams.video[0]
    codec = stream.codec_context

    def check_size(width: int, height: int) -> None:
        if width * height > limits.megapixels * 1e6:
            raise passed(
                path, f"pictures of {width} x {height} pixels", "megapixels", limits.megapixels
            )

    check_size(codec.width, codec.height)
    if codec.width * codec.height >= _THREADED_PIXELS:
        codec.thread_type, codec.thread_count = "AUTO", threads
    to_rgb = _ToRGB()
    held: av.VideoFrame | None = None
    end = latest = Fraction(0)
    idle = 0

    def show(until: Fraction) -> None:
        takers = [(s, n) for s in selections if (n := s.takes(until)) > 0]
        if held is not None and takers:
            picture = to_rgb(held)
            for selection, times in takers:
                selection.put(picture, times)

    for packet in container.demux(stream):
        idle += 1
        for frame in packet.decode():
            if frame.pts is None or frame.time_base is None:
                raise InputError(f"{path}: a frame without a time stamp")
            check_size(frame.width, frame.height)
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
            if held is None or start > latest:
                latest, idle = start, 0
            held = frame
            end = start + (frame.duration or 0) * frame.time_base
            if all(selection.full for selection in selections):
                return end
        if idle > limits.idle_packets:
            raise passed(
                path, f"{idle} packets without a later picture", "idle_packets", limits.idle_packets
            )
    if held is None:
        raise InputError(f"{path}: no frames in its video stream")
    show(end)
    if not all(selection.full for selection in selections):
        show(end + Fraction(limits.hold_seconds))
        if all(selection.full for selection in selections):
            warnings.warn(
                f"{path}: too short ({float(end):.3f} s), the last picture is held", stacklevel=4
            )
    return end
