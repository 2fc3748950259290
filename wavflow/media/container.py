"""Opening videos and their sound tracks, which may be anybody's files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavflow.base.errors import InputError

if TYPE_CHECKING:
    import av

#: FFmpeg's names of the containers that are read. Playlists (hls, dash, concat) are not among them:
#: a text file called x.mp4 could have any other file, or an address in the network, read.
FORMATS = (
    *("aac", "asf", "avi", "flv", "gif", "ivf", "matroska", "mov", "mpeg", "mpegts", "mxf", "ogg"),
    "yuv4mpegpipe",
)
#: Packets that are looked at for a key frame, at most.
LEADING = 1000
#: Packets from a key frame on among which is the one shown first: codecs reorder 16 at most.
REORDERED = 32
#: Seconds that sound or video may lack of what the header says: it may count another stream's end.
SLACK = Fraction(1, 2)


def open_media(path: Path, what: str) -> av.container.InputContainer:
    """Open a local file as one of `FORMATS`, whatever its name ends in.

    Raises InputError, saying that the file is not readable as `what`.
    """
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
    try:
        # Without "file:" a name such as "concat:a|b" or "http:x" would be a protocol.
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.ArgumentError:
        raise unreadable(path, what, f"none of the containers {', '.join(FORMATS)}") from None
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, what, error.strerror) from None


def unreadable(path: Path, what: str, reason: str | None) -> InputError:
    """The error for a file that FFmpeg cannot read."""
    return InputError(f"{path}: not readable as {what} ({reason})")


def track(container: av.container.InputContainer, kind: str) -> Any:
    """The stream of `kind`, "video" or "audio", that is meant when nothing else is said, or None.

    The first that is marked as the default, else the first. Cover art, which containers keep as a
    video of one picture, is none, nor is a stream that there is no decoder for.
    """
    from av.stream import Disposition

    streams = [
        stream
        for stream in getattr(container.streams, kind)
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    default = (stream for stream in streams if stream.disposition & Disposition.default)
    return next(default, streams[0] if streams else None)


def first_picture(path: Path, what: str) -> Fraction | None:
    """The time in seconds of a file's first picture, on the file's clock; None where it has none.

    It is taken from the packets, of which none is decoded: the first key frame's, or where an edit
    list hides that one, the first that is shown.
    """
    import av

    try:
        with open_media(path, what) as container:
            stream = track(container, "video")
            if stream is None or stream.time_base is None:
                return None
            time = _first_shown(container.demux(stream))
            return None if time is None else time * stream.time_base
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, what, error.strerror) from None


def _first_shown(packets: Iterable[av.Packet]) -> int | None:
    """The least time of the packets that are shown, from the first key frame on."""
    key: int | None = None
    shown: list[int] = []
    for packet in islice(packets, LEADING):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or not packet.size:
            continue
        if key is None and packet.is_keyframe:
            key, shown = time, []
        if not packet.is_discard and (key is None or time >= key):
            shown.append(time)
        if key is not None and len(shown) >= REORDERED:
            break
    return min(shown, default=None)


def claimed_end(container: av.container.InputContainer, stream: Any) -> Fraction | None:
    """The time up to which a file's header says that its stream goes; None where none says so.

    Matroska and FLV say it of the longest stream: `stream` None asks for that alone. Who writes
    Matroska may say it of each stream in a tag.
    """
    import av

    name = container.format.name
    if stream is not None and "mov" in name and stream.duration and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * Fraction(stream.time_base)
    if stream is not None and "matroska" in name:
        return _tagged_seconds(stream.metadata.get("DURATION", ""))
    if stream is None and container.duration and ("matroska" in name or name == "flv"):
        return Fraction((container.start_time or 0) + container.duration, av.time_base)
    return None


def _tagged_seconds(text: str) -> Fraction | None:
    """Seconds of a tag such as 00:01:02.500000000."""
    found = re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d(?:\.\d{1,9})?)", text.strip())
    if found is None:
        return None
    hours, minutes, seconds = map(Fraction, found.groups())
    return 3600 * hours + 60 * minutes + seconds


def packet_end(packet: av.Packet) -> Fraction | None:
    """The time at which a packet's sound or picture ends; None where it has no time."""
    time = packet.dts if packet.pts is None else packet.pts
    if time is None or packet.time_base is None:
        return None
    return (time + (packet.duration or 0)) * packet.time_base


def broken_off(path: Path, what: str, found: Fraction, claimed: Fraction) -> str:
    """What is wrong with a file whose sound or video is shorter than its header says."""
    return (
        f"{path}: its {what} breaks off at {float(found):.3f} s, wanted the "
        f"{float(claimed):.3f} s that its header promises"
    )
