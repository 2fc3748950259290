"""What is shown to people: one console on stderr, its log lines and progress bars."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@functools.cache
def console() -> Console:
    """The console on stderr; stdout is left to results."""
    from rich.console import Console

    return Console(stderr=True)


class _Handler(logging.Handler):
    """Prints above a running progress bar, one record on one line."""

    def emit(self, record: logging.LogRecord) -> None:
        console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def show_log(level: int = logging.INFO) -> None:
    """Shows the `wavflow` log on the console; without this only warnings reach stderr."""
    logger = logging.getLogger("wavflow")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler(level))
    logger.setLevel(level)


def progress_bar(text: str) -> Progress:
    """A progress bar that ends in `text`, a rich format over the task's fields."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn(text),
        TimeElapsedColumn(),
        console=console(),
        transient=True,
    )


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar with rate and time left; yields a function (done, total) that moves it.

    Time counts from the start of the block; the bar starts at the first call. Its thread must not
    exist yet when a job forks its workers.
    """
    bar = progress_bar("{task.completed}/{task.total}  {task.fields[pace]}")
    task = bar.add_task(what, total=None, pace="")
    begun = time.monotonic()

    def show(done: int, total: int) -> None:
        pace = ""
        if done:
            each = (time.monotonic() - begun) / done
            left = int(each * (total - done))
            pace = f"{1 / max(each, 1e-9):.1f}/s  {left // 60}:{left % 60:02d} left"
        bar.start()
        bar.update(task, completed=done, total=total, pace=pace)

    try:
        yield show
    finally:
        bar.stop()
