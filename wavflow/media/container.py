"""Opening videos and their sound tracks, which may be anybody's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wavflow.base.errors import InputError

if TYPE_CHECKING:
    import av

#: FFmpeg's names of the containers that are read. Playlists (hls, dash, concat) are not among them:
#: a text file called x.mp4 could have any other file, or an address in the network, read.
FORMATS = (
    *("aac", "asf", "avi", "flv", "gif", "ivf", "matroska", "mov", "mpeg", "mpegts", "mxf", "ogg"),
    "yuv4mpegpipe",
)


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
