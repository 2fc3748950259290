"""`wavflow` commands as processes of their own, forked from one that has imported torch once.

Such a process differs from `python -m wavflow` by the seconds that it does not need to begin. The
server it comes from does nothing but fork, and has no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from pathlib import Path

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["wavflow.pipeline.train", "wavflow.cli.app"])


class Command:
    """A running command; what it says goes to the file `said`.

    Args:
        arguments: as after `wavflow`.
        said: a file for its standard output and error.
        limit: bytes that no file it writes may grow beyond.
    """

    def __init__(self, arguments: list[str], said: Path, limit: int | None = None) -> None:
        self.said = said
        self._process = _fork.Process(target=_run, args=(arguments, said, limit))
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, signum: signal.Signals) -> None:
        os.kill(self._process.pid, signum)

    def wait(self, seconds: float = 300) -> int:
        """Its exit status, as a shell has it: 128 and the signal that killed it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it still runs"
        code = self._process.exitcode
        return 128 - code if code < 0 else code


def _run(arguments: list[str], said: Path, limit: int | None) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from wavflow.cli.app import main

    main(arguments)
