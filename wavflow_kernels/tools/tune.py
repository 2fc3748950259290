"""``python -m wavflow_kernels.tools.tune``: tile sizes and backends timed on this GPU, best kept.

For each op whose Triton module offers candidates, and each of its workloads, every candidate is
compiled, compared with the library's result or the first candidate's, and timed; the three best and
the library are then timed again in turns. Rows go to the keys that the calls themselves look up, so
that no key is written twice in the code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from .. import REGISTRY, _backend, _tuned, use_backend
from .._registry import Op, by_name, tensors
from .timing import Timing, interleaved

Row = dict[str, Any]
# Times calls: (calls by name, seconds each) -> timings by name.
Timer = Callable[[Mapping[str, Callable[[], object]], float], dict[str, Timing]]
LIBRARY = json.dumps({"backend": "library"})
FINALISTS = 3
WRONG = 0.02  # relative L2 distance that no rounding explains


@dataclass(frozen=True)
class Task:
    """One workload of one op to be tuned."""

    op: Op
    workload: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name}, {self.workload}, {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Measured:
    """Seconds of each way to run a task, by the row that asks for it; keys the calls looked up."""

    seconds: dict[str, float] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    tried: int = 0
    offered: int = 0
    notes: list[str] = field(default_factory=list)


def candidates_of(op: Op) -> Callable[..., list[Row]] | None:
    """The function of the op's Triton module that lists configurations for a call, if any.

    It is called `candidates`; for the backward in a module of both, `backward_candidates`.
    """
    if "triton" not in op.supported:
        return None
    name = f"wavflow_kernels._triton.{op.stem}"
    if importlib.util.find_spec(name) is None:
        return None
    function = "backward_candidates" if op.name.endswith("_backward") else "candidates"
    offered = getattr(importlib.import_module(name), function, None)
    return None if offered is None else by_name(offered, op.arguments)


def tasks(ops: Sequence[Op], dtypes: Sequence[torch.dtype]) -> list[Task]:
    """List what is to be tuned, the first workload of every op before the second of any."""
    tunable = [op for op in ops if candidates_of(op) is not None]
    depth = max((len(op.workloads) for op in tunable), default=0)
    return [
        Task(op, list(op.workloads)[i], dtype)
        for dtype in dtypes
        for i in range(depth)
        for op in tunable
        if i < len(op.workloads)
    ]


def measure(
    op: Op,
    args: Sequence[Any],
    configs: Sequence[Row],
    timer: Timer,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time the library and the configurations, as many as `seconds` allow, on one call's arguments.

    A configuration that does not compile or fit on the device, or whose result is wrong, is noted
    and left out.
    """
    end = clock() + seconds
    found = Measured(offered=len(configs))
    first = op.first(args)
    rows: list[Row] = [{"backend": "triton", "config": config} for config in configs]
    if not _backend.unavailable(op, "library", first.device, first.dtype):
        rows.insert(0, {"backend": "library"})

    def call(row: Row) -> Callable[[], object]:
        def timed() -> object:
            with _tuned.trying(op.name, row):
                return op(*args)

        return timed

    refusals: tuple[type[Exception], ...] = (RuntimeError, *_triton_errors())
    truth: list[torch.Tensor] = []
    rough: dict[str, float] = {}
    for row in rows:
        if clock() > end and found.tried:
            break
        name = json.dumps(row, sort_keys=True)
        try:
            with _tuned.keys_asked(op.name) as keys:
                outs = list(tensors([call(row)()]))
        except refusals as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found.notes.append(f"{name}: {first_line}")
            continue
        found.keys |= keys
        truth = truth or [out.double() for out in outs]
        distance = max(_distance(out, wanted) for out, wanted in zip(outs, truth, strict=False))
        if not distance <= WRONG:
            found.notes.append(f"{name}: wrong result, off by {distance:.2g}")
            continue
        found.tried += row["backend"] == "triton"
        rough[name] = timer({name: call(row)}, 0.01)[name].median
    best = sorted(rough, key=rough.__getitem__)[:FINALISTS]
    best += [LIBRARY] if LIBRARY in rough and LIBRARY not in best else []
    if best:
        times = timer({name: call(json.loads(name)) for name in best}, 0.05)
        found.seconds = {name: timing.median for name, timing in times.items()}
    return found


def _distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _triton_errors() -> tuple[type[Exception], ...]:
    if importlib.util.find_spec("triton") is None:
        return ()
    return (importlib.import_module("triton.errors").TritonError,)


def winner(measured: Sequence[Measured]) -> Row:
    """The row of a key from all workloads that share it.

    Each way to run is judged by its mean time over the best one's, over the workloads it was
    measured on; those measured on the most workloads come first. The backend is the fastest; the
    configuration is the fastest Triton one, whichever backend won.
    """
    slowness: dict[str, list[float]] = {}
    for one in measured:
        best = min(one.seconds.values())
        for name, seconds in one.seconds.items():
            slowness.setdefault(name, []).append(seconds / best)
    ranked = sorted(slowness, key=lambda n: (-len(slowness[n]), sum(slowness[n])))
    last = measured[-1].seconds
    backend = json.loads(ranked[0])["backend"]
    row: Row = {"backend": backend, "us": {}}
    for name in ranked:
        parsed = json.loads(name)
        if parsed["backend"] == "triton" and "config" not in row:
            row["config"] = parsed["config"]
        if name in last:
            row["us"].setdefault(parsed["backend"], round(last[name] * 1e6, 2))
    return row


def write(path: Path, about: Row, ops: Mapping[str, Mapping[str, Row]]) -> None:
    """Merge rows into the table at `path`, in one step; rows of other versions are dropped."""
    old: Mapping[str, Mapping[str, Row]] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in about} == dict(about):
            old = found["ops"]
    merged = {name: {**old.get(name, {}), **ops.get(name, {})} for name in {*old, *ops}}
    sorted_ops = {name: dict(sorted(merged[name].items())) for name in sorted(merged)}
    text = json.dumps({**about, "ops": sorted_ops}, indent=1, sort_keys=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tune(
    todo: Sequence[Task],
    device: torch.device,
    path: Path,
    about: Row,
    timer: Timer,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[Task, Measured | None]]:
    """Measure the tasks in turn, each with an equal share of the time left, and keep the winners.

    The table is written after each. Yields (task, what was measured); None when the time is up.
    """
    end = clock() + seconds
    by_key: dict[tuple[str, str], list[Measured]] = {}
    for i, task in enumerate(todo):
        left = end - clock()
        if left <= 0:
            yield task, None
            continue
        candidates = candidates_of(task.op)
        assert candidates is not None  # tasks() lists no other op
        args = task.op.workloads[task.workload](device, task.dtype)
        configs = candidates(*args)
        with torch.no_grad():
            found = measure(task.op, args, configs, timer, left / (len(todo) - i), clock)
        if found.seconds:
            rows: dict[str, Row] = {}
            for key in found.keys:
                shared = by_key.setdefault((task.op.name, key), [])
                shared.append(found)
                rows[key] = winner(shared)
            write(path, about, {task.op.name: rows})
        yield task, found
    _tuned.table.cache_clear()


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Names; default all.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (default), float16, float32; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="In all, compilation included.")] = 600.0,
    folder: Annotated[Path, typer.Option(help="Where the table goes.")] = _tuned.FOLDER,
) -> None:
    """Measure tile sizes and backends on this GPU and write the table that calls choose by."""
    from rich.console import Console
    from rich.progress import Progress

    names, dtypes = ops or sorted(REGISTRY), dtype or ["bfloat16"]
    for name in names:
        if name not in REGISTRY:
            _fail(f"no op '{name}'; there are {', '.join(sorted(REGISTRY))}")
    for name in dtypes:
        if name not in ("bfloat16", "float16", "float32"):
            _fail(f"--dtype is '{name}', wanted bfloat16, float16 or float32")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        _fail(f"--device: {str(error).splitlines()[0]}")
    if where.type != "cuda":
        _fail(f"--device is '{device}', wanted cuda or cuda:N")
    where = torch.device("cuda", where.index or 0)
    reason = _backend.triton_reason(where)
    if reason:
        _fail(reason)
    gpu = torch.cuda.get_device_name(where)
    path = folder / f"{_tuned.slug(gpu)}.json"
    about = {
        "device": gpu,
        "capability": list(torch.cuda.get_device_capability(where)),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    todo = tasks([REGISTRY[name] for name in names], [getattr(torch, name) for name in dtypes])
    if not todo:
        _fail(f"none of {', '.join(names)} has Triton configurations to choose from")

    def timer(calls: Mapping[str, Callable[[], object]], each: float) -> dict[str, Timing]:
        return interleaved(calls, where, each, warmup=2)

    failed = 0
    with Progress(console=Console(stderr=True), transient=True) as bar, use_backend(None):
        shown = bar.add_task("tuning", total=len(todo))
        for task, found in tune(todo, where, path, about, timer, seconds):
            bar.advance(shown)
            print(_line(task, found), flush=True)
            failed += found is not None and not found.seconds
    print(f"{path}: {len(todo)} calls, {failed} of them without any way that runs")
    raise SystemExit(1 if failed else 0)


def _line(task: Task, found: Measured | None) -> str:
    if found is None:
        return f"{task}: skipped, the time was up"
    notes = "".join(f"\n  left out {note}" for note in found.notes)
    if not found.seconds:
        return f"{task}: nothing ran{notes}"
    best = min(found.seconds, key=found.seconds.__getitem__)
    library = found.seconds.get(LIBRARY)
    against = "" if library is None else f", library {library * 1e6:.0f} us"
    return (
        f"{task}: {found.seconds[best] * 1e6:.0f} us by {best}{against}; "
        f"{found.tried} of {found.offered} configurations tried{notes}"
    )


def _fail(message: str) -> NoReturn:
    print(f"wavflow_kernels.tools.tune: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    typer.run(main)
