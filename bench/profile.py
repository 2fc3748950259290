"""``python -m bench.run profile``: where a training and a guided sampling step spend their time.

The trainer's own step and a guided step of the network with prepared weights, on random weights and
noise, under torch's profiler. For each a table of the step's parts, one of the operations that take
the most time, and a trace for chrome://tracing or https://ui.perfetto.dev. Times are the device's:
on CUDA of kernels, on a CPU of calls without the calls inside them. The profiler's own cost is in
them: shares say more than seconds, which ``bench.run train`` and ``bench.run sample`` measure.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from bench.data import clips
from bench.machine import fail, machine
from bench.stages import PARTS, Meter
from bench.train import MODELS, Job, network, our_step
from bench.weights import inputs
from wavflow.base.files import write_json
from wavflow.base.memory import keep_freed_memory
from wavflow.base.precision import resolve_device, resolve_dtype
from wavflow.systems.wavflow.network import WavflowModel

STEP, PYTHON = "step", "(Python between the operations)"
DTYPES = ("auto", "bfloat16", "float32")
_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer.step"


@dataclass(frozen=True)
class Line:
    """What some calls take of a step, on average.

    Attributes:
        seconds: in a step.
        share: of the step, from 0 to 1.
        calls: in a step.
    """

    name: str
    seconds: float
    share: float
    calls: float


class _Ranges(Meter):
    """A meter that names stages for the profiler, and measures nothing."""

    def __init__(self) -> None:
        super().__init__(time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with record_function(name):
            yield


def profiled(
    step: Callable[[], object], watched: WavflowModel, steps: int, trace: Path
) -> dict[str, list[Line]]:
    """The parts and the operations of a step, longest first; writes the trace.

    Args:
        step: what is profiled; called once before.
        watched: the network that it runs.
        steps: to average over.
        trace: of Chrome's format; ".json.gz" compresses it.
    """
    device = watched.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step()
    with _Ranges().watching(watched), profile(activities=activities) as found:
        for _ in range(steps):
            with record_function(STEP):
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    events = found.key_averages()
    if device.type == "cuda":
        return lines(events, steps, "device_time_total", "self_device_time_total")
    return lines(events, steps, "cpu_time_total", "self_cpu_time_total")


def lines(events: Any, steps: int, total: str, own: str) -> dict[str, list[Line]]:
    """Parts and operations of the profiler's averages.

    Args:
        events: with `key`, `count`, `is_user_annotation`, and microseconds.
        steps: that they are of.
        total, own: names of the microseconds with and without what is called inside.
    """
    parts = dict.fromkeys((*PARTS, "backward", "optimizer"), (0.0, 0))
    ops: dict[str, tuple[float, int]] = {}
    whole = 0.0

    def add(to: dict[str, tuple[float, int]], name: str, seconds: float, calls: int) -> None:
        before, times = to.get(name, (0.0, 0))
        to[name] = before + seconds, times + calls

    for event in events:
        inside, alone = getattr(event, total) / 1e6, getattr(event, own) / 1e6
        if event.key == STEP:
            whole += inside
        elif event.key in PARTS:
            add(parts, event.key, inside, event.count)
        elif event.key.startswith(_BACKWARD):
            add(parts, "backward", inside, event.count)
        elif event.key.startswith(_OPTIMIZER):
            add(parts, "optimizer", inside, event.count)
        if event.is_user_annotation:
            add(ops, PYTHON, alone, 0)
        else:
            add(ops, event.key, alone, event.count)
    rest = whole - sum(seconds for seconds, _ in parts.values())
    parts["the rest"] = max(rest, 0.0), steps

    def sorted_lines(found: dict[str, tuple[float, int]]) -> list[Line]:
        made = [
            Line(name, seconds / steps, seconds / whole if whole else 0.0, calls / steps)
            for name, (seconds, calls) in found.items()
            if seconds > 0
        ]
        return sorted(made, key=lambda line: -line.seconds)

    return {"parts": sorted_lines(parts), "operations": sorted_lines(ops)}


def training(job: Job) -> tuple[Callable[[], object], WavflowModel]:
    """The trainer's step, and the network in it."""
    step, trainer = our_step(job, clips(job.config().data, job.batch, job.where))
    model = trainer.model
    assert isinstance(model, WavflowModel)
    return step, model


def sampling(job: Job, guidance: float) -> tuple[Callable[[], object], WavflowModel]:
    """A guided step with conditions that are made, and the prepared network that it runs."""
    model = network(job.config(), job.where).eval().requires_grad_(False)
    *features, latent, t = inputs(model, job.batch)

    def cast() -> torch.autocast:
        return torch.autocast(job.device, job.kind, enabled=job.dtype != "float32")

    with torch.inference_mode(), cast():
        conditions = model.preprocess_conditions(*features)
        empty = model.get_empty_conditions(job.batch)
        prepared = model._prepared(conditions)

    def step() -> object:
        with torch.inference_mode(), cast():
            return model.ode_wrapper(t, latent, conditions, empty, guidance)

    return step, prepared


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS) + ".")] = "toy_8k",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "auto",
    batch: Annotated[int, typer.Option(help="Clips.", min=1)] = 4,
    guidance: Annotated[float, typer.Option(help="Of the sampling step.")] = 4.5,
    steps: Annotated[int, typer.Option(help="To average over.", min=1)] = 3,
    top: Annotated[int, typer.Option(help="Operations to print.", min=1)] = 15,
    out: Annotated[Path, typer.Option(help="Folder of traces and profile.json.")] = Path(
        "build/profile"
    ),
) -> None:
    """Show the parts and the operations that a training and a sampling step spend their time in."""
    if model not in MODELS:
        fail(f"bench.run profile: --model is '{model}', wanted one of {', '.join(MODELS)}")
    if dtype not in DTYPES:
        fail(f"bench.run profile: --dtype is '{dtype}', wanted one of {', '.join(DTYPES)}")
    if device not in ("auto", "cpu", "cuda") or (
        device == "cuda" and not torch.cuda.is_available()
    ):
        fail(f"bench.run profile: --device {device} cannot be used")
    where = resolve_device(device)
    kind = str(resolve_dtype(dtype, where)).removeprefix("torch.")
    if where.type == "cpu":
        keep_freed_memory()
    found: dict[str, Any] = {"model": model, "batch": batch, "dtype": kind} | machine(where)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, batch, where.type, kind, Path(folder))
        for name, made in (("train", training(job)), ("sample", sampling(job, guidance))):
            trace = out / f"{name}.json.gz"
            kinds = profiled(*made, steps, trace)
            found[name] = {part: [asdict(line) for line in all] for part, all in kinds.items()}
            what = "training step" if name == "train" else "guided sampling step"
            about = f"{what} of {model}, {batch} clips, {kind}"
            show(console, f"Parts of a {about}", kinds["parts"])
            show(console, f"Operations of a {about}", kinds["operations"][:top])
            console.print(f"trace: {trace}\n")
    write_json(out / "profile.json", found)
    console.print(f"{found['device']}, torch {found['torch']}, {found['threads']} threads")


def show(console: Console, title: str, found: list[Line]) -> None:
    console.print(title, style="bold")
    table = Table("", "ms", "share", "calls", "")
    for line in found:
        cells = f"{line.seconds * 1e3:.2f}", f"{line.share:.1%}", f"{line.calls:g}"
        table.add_row(line.name, *cells, "█" * round(30 * line.share))
    console.print(table)
