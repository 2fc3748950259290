"""Public weight files: fetched once per machine, checked, and kept in a cache folder.

The folder is `WAVFLOW_CACHE_DIR`, by default ~/.cache/wavflow. With `WAVFLOW_OFFLINE=1` nothing is
fetched.
"""

from __future__ import annotations

import functools
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from wavflow.base.errors import InputError
from wavflow.base.files import locked, sha256

log = logging.getLogger("wavflow")

CHUNK = 2**20
CONNECTION_TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing, after which a fetch fails
PAUSE = 1.0  # seconds, doubled at every attempt that brings nothing
REPORT_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class WeightFile:
    """A file as its publisher describes it; without a checksum nothing is fetched."""

    name: str
    url: str
    size: int  # bytes
    sha256: str


def cache_dir() -> Path:
    """The folder of fetched files; it need not exist yet."""
    return Path(os.environ.get("WAVFLOW_CACHE_DIR") or Path.home() / ".cache" / "wavflow")


def offline() -> bool:
    """Whether the user forbids fetching anything.

    Raises:
        InputError: `WAVFLOW_OFFLINE` is neither 0 nor 1.
    """
    value = os.environ.get("WAVFLOW_OFFLINE", "")
    if value not in ("", "0", "1"):
        raise InputError(f"WAVFLOW_OFFLINE is {value!r}; wanted 0 or 1")
    return value == "1"


def given_file(path: str | os.PathLike[str], option: str) -> Path:
    """Returns the path if it is that of a file.

    Raises:
        InputError: it is not; `option` is what named it.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, named by {option}")
    return Path(path)


def identity(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file of weights, which a process reads once as long as it stays the same."""
    stat = os.stat(path)
    return _identity(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _identity(path: str, size: int, mtime_ns: int) -> str:
    return sha256(path)


def fetch(file: WeightFile) -> Path:
    """The file in the cache folder, fetched if it is not there; its checksum is always checked.

    What an interrupted transfer brought is in `<name>.part`, and the next one goes on behind it.

    Raises:
        InputError: offline; no room; the server refuses, or breaks off `ATTEMPTS` times in a row;
            another size or checksum than wanted, then the file is kept as `<name>.bad`.
    """
    path = cache_dir() / file.name
    if not path.is_file() and offline():
        raise InputError(
            f"{path}: no such file, and WAVFLOW_OFFLINE=1 forbids to fetch it from {file.url}"
        )
    with locked(path):
        if path.is_file():
            _check(file, path)
        else:
            part = path.with_name(path.name + ".part")
            _download(file, part)
            _check(file, part)
            os.replace(part, path)
    return path


def _check(file: WeightFile, path: Path) -> None:
    found = f"{_size(path)} bytes of sha256 {sha256(path)}"
    wanted = f"{file.size} bytes of sha256 {file.sha256}"
    if found != wanted:
        bad = path.with_name(file.name + ".bad")
        os.replace(path, bad)
        raise InputError(f"{bad}: {found}; wanted {wanted}, as {file.url} should be")


def _download(file: WeightFile, part: Path) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < file.size - _size(part):
        raise InputError(f"{part}: {free} bytes are free; {file.name} takes {file.size}")
    log.info("%s: fetching %.1f MB from %s", part, file.size / 1e6, file.url)
    failures = 0
    while (have := _size(part)) < file.size:
        try:
            _transfer(file, part, have)
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if _size(part) > have else failures + 1
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if refused or failures == ATTEMPTS:
                raise InputError(
                    f"{file.url}: {str(error) or type(error).__name__}; {_size(part)} of "
                    f"{file.size} bytes are in {part}, and the next attempt goes on there"
                ) from None
            log.info("%s: %s; going on", file.url, error)
            time.sleep(PAUSE * 2**failures)


def _transfer(file: WeightFile, part: Path, have: int) -> None:
    """Appends to `part`, which has `have` bytes, what one connection brings."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(file.url, headers=headers)
    with urllib.request.urlopen(request, timeout=CONNECTION_TIMEOUT) as response:
        start = have if response.status == 206 else 0  # 200: the server knows no ranges
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != file.size:
            raise InputError(f"{file.url}: {start + int(length)} bytes; wanted {file.size}")
        with open(part, "ab" if start else "wb") as out:
            meter = _Meter(file, start)
            while chunk := response.read1(CHUNK):  # what is there: a killed process keeps it
                out.write(chunk)
                meter.add(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if _size(part) < file.size:
        raise ConnectionError(f"the connection ended at byte {_size(part)}")


class _Meter:
    """Logs how far a transfer is, and how fast."""

    def __init__(self, file: WeightFile, start: int) -> None:
        self.file, self.start, self.done = file, start, start
        self.begun = self.reported = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.reported < REPORT_EVERY and self.done < self.file.size:
            return
        self.reported = now
        rate = (self.done - self.start) / max(now - self.begun, 1e-9)
        left = (self.file.size - self.done) / rate
        log.info(
            "%s: %.1f of %.1f MB, %.1f MB/s, %d:%02d left",
            self.file.name,
            self.done / 1e6,
            self.file.size / 1e6,
            rate / 1e6,
            *divmod(round(left), 60),
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
