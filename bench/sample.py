"""``python -m bench.run sample``: a guided step of the network against the plain way.

Ours runs through the drop-in path alone: ``inference_mode``, autocast, ``preprocess_conditions``,
``get_empty_conditions``, ``ode_wrapper``. Peers run on the same weights and inputs, in turns with
it: the network as it is usually written (:mod:`bench.plain`) under autocast and with its weights
cast, compiled if asked for, and another checkout's ``wavflow.model.networks`` in a process of its
own. Differences are relative to the plain network in float32.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import plain
from bench.harness import fail, machine
from wavflow.files import write_json
from wavflow.memory import keep_freed_memory
from wavflow.model.networks import PRESETS, WavflowModel, get_wavflow_model
from wavflow_kernels._timing import interleaved

T, SEED = 0.4, 0
CLIP_SECONDS = {name: 2.0 if name == "toy_8k" else 8.0 for name in PRESETS}
CHILD = """
import sys, torch
from wavflow.model.networks import get_wavflow_model
job = torch.load(sys.stdin.buffer.readline().strip().decode(), weights_only=True)
device, dtype = job["device"], getattr(torch, job["dtype"])
torch.set_num_threads(job["threads"])
model = get_wavflow_model(job["model"])
model.load_state_dict(job["state"], strict=False)
model = model.to(device).eval()
clip, sync, text, latent, t = (x.to(device) for x in job["inputs"])
with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
    conditions = model.preprocess_conditions(clip, sync, text)
    empty = model.get_empty_conditions(len(latent))
    for line in sys.stdin.buffer:
        out = model.ode_wrapper(t, latent, conditions, empty, job["guidance"])
        if device == "cuda":
            torch.cuda.synchronize()
        if line.strip():
            torch.save(out.float().cpu(), line.strip().decode())
        print("done", flush=True)
"""


class Checkout:
    """Another checkout's network in a child process, one step for a line on its stdin."""

    def __init__(self, path: Path, job: dict[str, Any], folder: Path) -> None:
        torch.save(job, folder / "job.pt")
        self._output = folder / "out.pt"
        self._child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env={**os.environ, "PYTHONPATH": str(path)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ask(str(folder / "job.pt"))

    def _ask(self, line: str) -> None:
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()

    def _step(self, line: str) -> None:
        self._ask(line)
        if not self._child.stdout.readline():
            fail(f"bench.run sample: the checkout's process ended with code {self._child.wait()}")

    def step(self) -> None:
        self._step("")

    def output(self) -> Tensor:
        self._step(str(self._output))
        return torch.load(self._output, weights_only=True)

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()


def filled(name: str, device: torch.device) -> WavflowModel:
    """A preset with random weights everywhere: fresh ones predict zeros."""
    torch.manual_seed(SEED)
    model = get_wavflow_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02).add_(1 if parameter.dim() == 1 else 0)
    return model.to(device).eval().requires_grad_(False)


def inputs(model: WavflowModel, batch: int) -> list[Tensor]:
    """clip, sync and text features, latent, t."""
    c, generator = model.config, torch.Generator().manual_seed(SEED)
    shapes = (
        (c.clip_seq_len, c.clip_dim),
        (c.sync_seq_len, c.sync_dim),
        (c.text_seq_len, c.text_dim),
        (c.latent_seq_len, c.latent_dim),
    )
    given = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    return [x.to(model.device) for x in given] + [torch.tensor(T, device=model.device)]


def steps_of(
    model: WavflowModel, given: list[Tensor], guidance: float, dtype: torch.dtype, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """One guided step of each way, the float32 truth last."""
    *features, latent, t = given
    kind = model.device.type

    def ready(network: WavflowModel, cast: torch.dtype, autocast: bool, call: Any) -> Any:
        def context() -> Any:
            return torch.autocast(kind, cast, enabled=autocast)

        at = latent if autocast else latent.to(cast)
        with torch.inference_mode(), context():
            given = features if autocast else [f.to(cast) for f in features]
            conditions = network.preprocess_conditions(*given)
            empty = network.get_empty_conditions(len(latent))

        def step() -> Tensor:
            with torch.inference_mode(), context():
                return call(network, t.to(at.dtype), at, conditions, empty, guidance)

        return step

    half = dtype != torch.float32
    calls = {
        "ours": ready(model, dtype, half, lambda network, *args: network.ode_wrapper(*args)),
        "plain": ready(model, dtype, half, plain.guided),
    }
    if half:
        cast = copy.deepcopy(model).to(dtype)
        calls["plain, weights cast"] = ready(cast, dtype, False, plain.guided)
    if compiled:
        source = cast if half else model
        compiled_call = torch.compile(plain.guided, dynamic=False)
        calls["plain, compiled"] = ready(source, dtype, False, compiled_call)
    calls["float32"] = ready(model, torch.float32, False, plain.guided)
    return calls


def main(
    model: Annotated[str, typer.Option(help=", ".join(PRESETS) + ".")] = "medium_16k",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Clips.")] = 1,
    guidance: Annotated[float, typer.Option(help="Above 1: two passes.")] = 4.5,
    seconds: Annotated[float, typer.Option(help="Per variant.")] = 20.0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="The plain way compiled, too.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="A checkout with wavflow.model.networks.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time a guided step and print how many times faster than each other way it is."""
    name = "bench.run sample"
    if model not in PRESETS:
        fail(f"{name}: --model is '{model}', wanted one of {', '.join(PRESETS)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        fail(f"{name}: --dtype is '{dtype}', wanted bfloat16, float16 or float32")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        fail(f"{name}: --device {device} cannot be used")
    if against is not None and not (against / "wavflow").is_dir():
        fail(f"{name}: --against {against}: it has no folder wavflow")
    where, kind = torch.device(device), getattr(torch, dtype)
    if device == "cpu":
        keep_freed_memory()
    network = filled(model, where)
    given = inputs(network, batch)
    calls = steps_of(network, given, guidance, kind, compiled)
    truth = calls.pop("float32")().float()
    first = time.perf_counter()
    outputs = {"ours": calls["ours"]().float()}
    first = time.perf_counter() - first  # with the weights' preparation
    outputs |= {way: call().float() for way, call in calls.items() if way != "ours"}
    with tempfile.TemporaryDirectory() as folder:
        other = None
        if against is not None:
            job = {
                "model": model,
                "device": device,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "guidance": guidance,
                "state": network.state_dict(),
                "inputs": [x.cpu() for x in given],
            }
            other = Checkout(against.resolve(), job, Path(folder))
            outputs[str(against)] = other.output().to(where)
            calls[str(against)] = other.step
        times = interleaved(calls, where, seconds, warmup=1, rounds=3)
        if other is not None:
            other.close()
    row = {
        "model": model,
        "batch": batch,
        "guidance": guidance,
        "dtype": dtype,
        "seconds": {way: asdict(timing) for way, timing in times.items()},
        "first_step": first,
        "difference": {
            way: ((out - truth).norm() / truth.norm()).item() for way, out in outputs.items()
        },
        "audio_seconds_a_step": CLIP_SECONDS[model] * batch,
    } | machine(where)
    if json_path is not None:
        write_json(json_path, row)
    show(row)


def show(row: dict[str, Any]) -> None:
    ours = row["seconds"]["ours"]["median"]
    table = Table("way", "s a step", "spread", "ours is faster by", "difference from float32")
    for way, timing in row["seconds"].items():
        spread = (timing["high"] - timing["low"]) / timing["median"]
        table.add_row(
            way,
            f"{timing['median']:.3f}",
            f"{spread:.0%}",
            f"{timing['median'] / ours:.2f}",
            f"{row['difference'][way]:.2e}",
        )
    Console(width=110).print(table)
    print(
        f"{row['model']}, batch {row['batch']}, guidance {row['guidance']}, {row['dtype']}; "
        f"first step {row['first_step']:.2f} s; with 25 steps "
        f"{row['audio_seconds_a_step'] / (24 * ours + row['first_step']):.2f} audio seconds a "
        f"second\n{row['device']}, torch {row['torch']}, {row['threads']} threads"
    )
