"""Which features files are whole and up to date, without reading them again."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any


class Index:
    """Features files that were written or read through, by id.

    A file is known by a stamp: a hash of its size, its time of change and the source that its
    features are of. Every process of an extraction appends to a file of its own,
    `<folder>/<name>.tsv`, as rows are finished, and reads those of all. What a kill or a foreign
    hand spoils there costs reading some features again.

    Args:
        folder: folder of the index's files; made if missing.
        name: stem of this process's file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        # Line by line: what a killed process had finished is there.
        self._own = open(folder / f"{name}.tsv", "a", encoding="utf-8", buffering=1)
        self._own.write("\n" if self._own.tell() else "")  # behind a line that a kill cut short
        self.refresh()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    def refresh(self) -> None:
        """Reads the files of all processes."""
        self._lines: set[str] = set()
        for path in self._folder.glob("*.tsv"):
            with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
                self._lines.update(file)

    def knows(self, path: Path, source: dict[str, Any]) -> bool:
        """Whether the file `path`, called by its id, is there and was noted with that source."""
        return path.is_file() and _line(path, source) in self._lines

    def note(self, path: Path, source: dict[str, Any]) -> None:
        """Notes that the file `path` is whole and of that source; from any thread."""
        line = _line(path, source)
        with self._lock:
            self._own.write(line)


def _line(path: Path, source: dict[str, Any]) -> str:
    stat = path.stat()
    text = json.dumps([stat.st_size, stat.st_mtime_ns, source])
    return f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}\t{path.stem}\n"
