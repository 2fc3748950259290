"""What a run leaves to read: training.log, metrics.jsonl, and its progress on the console."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wavflow.console import console, progress_bar
from wavflow.files import atomic_write

log = logging.getLogger("wavflow")

# Seconds between lines where the console is not a terminal.
LINE_EVERY = 10.0


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends the `wavflow` log, with its debug lines, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def append_metrics(path: Path, line: dict[str, float]) -> None:
    """Adds one JSON line, and says it in the log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.debug("%s", " ".join(f"{key} {value:.5g}" for key, value in line.items()))


def drop_metrics_after(path: Path, step: int) -> None:
    """Removes lines of steps that a resumed run will take again, and a half-written one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            log.warning("%s: dropped a broken line", path)
    with atomic_write(path, "w") as file:
        file.writelines(kept)


class Speed:
    """Clips per second over the last steps."""

    WINDOW = 20

    def __init__(self) -> None:
        self.times = deque([time.monotonic()], self.WINDOW + 1)
        self.counts: deque[int] = deque(maxlen=self.WINDOW)

    def add(self, clips: int) -> None:
        """Counts the clips of a step that has just ended."""
        self.times.append(time.monotonic())
        self.counts.append(clips)

    @property
    def clips_per_second(self) -> float:
        return sum(self.counts) / max(self.times[-1] - self.times[0], 1e-9)


@contextmanager
def display() -> Iterator[Callable[[float, float, str], None]]:
    """Yields a function (share done, seconds so far, text): a bar on a terminal, else lines."""
    if console().is_terminal:
        with progress_bar("{task.fields[text]}") as bar:
            task = bar.add_task("train", total=1.0, text="")
            yield lambda done, seconds, text: bar.update(
                task, completed=done, text=f"{text}  {_left(done, seconds)} left"
            )
        return
    said = time.monotonic()

    def line(done: float, seconds: float, text: str) -> None:
        nonlocal said
        if time.monotonic() - said > LINE_EVERY:
            said = time.monotonic()
            log.info("%s  %s left", text, _left(done, seconds))

    yield line


def _left(done: float, seconds: float) -> str:
    left = round(seconds * (1 - done) / done) if done else 0
    hours, rest = divmod(left, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
