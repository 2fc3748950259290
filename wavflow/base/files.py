"""Writing files whole or not at all, reading strangers' files, locks and safe names."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from wavflow.base.errors import InputError

log = logging.getLogger("wavflow")


#: Bytes of an id in UTF-8, at most: it becomes a file name.
MAX_ID_BYTES = 200
#: Names that Windows gives to devices, whatever follows the first dot.
DEVICES = frozenset("CON PRN AUX NUL".split()) | {
    f"{n}{i}" for n in ("COM", "LPT") for i in "123456789"
}


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
    text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
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
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def working_in(folder: str | os.PathLike[str], *parts: str) -> Iterator[None]:
    """Marks this process as one of those that write into `folder`, made if missing.

    Whichever process is alone there, when it comes or when it goes, removes what killed ones left
    of `atomic_write` in the folder and in its subfolders `parts`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:

        def clean() -> None:
            with suppress(BlockingIOError):  # another process works here, and will clean
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for place in (folder, *(folder / part for part in parts)):
                    remove_temporary(place)

        clean()
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            clean()


@contextmanager
def alone_in(folder: str | os.PathLike[str], wanted: str) -> Iterator[None]:
    """Keeps every other such block of this machine out of `folder`, which is made.

    A process that dies leaves no lock behind.

    Args:
        folder: where this process alone writes.
        wanted: what one may do instead, for the message.

    Raises:
        InputError: another process is at work there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is at work in it; wanted {wanted}"
            ) from None
        yield


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file, through links and from any folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


def keep_apart(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuses a path to write to that is one of the files that are read.

    Raises:
        InputError: it is one of them.
    """
    for given in inputs:
        if given is not None and is_same_file(path, given):
            raise InputError(
                f"{path}: it would replace {given}, which is read; wanted another name to write to"
            )


def check_output(
    path: str | os.PathLike[str],
    *inputs: str | os.PathLike[str] | None,
    overwrite: bool = False,
) -> None:
    """Refuses a path to write to before any work is done for it.

    Args:
        path: the file to write.
        inputs: files that are read; none of them may be replaced.
        overwrite: whether another file that is there may be replaced.

    Raises:
        InputError: it would replace a file, or it is a folder, or it cannot be written.
    """
    path = Path(path)
    keep_apart(path, *inputs)
    if path.is_dir():
        raise InputError(f"{path}: a folder; wanted the name of a file")
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path}: it is there; wanted --overwrite or another name")
    check_folder(path.parent)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that files cannot be written into; one that is not there can be made.

    Raises:
        InputError: it, or the nearest folder above it that is there, cannot be written to.
    """
    folder = there = Path(folder)
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is not a folder; wanted a folder to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {there} cannot be written to; wanted another folder")


def remove_temporary(folder: Path) -> None:
    """Removes what killed calls of `atomic_write` left; nobody may write there meanwhile."""
    for left in folder.glob(".*.tmp"):
        left.unlink()


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def load_tensors(path: str | os.PathLike[str], what: str, *, mapped: bool = False) -> Any:
    """Read a file of torch.save onto the CPU: tensors and plain values; no code in it runs.

    With `mapped`, tensors are memory maps of the file. torch.save compresses nothing, so an archive
    that would unpack to more than its own size is refused.

    Raises:
        InputError: the file is missing, or not a readable `what`.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such {what}")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        inside = sum(entry.file_size for entry in entries)
        if inside > size:
            raise ValueError(f"it unpacks to {inside} bytes")
        if mapped and any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises a dozen kinds, from EOFError to KeyError
        reason = str(error).strip().split("\n")[0][:160]
        raise InputError(
            f"{path}: not a readable {what}, {size} bytes; truncated, or not written by "
            f"torch.save with plain tensors ({type(error).__name__}: {reason})"
        ) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file and returns what it holds.

    Raises:
        InputError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


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
    if id.partition(".")[0].rstrip().upper() in DEVICES:
        raise InputError(f"id {shown} is the name of a device")
    if len(id.encode("utf-8")) > MAX_ID_BYTES:
        raise InputError(
            f"id {shown} is {len(id.encode('utf-8'))} bytes long, at most {MAX_ID_BYTES} are wanted"
        )
    return id


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of the same block for `path`.

    A process that dies leaves no lock behind.

    Raises:
        InputError: the folder cannot be written to.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is making it; waiting", path)
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written to ({error.strerror}); WAVFLOW_CACHE_DIR names "
            "another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
