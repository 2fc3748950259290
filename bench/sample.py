"""``python -m bench.run sample``: a guided step of the network against the plain way.

Ours runs through the drop-in path alone: ``inference_mode``, autocast, ``preprocess_conditions``,
``get_empty_conditions``, ``ode_wrapper``. Peers run on the same weights and inputs, in turns with
it: the network as it is usually written (:mod:`bench.plain`) under autocast and with its weights
cast, compiled if asked for, and another checkout's ``wavflow.model.networks`` in a process of its
own. On a GPU there is also our step as the sampler runs it there, a CUDA graph with the solver's
update (:mod:`wavflow.sampling.engine`). Differences are relative to the plain network in float32.

Then, apart from the comparison: the seconds of our stages (:mod:`bench.stages`), their share of
this machine's own matrix-product peak, and the memory that a generation needs in a fresh process
(CUDA: of tensors). Operations are the direct form's: where Winograd's convolutions do fewer, as on
a CPU, a share may pass 100 %.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import peaks, plain, stages
from bench.checkout import Checkout
from bench.machine import fail, machine
from bench.weights import filled, inputs
from wavflow.base.files import write_json
from wavflow.base.memory import keep_freed_memory
from wavflow.config.schema import Config
from wavflow.flow.guidance import Output, mix_guidance
from wavflow.flow.solvers import solver_table
from wavflow.layers.prepare import prepare_inference
from wavflow.sampling.engine import Engine
from wavflow.systems.wavflow.conditioner import WavflowField
from wavflow.systems.wavflow.config import PRESETS
from wavflow.systems.wavflow.network import WavflowModel
from wavflow_kernels.tools.timing import interleaved

ONCE = ("conditions", "preparation", "unpatchify")  # of a generation
CLIP_SECONDS = {name: 2.0 if name == "toy_8k" else 8.0 for name in PRESETS}


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

    half, gpu = dtype != torch.float32, kind == "cuda"
    calls = {"ours": ready(model, dtype, half, lambda network, *args: network.ode_wrapper(*args))}
    if gpu:
        calls["ours, CUDA graph"] = engine_step(model, given, guidance, dtype, "graph")
    calls["plain"] = ready(model, dtype, half, plain.guided)
    if half:
        cast = copy.deepcopy(model).to(dtype)
        calls["plain, weights cast"] = ready(cast, dtype, False, plain.guided)
    if compiled:
        source = cast if half else model
        for mode in ("default", "max-autotune") if gpu else ("default",):
            compiled_call = torch.compile(plain.guided, dynamic=False, mode=mode)
            calls[f"plain, compiled, {mode}"] = ready(source, dtype, False, compiled_call)
    calls["float32"] = ready(model, torch.float32, False, plain.guided)
    return calls


def engine_step(
    model: WavflowModel, given: list[Tensor], guidance: float, dtype: torch.dtype, kind: str
) -> Callable[[], Tensor]:
    """A guided Euler step by the sampler's engine; returns the prediction."""
    *features, latent, t = given
    network = prepare_inference(model, dtype)
    engine = Engine(WavflowField(network, Config(), dtype), kind, dtype)
    table = solver_table("euler", torch.stack((t, t + 0.01)).double().cpu(), guidance=guidance)
    with torch.inference_mode(), engine.cast():
        conditions = network.preprocess_conditions(*features)
        empty = network.get_empty_conditions(len(latent))
    predicted: list[Tensor] = []

    def keep(row: int, x: Tensor, output: Output) -> None:
        predicted[:] = [mix_guidance(output, guidance)]

    def step() -> Tensor:
        engine.solve(latent, table, conditions, empty, after=keep)
        return predicted[0]

    return step


def memory(
    name: str, device: str, dtype: torch.dtype, batch: int, guidance: float, threads: int
) -> dict[str, int] | None:
    """Bytes of the preset's weights, and the peak of a short generation; for a fresh process."""
    torch.set_num_threads(threads)
    network = filled(name, torch.device(device))
    *given, _ = inputs(network, batch)
    found = stages.peak_memory(
        network.device, lambda: stages.seconds(network, given, guidance, dtype, 2, 1)
    )
    return found and {"weights": sum(p.nbytes for p in network.parameters())} | found


def main(
    model: Annotated[str, typer.Option(help=", ".join(PRESETS) + ".")] = "medium_16k",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Clips.")] = 1,
    guidance: Annotated[float, typer.Option(help="Above 1: two passes.")] = 4.5,
    steps: Annotated[int, typer.Option(help="Of a whole generation.", min=1)] = 25,
    seconds: Annotated[float, typer.Option(help="Per variant.")] = 20.0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="The plain way compiled, too.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="A checkout with wavflow.model.networks.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time a guided step against each other way, and our stages; show what they need."""
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
    outputs = {way: call().float() for way, call in calls.items()}
    timed: dict[str, Callable[[], object]] = {**calls}
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
            timed[str(against)] = other.step
        times = interleaved(timed, where, seconds, warmup=1, rounds=3)
        if other is not None:
            other.close()
    ours = times["ours"].median
    few = min(steps, max(3, int(seconds / 3 / ours)))
    *given, _ = given
    parts = stages.seconds(network, given, guidance, kind, few)
    whole = sum(parts[name] for name in ONCE) + steps * (ours + parts["update"])
    operations = stages.operations(model, [x.shape for x in given], guidance)
    peak = peaks.measure(where, kind)
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        threads = torch.get_num_threads()
        held = fresh.submit(memory, model, device, kind, batch, guidance, threads).result()
    row = {
        "model": model,
        "batch": batch,
        "guidance": guidance,
        "dtype": dtype,
        "seconds": {way: asdict(timing) for way, timing in times.items()},
        "difference": {
            way: ((out - truth).norm() / truth.norm()).item() for way, out in outputs.items()
        },
        "steps": steps,
        "steps_a_second": 1 / ours,
        "audio_seconds_a_second": CLIP_SECONDS[model] * batch / whole,
        "stages": parts,
        "operations": operations,
        "peaks": asdict(peak),
        "of_gemm_peak": operations["network"] / ours / peak.gemm,
        "memory": held,
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
    console = Console(width=110)
    console.print(table)
    console.print(stage_table(row))
    print(
        f"{row['model']}, batch {row['batch']}, guidance {row['guidance']}, {row['dtype']}: "
        f"{row['steps_a_second']:.2f} steps a second; with {row['steps']} steps "
        f"{row['audio_seconds_a_second']:.2f} audio seconds a second\n"
        f"a step reaches {row['of_gemm_peak']:.0%} of a matrix product's "
        f"{row['peaks']['gemm'] / 1e12:.2f} TFLOP/s here, Winograd's convolutions counted as direct"
    )
    if row["memory"] is not None:
        weights, peak, above = (x / 2**20 for x in row["memory"].values())
        print(
            f"peak memory {peak:.0f} MiB, {above:.0f} MiB above what the loaded model takes "
            f"(weights: {weights:.0f} MiB)"
        )
    print(f"{row['device']}, torch {row['torch']}, {row['threads']} threads")


def stage_table(row: dict[str, Any]) -> Table:
    """Our stages: what a generation has once, and the parts of a step between."""
    seconds, counts = row["stages"], row["operations"]
    step = seconds["network"] + seconds["update"]
    table = Table("stage", "ms", "of a step", "GFLOP", "of the matrix-product peak")
    for name in (*ONCE[:2], *stages.PARTS, "the rest", "update", ONCE[2]):
        inside, count = name not in ONCE, counts.get(name, 0)
        table.add_row(
            f"  {name}" if inside else name,
            f"{seconds[name] * 1e3:.2f}",
            f"{seconds[name] / step:.1%}" if inside else "",
            f"{count / 1e9:.2f}" if count else "",
            f"{count / seconds[name] / row['peaks']['gemm']:.0%}" if count else "",
        )
    return table
