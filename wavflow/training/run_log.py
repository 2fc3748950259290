"""What a run shows: training.log, metrics.jsonl, TensorBoard, samples, its progress."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wavflow.base.console import console, progress_bar
from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, check_id
from wavflow.media import pictures
from wavflow.media.audio import save_wav

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("wavflow")

METRICS = "metrics.jsonl"
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a broken one of a killed run is left out, aloud."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            found.append({"step": int(values["step"])} | values)
        except (ValueError, TypeError, KeyError):
            log.warning("%s: left out line %d, which is broken", path, number)
    return found


@dataclass(frozen=True)
class Sample:
    """What a run generated for a clip: waves (t,) in [-1, 1] at `rate` Hz, and the clip's own."""

    id: str
    rate: int
    generated: Tensor
    true: Tensor | None = None


class RunLog:
    """Writes down what a run shows, as a context manager.

    Metrics go to `out`/metrics.jsonl, the debug log and TensorBoard (`out`/tensorboard), samples
    to wav files, a picture and TensorBoard, progress to the console.

    Args:
        out: the run's folder.
        tensorboard: True, False, or "auto": where it is installed.
        first_step: the last step that a resumed run has behind it. Metrics of later ones, which
            it will take again, are dropped on entering.

    Raises:
        InputError: `tensorboard` is True and the package is not there.
    """

    def __init__(self, out: Path, *, tensorboard: bool | str = "auto", first_step: int = 0) -> None:
        self.out = out
        self._metrics = out / METRICS
        self._first_step = first_step
        self._writer_class = _summary_writer(tensorboard is True) if tensorboard else None
        self._writer: SummaryWriter | None = None
        self._open = ExitStack()

    def __enter__(self) -> RunLog:
        self.out.mkdir(parents=True, exist_ok=True)
        self._drop_later_metrics()
        if self._writer_class is not None:
            self._writer = self._writer_class(
                str(self.out / "tensorboard"), purge_step=self._first_step + 1, flush_secs=10
            )
            self._open.callback(self._writer.close)
        self._show = self._open.enter_context(_display())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of a step; `group/name` is one of a group. Non-finite ones are null."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        log.debug("step %d %s", step, " ".join(f"{key} {v:.5g}" for key, v in values.items()))
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def samples(self, step: int, folder: Path, samples: Sequence[Sample]) -> None:
        """Writes gen_rank0_id_<id>.wav, gt_rank0_id_<id>.wav and spectrograms.png into `folder`.

        Raises:
            InputError: an id that is no file name; a wave that is empty or not finite.
        """
        for sample in samples:
            check_id(sample.id)
        for sample in samples:
            for kind, name, wave in (
                ("gt", "true", sample.true),
                ("gen", "generated", sample.generated),
            ):
                if wave is None:
                    continue
                save_wav(folder / f"{kind}_rank0_id_{sample.id}.wav", wave, sample.rate)
                if self._writer is not None:
                    shown = wave.detach().float().cpu().clamp(-1, 1)
                    self._writer.add_audio(f"{sample.id}/{name}", shown, step, sample.rate)
        if not samples:
            return
        if not pictures.can_draw():
            log.info("no spectrograms.png: needs matplotlib (%s)", pictures.INSTALL)
            return
        self._draw(step, folder / "spectrograms.png", samples)

    def progress(self, done_share: float, seconds: float, text: str) -> None:
        """Shows how much of the run (0 to 1) took `seconds`: a bar on a terminal, else lines."""
        self._show(done_share, seconds, text)

    def _draw(self, step: int, path: Path, samples: Sequence[Sample]) -> None:
        columns = []
        for sample in samples:
            true = {} if sample.true is None else {"true": sample.true}
            columns.append((sample.id, sample.rate, true | {"generated": sample.generated}))
        pictures.save(pictures.draw_spectrograms(columns), path)
        if self._writer is not None:
            from matplotlib.image import imread

            self._writer.add_image("samples", imread(path), step, dataformats="HWC")

    def _drop_later_metrics(self) -> None:
        if not self._metrics.exists():
            return
        lines = read_metrics(self._metrics)
        with atomic_write(self._metrics, "w") as file:
            for line in lines:
                if line["step"] <= self._first_step:
                    file.write(json.dumps(line) + "\n")


def _summary_writer(needed: bool) -> type[SummaryWriter] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        text = "the package tensorboard is not installed (pip install 'wavflow[tensorboard]')"
        if needed:
            raise InputError(f"tensorboard is true, but {text}") from None
        log.info("no TensorBoard: %s", text)
        return None
    return SummaryWriter


@contextmanager
def _display() -> Iterator[Callable[[float, float, str], None]]:
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
