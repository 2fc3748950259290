"""``python -m bench.run synchformer``: clips a second of Synchformer's visual branch.

Ours is the network that makes sync features (:mod:`wavflow.features.synchformer`) with random
weights, on normalised pixels that lie on the device: all segments of a batch in one call. Against
it, in turns, the same network with torch's own Linear, and ours with one call for each segment.

A way's MFU is the arithmetic of ours (:mod:`wavflow.base.flops`) in the way's time, over the
machine's own matrix-product rate in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import stages
from bench.machine import fail, free_memory, machine
from wavflow.base.files import write_json
from wavflow.base.flops import count_flops, matmul_rate
from wavflow.base.memory import keep_freed_memory
from wavflow.features.synchformer import (
    FRAMES,
    PLACES,
    ROWS,
    SIZE,
    STRIDE,
    Linear,
    Synchformer,
    SynchformerConfig,
)
from wavflow_kernels.tools.timing import interleaved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FPS = 25
# Activations of a segment that live at once: tokens as residual and norm, qkv and its groups twice.
BYTES_A_SEGMENT = ROWS * PLACES * SynchformerConfig.dim * 4 * 14
# How far rows of one way may lie from another's, relative to their size.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2e-2}


class PlainLinear(nn.Linear):
    """A linear layer of torch's own, in its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def network(
    config: SynchformerConfig, device: torch.device, dtype: torch.dtype, linear: type[nn.Linear]
) -> Synchformer:
    """The network with random weights, the same for every class of `linear`."""
    torch.manual_seed(0)
    model = Synchformer(config)
    for name in ("cls_token", "pos_embed", "temp_embed"):
        nn.init.normal_(getattr(model, name), std=0.5)
    model.compute_in(dtype)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.__class__ = linear
    return model.to(device).eval().requires_grad_(False)


def ways(
    config: SynchformerConfig, pixels: Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """The ways to compute rows (b 8s c) of pixels (b t 3 h w), by name."""
    ours = network(config, pixels.device, dtype, Linear)
    plain = network(config, pixels.device, dtype, PlainLinear)

    def segment_by_segment() -> Tensor:
        places = range(0, pixels.shape[1] - FRAMES + 1, STRIDE)
        return torch.cat([ours(pixels[:, at : at + FRAMES]) for at in places], dim=1)

    return {
        "ours": lambda: ours(pixels),
        "torch's Linear": lambda: plain(pixels),
        "a segment a call": segment_by_segment,
    }


@torch.no_grad()
def measure(
    config: SynchformerConfig,
    device: torch.device,
    dtype: str,
    batch: int,
    segments: int,
    seconds: float,
) -> dict[str, Any]:
    """One row of the results. Ends the program where the ways disagree."""
    frames = STRIDE * (segments - 1) + FRAMES
    pixels = torch.rand(batch, frames, 3, SIZE, SIZE, device=device) * 2 - 1
    calls = ways(config, pixels, DTYPES[dtype])
    rows = {way: call() for way, call in calls.items()}
    for way, found in rows.items():
        off = float((found - rows["ours"]).norm() / rows["ours"].norm())
        if not off <= AGREEMENT[dtype]:
            fail(f"bench.run synchformer: rows of '{way}' are off by {off:.1e} in {dtype}")
    flops, rate = count_flops(calls["ours"]), matmul_rate(device, DTYPES[dtype])
    times = interleaved(calls, device, seconds, warmup=0, rounds=3)
    return {
        "dtype": dtype,
        "batch": batch,
        "clip_frames": frames,
        "seconds": {way: asdict(timing) for way, timing in times.items()},
        "clips_a_second": {way: batch / timing.median for way, timing in times.items()},
        "flops": flops,
        "matmul_rate": rate,
        "mfu": {way: flops / timing.median / rate for way, timing in times.items()},
        "memory": stages.peak_memory(device, calls["ours"]),
    } | machine(device)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="Default both.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Clips in a call; default 1.")] = None,
    segments: Annotated[int, typer.Option(help="Of a clip; 24 are 8 s.", min=1)] = 24,
    seconds: Annotated[float, typer.Option(help="Per row and way.")] = 10.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time the visual branch of Synchformer in each dtype and batch size."""
    name = "bench.run synchformer"
    for kind in dtype or ():
        if kind not in DTYPES:
            fail(f"{name}: --dtype is '{kind}', wanted {' or '.join(DTYPES)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        fail(f"{name}: --device {device} cannot be used")
    where, batches = torch.device(device), batch or [1]
    needed, free = max(batches) * segments * BYTES_A_SEGMENT, free_memory(where)
    if needed > free:
        fail(
            f"{name}: {max(batches)} clips of {segments} segments need about {needed / 1e9:.0f} GB,"
            f" {free / 1e9:.0f} GB are free"
        )
    if device == "cpu":
        keep_freed_memory()
    rows = []
    for row in results(where, dtype or list(DTYPES), batches, segments, seconds):
        rows.append(row)
        if json_path is not None:
            write_json(json_path, rows)
    show(rows)


def results(
    device: torch.device, dtypes: list[str], batches: list[int], segments: int, seconds: float
) -> Iterator[dict[str, Any]]:
    for dtype in dtypes:
        for batch in batches:
            yield measure(SynchformerConfig(), device, dtype, batch, segments, seconds)


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("dtype", "batch", "way", "s a call", "spread", "clips/s", "x real time", "MFU",
               "ours is faster by")  # fmt: skip
    table = Table(*columns)
    for row in rows:
        for way, timing in row["seconds"].items():
            table.add_row(
                row["dtype"],
                str(row["batch"]),
                way,
                f"{timing['median']:.3f}",
                f"{(timing['high'] - timing['low']) / timing['median']:.0%}",
                f"{row['clips_a_second'][way]:.3f}",
                f"{row['clips_a_second'][way] * row['clip_frames'] / FPS:.2f}",
                f"{row['mfu'][way]:.1%}",
                f"{timing['median'] / row['seconds']['ours']['median']:.2f}",
            )
    Console(width=120).print(table)
    about = rows[0]
    for row in rows:
        held = f", {row['memory']['peak'] / 2**20:.0f} MiB at most" if row["memory"] else ""
        print(
            f"{row['dtype']}, batch {row['batch']}: {row['flops'] / 1e12:.2f} TFLOP a call; a "
            f"matrix product here: {row['matmul_rate'] / 1e12:.2f} TFLOP/s{held}"
        )
    print(
        f"clips of {about['clip_frames']} frames at {FPS} a second; {about['device']}, "
        f"torch {about['torch']}, {about['threads']} threads"
    )
