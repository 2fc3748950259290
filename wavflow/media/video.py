"""One video decoder for all encoders: which frames, which colours, which size.

Frames are chosen as FFmpeg's `fps` filter with default rounding does, so that features agree with
pipelines built on that filter; they are resized as uint8, since a resize in float followed by
rounding differs by up to 24 levels on noisy images.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from wavflow.base.errors import InputError
from wavflow.base.seconds import exact
from wavflow.config.schema import DecodingConfig
from wavflow.media.container import SLACK, broken_off, claimed_end, open_media, track, unreadable

if TYPE_CHECKING:
    import av

#: Fewer pixels than this decode faster on one thread.
_THREADED_PIXELS = 320 * 240
#: Seconds before a time to look for its key frame: containers may go by the order of decoding.
_SEEK_MARGIN = Fraction(1, 2)


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

    def count(self, seconds: float | Fraction) -> int:
        """Frames of a clip of that length: floor(fps * seconds), exact for decimal seconds."""
        return int(self.fps * exact(seconds))

    def shape(self, seconds: float | Fraction) -> tuple[int, int, int, int]:
        """Shape (t, 3, s, s) of the frames of a clip of that length.

        Raises:
            ValueError: it has no frame.
        """
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
        self.first = 0  # slot of the video's first frame, if decoding began with it

    @property
    def full(self) -> bool:
        return self.filled == self.wanted

    def takes(self, until: Fraction) -> int:
        """How many slots the held frame gets when the next one starts at `until`."""
        end = _slot(until, self.stream.fps) - self.first
        return max(0, min(end, self.wanted) - self.filled)

    def put(self, picture: Tensor, times: int) -> None:
        self.frames[self.filled : self.filled + times] = self.stream.fit(picture)
        self.filled += times


class _ToRGB:
    """Converts pictures to (h w 3) uint8 as FFmpeg's `format=rgb24` filter does.

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
        rgb: Any = self._sink.pull()
        return torch.from_numpy(rgb.to_ndarray())

    def _build(self, frame: av.VideoFrame) -> None:
        import av

        graph = av.filter.Graph()
        graph.threads = 1
        self._source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
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
    seconds: float | Fraction,
    limits: DecodingConfig | None = None,
    threads: int = 0,
    out: Sequence[Tensor] | None = None,
    *,
    start: float | Fraction = 0,
    hold: float | Fraction = 0,
    to_end: bool = False,
) -> list[Tensor]:  # each (t 3 s s) uint8 RGB
    """Decode `seconds` of a video from `start` on once, for all `streams`, in this process.

    Output j of a stream shows slot k = n_0 + j, where a frame at time t has slot
    n = floor((t - start) * fps + 1/2), n_0 is that of the video's first frame if start were 0, and
    slot k shows the last frame with n <= k. The last frame lasts for its duration, not at all where
    the file gives none, and `hold` seconds more; unless `to_end`, `limits.hold_seconds` are added
    to it where the video is too short, and a warning says so. Only frames that are shown are
    converted to RGB (honouring the colour space the file names); decoding begins at the key frame
    before `start` and ends when every stream is full. Rotation tags and the shape of pixels are not
    applied: for a rotation a warning says so.

    The limits on what the file claims are checked here, those on time and memory by
    `wavflow.media.video_worker.decode`, which is what strangers' files go through. `threads` are
    the codec's, 0 for one a core. `out`, of the streams' shapes, is filled and returned. `to_end`
    takes what there is of a shorter video, of all streams as much as makes one length: frames of
    the finest stream over its rate.

    Raises InputError naming the file when it is missing, is not a video, has no frames, is broken,
    passes a limit, ends before its header says or, unless `to_end`, is shorter than `seconds`;
    ValueError when `seconds` gives a
    stream no frame; MemoryError.
    """
    import av

    path = Path(path)
    limits, start, hold = limits or DecodingConfig(), exact(start), exact(hold)
    spare = Fraction(0) if to_end else exact(limits.hold_seconds)
    shapes = [stream.shape(seconds) for stream in streams]
    frames = [torch.empty(shape, dtype=torch.uint8) for shape in shapes] if out is None else out
    selections = [_Selection(*pair) for pair in zip(streams, frames, strict=True)]
    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted a video")
    size = path.stat().st_size / 1e9
    if size > limits.file_gb:
        raise passed(path, f"the file has {size:.3g} GB", "file_gb", limits.file_gb)
    try:
        # Where a jump does not come out before `start`, all that is before it is decoded.
        for jump in (True, False) if start else (False,):
            with open_media(path, "video") as container:
                _check_container(path, container, limits)
                pictures = _Pictures(path, container, limits, threads)
                if pictures.begin(start, jump):
                    end = _select(pictures, selections, start, hold, spare)
                    break
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{path}: not enough memory") from None
        raise unreadable(path, "video", error.strerror) from None
    if to_end:
        length = _common_length(selections)
        return [x[: s.count(length)] for s, x in zip(streams, frames, strict=True)]
    for stream, selection in zip(streams, selections, strict=True):
        if not selection.full:
            raise InputError(
                f"{path}: {selection.filled} frames at {stream.fps} fps "
                f"({float(end):.3f} s), wanted {selection.wanted} ({_span(start, seconds)})"
            )
    return list(frames)


def finest(streams: Sequence[FrameStream]) -> FrameStream:
    """The stream with the most frames a second."""
    return max(streams, key=lambda stream: stream.fps)


def _common_length(selections: Sequence[_Selection]) -> Fraction:
    """The longest time, in frames of the finest stream, that all streams have frames for."""
    fps = finest([s.stream for s in selections]).fps
    count = max(s.filled for s in selections if s.stream.fps == fps)
    while any(s.stream.count(Fraction(count, fps)) > s.filled for s in selections):
        count -= 1
    return Fraction(count, fps)


def passed(path: Path, found: str, limit: str, allowed: float) -> InputError:
    """The error for a file that passes a limit of `DecodingConfig`."""
    return InputError(f"{path}: {found}, decoding.{limit} allows {allowed:g}")


def _span(start: Fraction, seconds: float | Fraction) -> str:
    return f"{float(seconds):g} s" + (f" from {float(start):g} s on" if start else "")


def _check_container(
    path: Path, container: av.container.InputContainer, limits: DecodingConfig
) -> None:
    import av

    if track(container, "video") is None:
        kinds = {"pictures alone" if s.type == "video" else s.type for s in container.streams}
        found = " and ".join(sorted(kinds)) or "nothing"
        raise InputError(f"{path}: no video stream, found {found}")
    hours = (container.duration or 0) / av.time_base / 3600
    if hours > limits.hours:
        raise passed(path, f"the file claims {hours:.1f} hours", "hours", limits.hours)


class _Pictures:
    """The pictures of a video stream in the order they are shown, checked against the limits.

    Attributes:
        first: time of the video's first picture, in seconds.
        end: time up to which pictures were seen, in seconds.
    """

    def __init__(
        self,
        path: Path,
        container: av.container.InputContainer,
        limits: DecodingConfig,
        threads: int,
    ) -> None:
        self.path, self.container, self.limits = path, container, limits
        self.stream = track(container, "video")
        codec = self.stream.codec_context
        _check_size(path, codec, limits)
        if codec.width * codec.height >= _THREADED_PIXELS:
            codec.thread_type, codec.thread_count = "AUTO", threads
        self.first = self.end = Fraction(0)

    def begin(self, start: Fraction, jump: bool) -> bool:
        """Starts decoding; returns whether pictures from `start` on, and the one before, come next.

        Raises:
            InputError: there are none at all.
        """
        self._frames = _decode_frames(self.path, self.container, self.stream, self.limits)
        head = next(self._frames, None)
        if head is None:
            raise InputError(f"{self.path}: no frames in its video stream")
        self.first = _time(head)
        if head.rotation:
            warnings.warn(
                f"{self.path}: the rotation tag ({head.rotation} degrees) is not applied",
                stacklevel=4,
            )
        if jump:
            head = self._jump(self.first + start)
        self._head = head
        return head is not None

    def _jump(self, time: Fraction) -> av.VideoFrame | None:
        """The key frame that decoding `time` has to begin with, where the container finds it."""
        import av

        if self.stream.time_base is None:
            return None
        target = int(max(time - _SEEK_MARGIN, self.first) / self.stream.time_base)
        try:
            self.container.seek(target, stream=self.stream)
        except (av.FFmpegError, OSError):
            return None
        self._frames = _decode_frames(self.path, self.container, self.stream, self.limits)
        # Pictures before the key frame may lack what they are made from.
        head = next((frame for frame in self._frames if frame.key_frame), None)
        return None if head is None or _time(head) > time else head

    def check_whole(self) -> None:
        """Raises InputError where the pictures ended before the file's header says."""
        claimed = claimed_end(self.container, self.stream)
        if claimed is not None and self.end < claimed - SLACK:
            raise InputError(broken_off(self.path, "video", self.end, claimed))

    def __iter__(self) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """Every picture from where it begins, with its time."""
        assert self._head is not None  # `begin` said so
        for frame in chain((self._head,), self._frames):
            time, span = _time(frame), frame.duration or 0
            self.end = time if frame.time_base is None else time + span * frame.time_base
            yield time, frame


# Not a method: a generator that holds the object that holds it would keep the file's memory.
def _decode_frames(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    limits: DecodingConfig,
) -> Iterator[av.VideoFrame]:
    idle, latest = 0, None
    for packet in container.demux(stream):
        idle += 1
        for frame in packet.decode():
            if frame.pts is None or frame.time_base is None:
                raise InputError(f"{path}: a frame without a time stamp")
            _check_size(path, frame, limits)
            if latest is None or _time(frame) > latest:
                latest, idle = _time(frame), 0
            yield frame
        if idle > limits.idle_packets:
            found = f"{idle} packets without a later picture"
            raise passed(path, found, "idle_packets", limits.idle_packets)


def _check_size(
    path: Path, of: av.VideoFrame | av.VideoCodecContext, limits: DecodingConfig
) -> None:
    if of.width * of.height > limits.megapixels * 1e6:
        found = f"pictures of {of.width} x {of.height} pixels"
        raise passed(path, found, "megapixels", limits.megapixels)


def _time(frame: av.VideoFrame) -> Fraction:
    assert frame.pts is not None and frame.time_base is not None  # `_decode_frames` looked
    return frame.pts * frame.time_base


def _select(
    pictures: _Pictures,
    selections: list[_Selection],
    start: Fraction,
    hold: Fraction,
    spare: Fraction,
) -> Fraction:
    """Fill the selections; return the time in the file up to which frames were seen.

    `spare` is how much longer than its time and `hold` the last picture may last if it has to.
    """
    for selection in selections:
        selection.first = _slot(pictures.first, selection.stream.fps)
    to_rgb = _ToRGB()
    held: av.VideoFrame | None = None

    def show(until: Fraction) -> None:
        takers = [(s, n) for s in selections if (n := s.takes(until - start)) > 0]
        if held is not None and takers:
            picture = to_rgb(held)
            for selection, times in takers:
                selection.put(picture, times)

    for time, frame in pictures:
        show(time)
        held = frame
        if all(selection.full for selection in selections):
            return pictures.end
    pictures.check_whole()
    show(pictures.end + hold)
    if spare and not all(selection.full for selection in selections):
        show(pictures.end + hold + spare)
        if all(selection.full for selection in selections):
            found = f"too short ({float(pictures.end):.3f} s), the last picture is held"
            warnings.warn(f"{pictures.path}: {found}", stacklevel=4)
    return pictures.end
