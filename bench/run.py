"""``python -m bench.run <op> ...``: the ops against eager torch, torch.compile and a plain copy.

Times whole calls, output allocation included on every side. The copy moves as many bytes as the op
must at least move: it is the floor of a memory-bound op.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import wavflow_kernels as wk
from bench.harness import interleaved, machine
from wavflow_kernels import REGISTRY, _backend


def arguments(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A call of the size of `batch` clips of 8 s at 16 kHz."""
    n, d = 640, 200
    x, y, z = (torch.randn(batch, n, d, device=device) for _ in range(3))
    t, seeds = torch.rand(batch, device=device), torch.arange(batch, device=device)
    pred = x.to(dtype)
    table = torch.rand(50, 4, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    grad = torch.ones(batch, device=device)
    return {
        "lift_patchify": (x.flatten(1) * 0.1, None, d, n, 0.33, 3.0, dtype),
        "unpatchify": (pred[:, None], None, n, n * d, 3.0),
        "flow_mix": (x, t, None, seeds, 0.0, 1.0),
        "flow_loss": (pred, y, None, t, 1, 0.0),
        "flow_loss_backward": (grad, pred, y, None, t, 1, 0.0, False),
        "ode_step": (z[None], pred, y.to(dtype), table, index),
        "ode_step_": (z[None], pred, y.to(dtype), table, index),
    }[name]


def variants(name: str, args: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    """What is compared; the first is the kernel chosen here."""
    op = REGISTRY[name]

    def with_backend(backend: str | None) -> Callable[[], object]:
        def call() -> object:
            if op.mutates:
                args[-1].zero_()
            with wk.use_backend(backend):
                return op(*args)

        return call

    device, dtype = args[0].device, args[0].dtype
    chosen = _backend.choose(op, device, dtype)
    calls = {chosen: with_backend(None)}
    calls["reference"] = with_backend("reference")
    if not op.mutates:
        calls["compile"] = with_backend("compile")
    floats = max(op.bytes(*args) // 8, 1)
    source = torch.empty(floats, device=device)
    target = torch.empty_like(source)
    calls["copy"] = (lambda: target.copy_(source)) if op.mutates else source.clone
    if name == "flow_mix":
        calls["torch.randn"] = lambda: torch.randn_like(args[0])
    return calls


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Names; default all.")] = None,
    batch: Annotated[int, typer.Option(help="Clips of 8 s at 16 kHz.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of network outputs: bfloat16, ...")] = "bfloat16",
    seconds: Annotated[float, typer.Option(help="Per op and variant.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time ops and print GB/s, and the ratio to every peer in the same run."""
    names = ops or list(REGISTRY)
    unknown = [name for name in names if name not in REGISTRY]
    if unknown:
        raise typer.BadParameter(f"no op '{unknown[0]}'; there are {', '.join(REGISTRY)}")
    where, kind = torch.device(device), getattr(torch, dtype)
    about = machine(where)
    table = Table("op", "runs as", "us", "GB/s", "of copy", "x eager", "x compile")
    rows = []
    for name in names:
        args = arguments(name, batch, where, kind)
        times = interleaved(variants(name, args), where, seconds)
        chosen = next(iter(times))
        size = REGISTRY[name].bytes(*args)
        ours = times[chosen].median
        shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        rows.append(
            {"op": name, "dtype": dtype, "shapes": shapes, "bytes": size, "runs_as": chosen}
            | about
            | {"seconds": {key: asdict(value) for key, value in times.items()}}
        )
        compiled = f"{times['compile'].median / ours:.2f}" if "compile" in times else "-"
        table.add_row(
            name,
            chosen,
            f"{ours * 1e6:.0f}",
            f"{size / ours / 1e9:.1f}",
            f"{times['copy'].median / ours:.2f}",
            f"{times['reference'].median / ours:.2f}",
            compiled,
        )
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console().print(f"{about['device']}, torch {about['torch']}, {about['threads']} threads")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
