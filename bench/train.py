"""``python -m bench.run train``: a whole training step against the plain way's.

Ours is the trainer's own step (:class:`wavflow.training.trainer.Trainer`) on clips that lie on the
device: lift, noise, network, loss, backward, clipping, fused AdamW, both averages. Against it, in
turns, the same step as it is usually written: the plain network (:mod:`bench.plain`) under
autocast, torch operations for the rest, ``torch.optim.AdamW`` as it comes, averages parameter by
parameter; both compiled if asked for; and another checkout's network in a process of its own, with
loss, backward, clipping, fused AdamW and averages.

Losses of all ways on the same weights, noise and times are compared before. A way's MFU is the
arithmetic that our step needs (:mod:`wavflow.base.flops`) in the way's time, over the machine's own
matrix-product rate. Then the trainer runs on clips that it reads from files: how much of its time
it waits for them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import wavflow_kernels as wk
from bench import plain, stages
from bench.checkout import Checkout
from bench.data import HeldClips, clips, write_clips
from bench.machine import fail, free_memory, machine
from bench.weights import fill
from wavflow.base.files import write_json
from wavflow.base.memory import keep_freed_memory
from wavflow.base.processes import World
from wavflow.base.seeding import Draw
from wavflow.config.load import load_config
from wavflow.data.dataset import ClipBatch
from wavflow.data.open import open_dataset
from wavflow.systems.wavflow.config import PRESETS, RunConfig
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.systems.wavflow.objective import WavflowObjective
from wavflow.training.step_figures import Pace
from wavflow.training.trainer import Trainer
from wavflow_kernels.tools.timing import interleaved

#: Sizes beside the presets: of medium_16k's clips, for a CPU.
C256 = ("model.hidden_dim=256", "model.depth=12", "model.fused_depth=8", "model.num_heads=4")
MODELS = (*PRESETS, "c256")
SEED, WORKERS, CLIPS = 0, 2, 256  # CLIPS: of noise, as files
# How far a loss in this dtype may lie from the plain way's in float32, relative.
AGREEMENT = {"bfloat16": 2e-2, "float32": 1e-4}
# Weights, gradients, AdamW's two moments and two averages, float32.
BYTES_A_PARAMETER = 6 * 4
CHILD = """
import sys, torch
from torch.nn.utils import clip_grad_norm_
from wavflow.model.networks import WavflowModel
job = torch.load(sys.stdin.buffer.readline().strip().decode(), weights_only=True)
device, dtype = job["device"], getattr(torch, job["dtype"])
torch.set_num_threads(job["threads"])
model = WavflowModel(**job["sizes"])
model.load_state_dict(job["state"], strict=False)
model = model.to(device).train()
given, x_1, weight = [x.to(device) for x in job["given"]], job["x_1"].to(device), job["weight"].to(device)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=job["lr"], betas=(0.9, 0.95), fused=True)
averages = [[p.detach().clone() for p in parameters] for _ in range(2)]
for line in sys.stdin.buffer:
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        pred = model(*given)
    losses = (weight * (pred.float() - x_1)).square().mean((1, 2))
    optimizer.zero_grad()
    losses.mean().backward()
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for average in averages:
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.1)
    if device == "cuda":
        torch.cuda.synchronize()
    if line.strip():
        torch.save(losses.detach().cpu(), line.strip().decode())
    print("done", flush=True)
"""  # noqa: E501


@dataclass(frozen=True)
class Job:
    """What a benchmark trains, and how; travels to other processes."""

    model: str
    batch: int
    device: str
    dtype: str
    folder: Path

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def config(self, **training: object) -> RunConfig:
        """The preset's configuration, with zeros as the empty caption's features."""
        c256 = self.model == "c256"
        given = {"batch_size": self.batch, "num_workers": 0, "epochs": 10**6} | training
        config = load_config(
            "medium_16k" if c256 else self.model,
            [*(C256 if c256 else ()), *(f"training.{key}={value}" for key, value in given.items())],
        )
        path = self.folder / "empty.pth"
        if not path.exists():
            torch.save(torch.zeros(config.data.feature_shapes["text_features"]), path)
        return replace(config, model=replace(config.model, empty_string_ckpt=str(path)))


def network(config: RunConfig, device: torch.device) -> WavflowModel:
    """A fresh network with random weights everywhere."""
    model = WavflowObjective(config).build()
    fill(model)
    return model.to(device)


def make_trainer(job: Job, dataset: Any, **training: object) -> Trainer:
    config = job.config(**training)
    trainer = Trainer(
        WavflowObjective(config),
        dataset,
        config.training,
        job.folder,
        config=config.to_dict(),
        world=World(0, 1, job.where),
        dtype=job.kind,
    )
    trainer.model.load_state_dict(network(config, job.where).state_dict())
    return trainer


def our_step(
    job: Job, batch: ClipBatch, compiled: bool = False
) -> tuple[Callable[[], None], Trainer]:
    """The trainer's step, and the trainer."""
    trainer = make_trainer(job, HeldClips(batch), compile=compiled)
    batches = trainer.batches()

    def step() -> None:
        trainer.train_step(batches)

    return step, trainer


def step_of(job: Job, way: str) -> Callable[[], None]:
    """The step of a way by its name: "ours" or "plain", or these with ", compiled"."""
    config, compiled = job.config(), way.endswith(", compiled")
    batch = clips(config.data, job.batch, job.where)
    if way.startswith("ours"):
        return our_step(job, batch, compiled)[0]
    return plain.training_step(network(config, job.where), config, batch, job.kind, compiled)


@dataclass(frozen=True)
class Inputs:
    """What the losses of all ways are compared on.

    Attributes:
        given: arguments of the network: x_t, clip, sync and text features, t.
        x_1: clean tokens.
        weight: (b 1 1), of the prediction's error.
        losses: the mean loss by way.
    """

    given: list[Tensor]
    x_1: Tensor
    weight: Tensor
    losses: dict[str, float]


@torch.no_grad()
def compare(job: Job, model: WavflowModel, batch: ClipBatch) -> Inputs:
    """The losses of ours and of the plain way, and its in float32, on the same weights and noise.

    Nothing is dropped. Ends the program where ours disagrees.
    """
    config = job.config(label_drop_prob=0.0)
    data, sampling = config.data, config.sampling
    draw = Draw(SEED, range(len(batch.wave)))
    with torch.autocast(job.device, job.kind, enabled=job.kind != torch.float32):
        terms = WavflowObjective(config).loss(model, batch, draw)
    assert terms.t is not None
    noise = wk.philox_normal(
        draw.seeds.to(job.where),
        data.latent_seq_len,
        data.audio_dim,
        noise_scale=sampling.noise_scale,
    )
    same = (config, batch, terms.t, noise)
    losses = {"ours": terms.values.mean().item()}
    with torch.autocast(job.device, job.kind, enabled=job.kind != torch.float32):
        losses["plain"] = plain.loss(model, *same).mean().item()
    losses["float32"] = plain.loss(model, *same).mean().item()
    off = abs(losses["ours"] / losses["float32"] - 1)
    if not off <= AGREEMENT[job.dtype]:
        fail(f"bench.run train: the loss is {losses['ours']}, plainly {losses['float32']}")
    x_1 = wk.lift_patchify(
        batch.wave,
        batch.lengths,
        token_size=data.audio_dim,
        tokens=data.latent_seq_len,
        audio_scale=data.audio_scale,
    )
    x_t, _ = wk.flow_mix(x_1, terms.t, noise=noise, sigma_min=sampling.min_sigma)
    given = [x_t, *batch.features.values(), terms.t]
    # A network that predicts data under the loss of its velocity.
    weight = 1 / (1 - terms.t).clamp_min(1e-6)[:, None, None]
    return Inputs(given, x_1, weight, losses)


def memory(job: Job, way: str, threads: int) -> int | None:
    """Peak bytes of a way's second step; for a fresh process."""
    torch.set_num_threads(threads)
    if job.device == "cpu":
        keep_freed_memory()
    step = step_of(job, way)
    step()
    found = stages.peak_memory(job.where, step)
    return None if found is None else found["peak"]


def loading(job: Job, source: Path, steps: int) -> dict[str, float]:
    """How the trainer fares that reads its clips from files with WORKERS threads.

    Nothing is kept in memory between epochs but what the system caches of the files.

    Args:
        source: as `data.csv_path`.
    """
    data = replace(job.config().data, csv_path=str(source), cache_mb=0)
    dataset = open_dataset(data, data.tracks, workers=WORKERS)
    trainer = make_trainer(job, dataset, num_workers=WORKERS)
    batches = trainer.batches()
    for _ in range(2):
        trainer.train_step(batches)
    trainer.pace = Pace()
    for _ in range(steps):
        trainer.train_step(batches)
    batches.close()
    return {
        "workers": WORKERS,
        "clips": len(dataset),
        "clips_a_second": trainer.pace.clips_per_second,
        "waited": trainer.pace.waited,
    }


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS) + ".")] = "c256",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Clips a step.", min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Per way.")] = 30.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Both ways compiled, too.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="A checkout with wavflow.model.networks.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="As data.csv_path: read these clips, not noise.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time a training step against each other way, and how long it waits for its clips."""
    name = "bench.run train"
    if model not in MODELS:
        fail(f"{name}: --model is '{model}', wanted one of {', '.join(MODELS)}")
    if dtype not in AGREEMENT:
        fail(f"{name}: --dtype is '{dtype}', wanted {' or '.join(AGREEMENT)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        fail(f"{name}: --device {device} cannot be used")
    if against is not None and not (against / "wavflow").is_dir():
        fail(f"{name}: --against {against}: it has no folder wavflow")
    if data is not None and not data.exists():
        fail(f"{name}: --data {data}: no such file or folder")
    if device == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, batch, device, dtype, Path(folder))
        row = measure(job, seconds, compiled, against)
        steps = max(3, int(seconds / 3 / row["seconds"]["ours"]["median"]))
        if data is None:
            data = write_clips(Path(folder), job.config().data, max(CLIPS, batch))
        row["loading"] = loading(job, data, steps)
    if json_path is not None:
        write_json(json_path, row)
    show(row)


def measure(job: Job, seconds: float, compiled: bool, against: Path | None) -> dict[str, Any]:
    """Times of all ways in turns, their losses and their memory."""
    config, device = job.config(), job.where
    check_memory(job, 2 + 2 * compiled + (against is not None))
    batch = clips(config.data, job.batch, device)
    ways = ["ours", "plain", *(["ours, compiled", "plain, compiled"] if compiled else [])]
    step, trainer = our_step(job, batch)
    flops, rate = trainer.flops * job.batch, trainer.matmul_rate
    model = trainer.model
    assert isinstance(model, WavflowModel)
    inputs = compare(job, model, batch)
    calls = {"ours": step} | {way: step_of(job, way) for way in ways[1:]}
    losses = dict(inputs.losses)
    with tempfile.TemporaryDirectory() as folder:
        other = None
        if against is not None:
            other = Checkout(
                against.resolve(), child_job(job, trainer, inputs), Path(folder), CHILD
            )
            losses[str(against)] = other.output().mean().item()
            calls[str(against)] = other.step
        times = interleaved(calls, device, seconds, warmup=1, rounds=3)
        if other is not None:
            other.close()
    held = {}
    for way in ways:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            held[way] = fresh.submit(memory, job, way, torch.get_num_threads()).result()
    return {
        "model": job.model,
        "batch": job.batch,
        "dtype": job.dtype,
        "parameters": trainer.parameters,
        "seconds": {way: asdict(timing) for way, timing in times.items()},
        "losses": losses,
        "flops": flops,
        "matmul_rate": rate,
        "mfu": {way: flops / timing.median / rate for way, timing in times.items()},
        "memory": held,
    } | machine(device)


def check_memory(job: Job, ways: int) -> None:
    """End the program where the weights of so many ways do not fit."""
    objective = WavflowObjective(job.config())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in objective.build().parameters())
    needed, free = ways * parameters * BYTES_A_PARAMETER, free_memory(job.where)
    if needed > free:
        fail(
            f"bench.run train: {ways} ways of {parameters / 1e6:.0f} M parameters need "
            f"{needed / 1e9:.0f} GB and their activations, {free / 1e9:.0f} GB are free"
        )


def child_job(job: Job, trainer: Trainer, inputs: Inputs) -> dict[str, Any]:
    """The job that CHILD reads."""
    model: Any = trainer.model
    return {
        "sizes": asdict(model.config),
        "device": job.device,
        "dtype": job.dtype,
        "threads": torch.get_num_threads(),
        "lr": trainer.settings.peak_lr(),
        "state": {key: value.cpu() for key, value in trainer.model.state_dict().items()},
        "given": [x.cpu() for x in inputs.given],
        "x_1": inputs.x_1.cpu(),
        "weight": inputs.weight.cpu(),
    }


def show(row: dict[str, Any]) -> None:
    ours = row["seconds"]["ours"]["median"]
    columns = (
        "way",
        "s a step",
        "spread",
        "clips/s",
        "MFU",
        "peak MiB",
        "ours is faster by",
        "loss",
    )
    table = Table(*columns)
    for way, timing in row["seconds"].items():
        spread = (timing["high"] - timing["low"]) / timing["median"]
        held = row["memory"].get(way)
        table.add_row(
            way,
            f"{timing['median']:.3f}",
            f"{spread:.0%}",
            f"{row['batch'] / timing['median']:.2f}",
            f"{row['mfu'][way]:.1%}",
            f"{held / 2**20:.0f}" if held else "",
            f"{timing['median'] / ours:.2f}",
            f"{row['losses'][way]:.5f}" if way in row["losses"] else "",
        )
    Console(width=120).print(table)
    loads = row["loading"]
    print(
        f"{row['model']}, {row['parameters'] / 1e6:.1f} M parameters, batch {row['batch']}, "
        f"{row['dtype']}: {row['flops'] / 1e9:.0f} GFLOP a step; a matrix product here: "
        f"{row['matmul_rate'] / 1e12:.2f} TFLOP/s; plain loss in float32 "
        f"{row['losses']['float32']:.5f}\n"
        f"reading {loads['clips']} clips from files by {loads['workers']} threads: "
        f"{loads['clips_a_second']:.2f} clips/s, {loads['waited']:.1%} of the time waiting for them"
    )
    print(f"{row['device']}, torch {row['torch']}, {row['threads']} threads")
