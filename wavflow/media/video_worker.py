"""Decoding in another process, which a hostile file may crash, hang or fill: it alone is lost.

A worker is a Python process that imports the decoder once and then takes one file after the other.
Requests and replies are lines of JSON over a socket; with a request comes the descriptor of shared
memory, as large as the frames, which the worker fills. A worker that dies is replaced. It is no
sandbox: code that a file smuggles into a worker has the user's rights.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.seconds import exact
from wavflow.config.schema import DecodingConfig
from wavflow.media import video
from wavflow.media.video import FrameStream, passed

#: Bytes of a line at most, and characters of a message in it.
_LINE, _MESSAGE = 1 << 16, 1000


def decode(
    path: str | os.PathLike[str],
    streams: Sequence[FrameStream],
    seconds: float | Fraction,
    limits: DecodingConfig | None = None,
    threads: int = 0,
    *,
    start: float | Fraction = 0,
    hold: float | Fraction = 0,
    to_end: bool = False,
) -> list[Tensor]:  # each (t 3 s s) uint8 RGB
    """Decodes as `wavflow.media.video.decode` does, in a worker process: for strangers' files.

    May be called from many threads; each has a worker of its own. `threads` are the worker's, 0
    for as many as torch has here. Frames and warnings are the same.

    Raises InputError also when the worker dies, or takes more time or memory than `limits` allow.
    """
    path, limits = Path(path), limits or DecodingConfig()
    shapes = [stream.shape(seconds) for stream in streams]
    request = {
        "cwd": os.getcwd(),
        "path": str(path),
        "streams": [asdict(stream) for stream in streams],
        **{k: str(exact(v)) for k, v in (("seconds", seconds), ("start", start), ("hold", hold))},
        "to_end": to_end,
        "limits": asdict(limits),
        "threads": threads or torch.get_num_threads(),
    }
    worker = _take()
    try:
        with _shared_memory(sum(map(math.prod, shapes))) as descriptor:
            reply = worker.ask(request, descriptor, limits.seconds)
            frames = _frames(descriptor, shapes)
    except TimeoutError:
        worker.end()
        raise passed(path, "decoding was not done in time", "seconds", limits.seconds) from None
    except _Died as death:
        raise InputError(f"{path}: the process that decoded it {death}") from None
    except BaseException:
        worker.end()
        raise
    IDLE.append(worker)
    for text in reply["warnings"]:
        warnings.warn(text, stacklevel=2)
    if reply["error"] is not None:
        raise InputError(reply["error"])
    return [x[:count] for x, count in zip(frames, reply["counts"], strict=True)]


def start() -> None:
    """Start a worker and do not wait for it: the next file will find it ready, or nearly."""
    IDLE.append(_take())


@contextlib.contextmanager
def _shared_memory(size: int) -> Iterator[int]:
    """Yields a descriptor of `size` shared bytes; where the system can, their number is fixed."""
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            # Shrunk by a worker, it would end this process with a SIGBUS.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            descriptor = stack.enter_context(tempfile.TemporaryFile()).fileno()
            os.ftruncate(descriptor, size)
        yield descriptor


def _frames(descriptor: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The shared memory as tensors, which keep it alive."""
    sizes = [math.prod(shape) for shape in shapes]
    try:
        memory = mmap.mmap(descriptor, sum(sizes))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"not enough for {sum(sizes)} bytes of frames") from None
        raise
    parts = torch.frombuffer(memory, dtype=torch.uint8).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Died(Exception):
    def __init__(self, code: int) -> None:
        if code < 0:
            short = "; the machine may be short of memory" if code == -signal.SIGKILL else ""
            super().__init__(f"was killed by {signal.Signals(-code).name}{short}")
        else:
            super().__init__(f"ended with exit code {code}")


class _Worker:
    """The caller's end of a worker process; for one thread at a time."""

    def __init__(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # One arena a thread would reserve address space by the GB, which the limit counts.
                env={**os.environ, "MALLOC_ARENA_MAX": "2"},
            )
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], descriptor: int, seconds: float) -> dict[str, Any]:
        """The reply to a request.

        Raises TimeoutError when it takes more than `seconds`, _Died when the process does not live
        to give it.
        """
        try:
            if not self._is_ready:
                self._socket.settimeout(None)
                _receive(self._socket)
                self._is_ready = True
            self._socket.settimeout(seconds)
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [descriptor])
            return _receive(self._socket)[0]
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            raise _Died(self.end()) from None

    def end(self) -> int:
        """End the process; returns its exit code, or minus the signal that ended it."""
        self._process.kill()
        self._socket.close()
        return self._process.wait()


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The value of the next line and the descriptors that came with it.

    Raises EOFError when there is no whole line to come.
    """
    line, descriptors = b"", []
    while not line.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, _LINE, 1)
        descriptors += more
        line += part
        if not part or len(line) > _LINE:
            raise EOFError
    return json.loads(line), descriptors


#: Workers that wait for a video.
IDLE: list[_Worker] = []


def _take() -> _Worker:
    while True:
        try:
            worker = IDLE.pop()
        except IndexError:
            return _Worker()
        if worker.is_alive:
            return worker
        worker.end()


@atexit.register
def _end_idle() -> None:
    while IDLE:
        IDLE.pop().end()


# A forked process must not talk to its parent's workers.
os.register_at_fork(after_in_child=IDLE.clear)


def serve() -> None:
    """The worker's end: answers requests on its standard input until there are no more."""
    import av  # noqa: F401  now, so that no request pays for it

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    idle_bytes = _address_space()
    with socket.socket(fileno=0) as connection:
        reply: str | dict[str, Any] = "ready"
        while True:
            connection.sendall(json.dumps(reply).encode() + b"\n")
            try:
                request, (descriptor,) = _receive(connection)
            except EOFError:
                return
            reply = _answer(request, descriptor, idle_bytes)


def _answer(request: dict[str, Any], descriptor: int, idle_bytes: int | None) -> dict[str, Any]:
    os.chdir(request["cwd"])
    path = Path(request["path"])
    seconds, start, hold = (Fraction(request[name]) for name in ("seconds", "start", "hold"))
    limits, threads = DecodingConfig(**request["limits"]), request["threads"]
    streams = [FrameStream(**stream) for stream in request["streams"]]
    shapes = [stream.shape(seconds) for stream in streams]
    # Before the frames are mapped: the last request's bounds may be too tight for them.
    _bound(limits, idle_bytes, sum(map(math.prod, shapes)))
    torch.set_num_threads(threads)
    reply: dict[str, Any] = {"error": None, "counts": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            frames = _frames(descriptor, shapes)
            times = {"start": start, "hold": hold, "to_end": request["to_end"]}
            found = video.decode(path, streams, seconds, limits, threads, frames, **times)
            reply["counts"] = [len(each) for each in found]
        except Exception as error:
            reply["error"] = _reason(error, path, limits)[:_MESSAGE]
        finally:
            os.close(descriptor)
    reply["warnings"] = [str(each.message)[:_MESSAGE] for each in caught[:5]]
    return reply


def _bound(limits: DecodingConfig, idle_bytes: int | None, room: int) -> None:
    """Set what the system lets this process take for one request, with `room` for its frames."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # The caller's clock ends a slow worker; this ends one whose caller is gone.
    cpu = usage.ru_utime + usage.ru_stime + limits.seconds * (os.cpu_count() or 1)
    _lower(resource.RLIMIT_CPU, math.ceil(cpu))
    if idle_bytes is not None:
        _lower(resource.RLIMIT_AS, int(idle_bytes + limits.memory_gb * 1e9 + room))


def _lower(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _address_space() -> int | None:
    """Bytes of address space that this process has; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _reason(error: Exception, path: Path, limits: DecodingConfig) -> str:
    if isinstance(error, InputError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:  # torch: a RuntimeError
        return str(passed(path, "decoding ran out of memory", "memory_gb", limits.memory_gb))
    return f"{path}: {' '.join(text.split())}"
