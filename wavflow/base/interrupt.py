"""Holding back SIGINT and SIGTERM so that a job can end in order."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

log = logging.getLogger("wavflow")


class Interrupts:
    """A block in which SIGINT and SIGTERM are only noted; a second SIGINT acts as usual.

    A second SIGTERM is only noted too: torchrun sends two within milliseconds. Outside the main
    thread, where Python handles no signals, none is noted.

    Attributes:
        signal: the noted signal's number, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def end(self, signum: int, done: str) -> NoReturn:
        """Ends the process as the signal would have; says what was done first."""
        log.warning("%s at %s; the same command goes on", signal.Signals(signum).name, done)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signal:
            print("stopping after this step", file=sys.stderr)
        self.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signum, self._before[signum])
