from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from wavflow.errors import InputError

MAX_ID_BYTES = 200


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "wb", *, durable: bool = True
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    After an exception, or a crash at any moment, `path` is what it was before. Missing parent
    folders are made. `mode` is "wb" or "w" (UTF-8, newlines as written). `durable=False` leaves
    out the fsync, for many small files whose index is written durably afterwards.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write: mode is {mode!r}, wanted 'wb' or 'w'")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    # "x+" and not tempfile: the file gets the permissions of the user's umask, and encoders that
    # go back to patch a header may read what they wrote.
    file = open(temporary, mode.replace("w", "x") + "+", **text)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def check_id(id: str) -> str:
    """Return `id` if it is safe as a file name on its own, else raise InputError saying why."""
    if not isinstance(id, str):
        raise TypeError(f"id is {type(id).__name__}, wanted str")
    shown = repr(id if len(id) <= 80 else id[:77] + "...")
    if not id.strip():
        raise InputError(f"id {shown} is empty")
    if "/" in id or "\\" in id:
        raise InputError(f"id {shown} holds a path separator")
    if ".." in id or id.startswith("."):
        raise InputError(f"id {shown} holds '..' or starts with a dot")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in id):
        raise InputError(f"id {shown} holds a control character")
    if len(id.encode("utf-8")) > MAX_ID_BYTES:
        raise InputError(
            f"id {shown} is {len(id.encode('utf-8'))} bytes long, at most {MAX_ID_BYTES} are wanted"
        )
    return id
