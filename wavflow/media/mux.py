"""Putting a sound into a video's container."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, keep_apart
from wavflow.media.audio import resample
from wavflow.media.container import LEADING, REORDERED, first_picture, open_media, track

if TYPE_CHECKING:
    import av

#: Containers that `mux` writes, FFmpeg's names for them and for the codec of their sound.
MUXED = {
    ".mp4": ("mp4", "aac"),
    ".mov": ("mov", "aac"),
    ".mkv": ("matroska", "aac"),
    ".webm": ("webm", "libopus"),
}


def mux(
    video: str | os.PathLike[str],
    wave: Tensor,
    rate: int,
    path: str | os.PathLike[str],
) -> None:
    """Writes a copy of a video's pictures with `wave` (t,) at `rate` Hz as its only sound.

    The first sample is heard when the first picture is shown, which becomes time 0. Pictures are
    copied as they are encoded, to the wave's end; a few later ones are kept where earlier ones are
    decoded with their help, and shown in Matroska and WebM, which have no edit lists. Sound becomes
    AAC, in WebM Opus, of 192 kbit/s.

    Args:
        video: a file with a video track; its own sound is left out, cover art too.
        wave: (t,) float32 in [-1, 1].
        rate: samples per second (Hz); resampled where the sound's codec has other rates.
        path: the file to write; its suffix, .mp4, .mov, .mkv or .webm, says the container.

    Raises:
        InputError: no video track, unreadable, or a track the container cannot hold.
        ValueError: another suffix.
    """
    import av

    video, path, seconds = Path(video), Path(path), Fraction(wave.numel(), rate)
    if path.suffix.lower() not in MUXED:
        raise ValueError(f"{path}: suffix {path.suffix!r}, wanted {', '.join(MUXED)}")
    keep_apart(path, video)
    form, codec = MUXED[path.suffix.lower()]
    pcm = np.clip(wave.detach().cpu().numpy(), -1, 1).astype(np.float32)
    try:
        zero = first_picture(video, "video")
        with open_media(video, "video") as source, atomic_write(path) as file:
            pictures = track(source, "video")
            if pictures is None or zero is None:
                raise InputError(f"{video}: no video track")
            with av.open(file, "w", format=form) as out:
                try:
                    # Opaque: as it is, by the codec's parameters; otherwise its encoder is wanted.
                    shown = out.add_stream_from_template(pictures, opaque=True)
                except ValueError:  # PyAV's own: the container cannot hold the codec
                    kind = pictures.codec_context.codec.canonical_name
                    raise InputError(
                        f"{video}: cannot be muxed into {path.name}, which holds no {kind}"
                    ) from None
                rates = av.Codec(codec, "w").audio_rates or [rate]
                # The codec's own rate that loses nothing, or its highest.
                heard_rate = min((r for r in rates if r >= rate), default=max(rates))
                pcm = resample(pcm, rate, heard_rate)[None]
                heard: Any = out.add_stream(codec, rate=heard_rate, layout="mono", bit_rate=192_000)
                shift = int(zero / pictures.time_base)
                for packet in _kept(_timed(source.demux(pictures)), shift, seconds):
                    packet.stream = shown
                    out.mux(packet)
                frame = av.AudioFrame.from_ndarray(pcm, format="fltp", layout="mono")
                # With a time of its own AAC's delay of 1024 samples is cut by the container.
                frame.sample_rate, frame.pts = heard_rate, 0
                frame.time_base = Fraction(1, heard_rate)
                for packet in (*heard.encode(frame), *heard.encode(None)):
                    out.mux(packet)
            if codec == "aac" and form != "matroska":
                _hide_after(file, seconds)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{video}: cannot be muxed into {path.name} ({error.strerror})") from None


def _timed(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """The packets, all with a time of decoding: Matroska's first ones have none.

    Where pictures are not shown in the order of decoding FFmpeg knows it only after some of them.
    """
    lead: list[av.Packet] = []
    rest = (packet for packet in packets if packet.size)  # the last marks the end
    for packet in rest:
        lead.append(packet)
        if packet.dts is not None or len(lead) > LEADING:
            break
    later = None
    for packet in reversed(lead):
        if packet.dts is None and packet.pts is not None:
            span = packet.duration or 1
            packet.dts = packet.pts if later is None else min(packet.pts, later - span)
        later = packet.dts
    yield from chain(lead, rest)


def _kept(packets: Iterable[av.Packet], shift: int, seconds: Fraction) -> Iterator[av.Packet]:
    """The packets that are needed to show the first `seconds`, `shift` ticks earlier.

    What comes before the first key frame, or is shown before it and is not needed by what follows,
    cannot be decoded.
    """
    begun = False
    lead: list[av.Packet] = []
    ahead: list[av.Packet] = []
    for packet in packets:
        if not begun:
            lead.append(packet)
            if not packet.is_keyframe and len(lead) <= LEADING:
                continue
            begun, chosen = True, [packet] if packet.is_keyframe else lead
        else:
            chosen = [packet]
        for each in chosen:
            end = seconds / Fraction(each.time_base)
            each.dts = None if each.dts is None else each.dts - shift
            each.pts = None if each.pts is None else each.pts - shift
            time = each.dts if each.pts is None else each.pts
            if each.dts is not None and each.dts >= end or len(ahead) > REORDERED:
                return
            if time is not None and time < 0 and not each.is_discard:
                continue
            ahead.append(each)
            if time is None or time < end:
                yield from ahead
                ahead = []


def _hide_after(file: IO[bytes], seconds: Fraction) -> None:
    """Ends the edit list of an mp4's pictures at `seconds`: what comes later is not shown."""
    for moov in _boxes(file, 0, file.seek(0, os.SEEK_END), b"moov"):
        head, _ = _boxes(file, *moov, b"mvhd")[0]
        file.seek(head)
        data = file.read(24)
        scale = struct.unpack_from(">I", data, 20 if data[0] else 12)[0]
        for trak in _boxes(file, *moov, b"trak"):
            media = _boxes(file, *trak, b"mdia")[0]
            file.seek(_boxes(file, *media, b"hdlr")[0][0] + 8)
            if file.read(4) != b"vide":
                continue
            for edits in _boxes(file, *trak, b"edts"):
                for begin, _ in _boxes(file, *edits, b"elst"):
                    _shorten(file, begin, math.ceil(seconds * scale))


def _shorten(file: IO[bytes], begin: int, left: int) -> None:
    """Lets an edit list, whose box's content is at `begin`, last for `left` ticks at most."""
    file.seek(begin)
    version, count = struct.unpack(">B3xI", file.read(8))
    form, size = (">Q", 20) if version else (">I", 12)
    for entry in range(count):
        place = begin + 8 + entry * size
        file.seek(place)
        lasts = min(struct.unpack(form, file.read(struct.calcsize(form)))[0], left)
        file.seek(place)
        file.write(struct.pack(form, lasts))
        left -= lasts


def _boxes(file: IO[bytes], begin: int, end: int, kind: bytes) -> list[tuple[int, int]]:
    """Where the contents of an mp4's boxes of one kind begin and end."""
    found = []
    while begin + 8 <= end:
        file.seek(begin)
        size, name = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        if name == kind:
            found.append((begin + head, begin + size))
        begin += size or end
    return found
