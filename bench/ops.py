"""``python -m bench.run [op ...]``: every op against eager torch, torch.compile and the libraries.

Rows are the workloads of the ops, forward and, where training needs it, forward and backward.
Whole calls are timed, outputs allocated in them on every side from memory that is kept between
calls. The plain copy moves as many bytes as the op must at least move, into memory of its own: the
floor of a memory-bound op. Percentages are of this machine's own peaks, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import wavflow_kernels as wk
from bench.machine import fail, free_memory, machine
from bench.peaks import Peaks, measure
from bench.peers import PEERS, TRAINED, backward_flops, reference_bytes
from wavflow.base.files import write_json
from wavflow.base.memory import keep_freed_memory
from wavflow_kernels import REGISTRY, _backend
from wavflow_kernels._registry import Op, tensors
from wavflow_kernels.tools.timing import interleaved

DTYPES = ("bfloat16", "float16", "float32", "float64")
NO_TIME = "the time was up"
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    op: Op
    workload: str
    training: bool  # forward and backward through autograd

    def __str__(self) -> str:
        return f"{self.op.name}, {self.workload}{', with backward' if self.training else ''}"


def differentiated(op: Op) -> tuple[int, ...]:
    """Which arguments get gradients in a training row."""
    if op.backward is None or op.internal:
        return ()
    if op.name in TRAINED:
        return TRAINED[op.name]
    samples = op.samples(torch.device("cpu"), torch.float32, 0)
    return tuple(sorted({i for sample in samples for i in sample.differentiable}))


def cases(names: Sequence[str], only: str = "") -> list[Case]:
    """All rows of the named ops whose workload holds the text `only`, in order of importance.

    Every op's first workload comes before any op's second, and backwards of the later ones last.
    """
    found = [
        (training and i > 0, i, training, Case(REGISTRY[name], workload, training))
        for name in names
        for i, workload in enumerate(w for w in REGISTRY[name].workloads if only in w)
        for training in ((False, True) if differentiated(REGISTRY[name]) else (False,))
    ]
    return [case for *_, case in sorted(found, key=lambda item: item[:3])]


def training_step(op: Op, call: Callable[..., Any], args: Sequence[Any]) -> Call:
    """A function that runs forward and backward; `call` takes the op's arguments."""
    args, inputs = list(args), []
    for i in differentiated(op):
        leaves = [t.detach().clone().requires_grad_() for t in tensors([args[i]])]
        inputs += leaves
        if leaves:
            args[i] = leaves if isinstance(args[i], (list, tuple)) else leaves[0]
    grads: list[Tensor] = []

    def step() -> object:
        outs = list(tensors([call(*args)]))[: op.differentiable_outputs]
        if not grads:
            grads.extend(torch.randn_like(out) for out in outs)
        return torch.autograd.grad(outs, inputs, grads)

    return step


def variants(case: Case, args: tuple[Any, ...], with_compile: bool) -> dict[str, Call]:
    """The calls that are compared, by name; the first is what a call gets here."""
    op = case.op
    first = op.first(args)

    def runs(backend: str | None, call: Callable[..., Any] = op) -> Call:
        inner = training_step(op, call, args) if case.training else (lambda: call(*args))

        def timed() -> object:
            with wk.use_backend(backend):
                return inner()

        return timed

    chosen = _backend.choose(op, first.device, first.dtype, args)
    calls = {chosen: runs(None)}
    for backend in ("cpp", "triton", "library"):
        if backend != chosen and not _backend.unavailable(op, backend, first.device, first.dtype):
            calls[backend] = runs(backend)
    calls.setdefault("reference", runs("reference"))
    if with_compile:
        # For these sizes alone; use_backend("compile") compiles for all sizes at the second.
        calls.setdefault("compile", runs("reference", torch.compile(op.reference, dynamic=False)))
    if not case.training:
        source = torch.empty(max(op.bytes(*args) // 2, 1), dtype=torch.int8, device=first.device)
        target = torch.empty_like(source)
        calls["copy"] = lambda: target.copy_(source)
        calls |= PEERS[op.name](*args) if op.name in PEERS else {}
    return calls


def runnable(
    calls: dict[str, Call], reset: Call, needs: int, free: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """The variants that run here, and why the others do not. The first one must run.

    needs: bytes that the reference takes; reset: called before each.
    """
    kept, left_out = {}, {}
    for i, (name, call) in enumerate(calls.items()):
        if name in ("reference", "compile") and i and needs > 0.8 * free:
            left_out[name] = f"needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            continue
        try:
            reset()
            call()
            kept[name] = call
        except (RuntimeError, NotImplementedError) as error:
            if i == 0:
                raise
            left_out[name] = str(error).strip().split("\n")[0][:200]
    return kept, left_out


def measure_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    peaks: Peaks,
    seconds: float,
    with_compile: bool = True,
) -> dict[str, Any]:
    """One row of the results; `skipped` in place of figures if the memory is too small."""
    op, make = case.op, case.op.workloads[case.workload]
    about: dict[str, Any] = {
        "op": op.name,
        "workload": case.workload,
        "direction": "forward and backward" if case.training else "forward",
        "dtype": str(dtype).removeprefix("torch."),
    }
    meta = make(torch.device("meta"), dtype)
    size, free = op.bytes(*meta), free_memory(device)
    if 6 * size > free:
        return about | {"skipped": f"needs {6 * size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    args = make(device, dtype)
    with torch.set_grad_enabled(case.training):
        reset, needs = resetting(op, args), reference_bytes(op.name, *args)
        calls, left_out = runnable(variants(case, args, with_compile), reset, needs, free)
        chosen = next(iter(calls))
        if not with_compile:
            left_out["compile"] = NO_TIME
        times = interleaved(calls, device, seconds, reset=reset)
        reset()
        memory = peak_memory(calls[chosen], device)
    ours = times[chosen].median
    flops = op.flops(*args)
    flops = flops if not case.training else backward_flops(op.name, flops)
    row = about | {
        "shapes": [tuple(t.shape) for t in tensors(args)],
        "runs_as": chosen,
        "seconds": {name: asdict(timing) for name, timing in times.items()},
        "left_out": left_out,
        "peaks": asdict(peaks),
        "peak_memory": memory,
    }
    if not case.training:
        row |= {"bytes": size, "gb_s": size / ours / 1e9, "of_copy_peak": size / ours / peaks.copy}
    if op.tolerance == "matrix":
        row |= {"flops": flops, "tflop_s": flops / ours / 1e12}
        row |= {"of_gemm_peak": flops / ours / peaks.gemm}
    return row


def resetting(op: Op, args: Sequence[Any]) -> Callable[[], object]:
    """A function that puts the index an in-place op advances back to its first row."""

    def reset() -> None:
        if op.mutates:
            for tensor in op.mutated(args):
                if not tensor.is_floating_point():
                    tensor.zero_()

    return reset


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call needs at most beyond its arguments; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """How many times faster than each other variant the chosen one is."""
    ours = row["seconds"][row["runs_as"]]["median"]
    return {n: t["median"] / ours for n, t in row["seconds"].items() if n != row["runs_as"]}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    name = row["op"] + (" + backward" if row["direction"] != "forward" else "")
    if "seconds" not in row:
        reason = row.get("failed") or row["skipped"]
        return [name, row["workload"], ("failed: " if "failed" in row else "skipped: ") + reason]
    time_, faster = row["seconds"][row["runs_as"]], ratios(row)
    others = {n: x for n, x in faster.items() if n not in ("reference", "compile", "copy")}
    best = min(others, key=others.__getitem__, default=None)

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        name,
        row["workload"],
        row["runs_as"],
        f"{time_['median'] * 1e6:.0f}",
        f"{(time_['high'] - time_['low']) / time_['median']:.0%}",
        shown(row.get("gb_s"), ".0f"),
        shown(row.get("of_copy_peak"), ".0%"),
        shown(faster.get("copy"), ".2f"),
        shown(row.get("tflop_s"), ".2f"),
        shown(row.get("of_gemm_peak"), ".0%"),
        shown(faster.get("reference"), ".2f"),
        shown(faster.get("compile"), ".2f"),
        "-" if best is None else f"{others[best]:.2f} {best}",
    ]


HEADERS = ("op", "workload", "runs as", "us", "spread", "GB/s", "% copy", "x copy", "TFLOP/s",
           "% GEMM", "x eager", "x compile", "x best other")  # fmt: skip


def results(
    todo: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    budget: float | None,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The rows, one at a time.

    With a budget of seconds all rows come first without torch.compile, which takes seconds for each
    of them, and then again with it, as many as the budget allows.
    """
    start, about = time.perf_counter(), machine(device)
    peaks = measure(device, dtype)
    for with_compile in (True,) if budget is None else (False, True):
        for case in todo:
            up = budget is not None and time.perf_counter() - start > budget
            if up and with_compile:
                return
            row: dict[str, Any] = {
                "op": case.op.name,
                "workload": case.workload,
                "direction": "forward and backward" if case.training else "forward",
            }
            if up:
                yield case, row | {"skipped": NO_TIME} | about
                continue
            try:
                row |= measure_case(case, device, dtype, peaks, seconds, with_compile)
            except Exception as error:  # one broken kernel must not cost the other rows
                message = (str(error).strip().splitlines() or [""])[0]
                row["failed"] = f"{type(error).__name__}: {message}"
            torch._dynamo.reset()
            yield case, row | about


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Names; default all.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES) + ".")] = "bfloat16",
    only: Annotated[str, typer.Option(help="Workloads whose names hold this text.")] = "",
    seconds: Annotated[float, typer.Option(help="Per row and variant.")] = 1.0,
    budget: Annotated[
        float | None, typer.Option(help="Seconds in all: torch.compile last, as far as they go.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time ops and print what share of the machine's peaks they reach, and the ratio to peers."""
    names = ops or sorted(REGISTRY)
    for name in names:
        if name not in REGISTRY:
            fail(f"bench.run: no op '{name}'; there are {', '.join(sorted(REGISTRY))}")
    if dtype not in DTYPES:
        fail(f"bench.run: --dtype is '{dtype}', wanted one of {', '.join(DTYPES)}")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        fail(f"bench.run: --device {device} cannot be used: {str(error).splitlines()[0]}")
    todo = cases(names, only)
    if not todo:
        fail(f"bench.run: no workload of {', '.join(names)} has '{only}' in its name")
    if where.type == "cpu" and not keep_freed_memory():
        print("this C library gives memory back: outputs cost their page faults on every call")
    if where.type == "cuda":
        # Ours hold float32; cuDNN would compute in TF32 by default.
        torch.backends.cudnn.allow_tf32 = False
    rows: dict[str, dict[str, Any]] = {}
    for case, row in results(todo, where, getattr(torch, dtype), seconds, budget):
        rows[str(case)] = row
        if json_path is not None:
            write_json(json_path, list(rows.values()))
        line = zip(HEADERS, cells(row), strict=False)
        print("; ".join(f"{header} {cell}" for header, cell in line), flush=True)
    show(list(rows.values()), dtype)
    raise SystemExit(1 if any("failed" in row for row in rows.values()) else 0)


def show(rows: Sequence[dict[str, Any]], dtype: str) -> None:
    """Print the table, and how many rows are not in it."""
    console = Console()
    console.width = max(console.width, 190)
    table = Table(*(Column(header, no_wrap=True) for header in HEADERS))
    for row in rows:
        if "seconds" in row:
            table.add_row(*cells(row))
    console.print(table)
    about = rows[0]
    console.print(f"{about['device']}, torch {about['torch']}, {about['threads']} threads, {dtype}")
    failed, skipped = (sum(key in row for row in rows) for key in ("failed", "skipped"))
    print(f"{len(rows)} rows: {failed} failed, {skipped} skipped")
