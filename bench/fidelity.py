"""``python -m bench.run fidelity``: what fast choices cost in sound, on a finished demo's clips.

Every choice generates the held-out clips from video and text with the same noise. Its waves are
compared with those of another choice, named in each row: prepared weights with the float32
parameters under the same solver, solvers with a fine solution, whose own error the row of half as
many steps shows. Beside it stand the demo's figures.

Where a clip's path turns to another sound its difference is near 1: the worst clip tells. A step
that predicts data divides by the time left, which can amplify rounding: the row of the reference
backend, float32 like what it is compared with, says what float32's rounding alone does.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import wavflow_kernels as wk
from bench.machine import fail, machine
from wavflow.base.console import counter
from wavflow.base.errors import InputError
from wavflow.base.files import write_json
from wavflow.base.precision import resolve_device
from wavflow.base.state_dict import load_into
from wavflow.config.load import config_from_dict
from wavflow.demo.sounds import BATCH, read_heldout
from wavflow.evaluation.signals import FLOOR_DB, log_spectral_distance
from wavflow.evaluation.toy import Listener
from wavflow.flow.solvers import BEST, Recommended
from wavflow.layers.prepare import prepare_inference
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import row_seed
from wavflow.systems.wavflow.build import build_model
from wavflow.training.checkpoint import read_weights


@dataclass(frozen=True)
class Choice:
    """A way to generate.

    against     the choice it is compared with, made before it
    prepared    arguments of prepare_inference; None: the float32 parameters as they are
    solver      with steps, times and guidance interval; None: the configuration's
    backend     of all ops
    engine      how steps run
    """

    name: str
    against: str | None
    prepared: dict[str, Any] | None = None
    solver: Recommended | None = None
    backend: str | None = None
    engine: str = "eager"


CHOICES = (
    Choice("fine solution", None, solver=Recommended("2m", 200, "sigmoid")),
    Choice("float32", "fine solution"),
    *(
        Choice(
            f"float32, {' '.join(map(str, solver))}", "fine solution", solver=Recommended(*solver)
        )
        for solver in (
            ("2m", 100, "sigmoid"),
            ("2m", 50, "sigmoid"),
            ("2m", 14, "sigmoid"),
            ("euler", 50, "even"),
            ("euler", 25, "even"),
        )
    ),
    Choice("float32, default solver", "fine solution", solver=BEST),
    Choice("float32, reference backend", "float32", backend="reference"),
    Choice("float32, prepared", "float32", {"dtype": torch.float32}),
    Choice("bfloat16, no Winograd", "float32", {"dtype": torch.bfloat16, "winograd": False}),
    Choice("bfloat16", "float32", {"dtype": torch.bfloat16}),
    Choice("bfloat16, CUDA graph", "float32", {"dtype": torch.bfloat16}, engine="graph"),
)


def relative_l2(found: Tensor, wanted: Tensor) -> Tensor:  # (clips t) each -> (clips)
    """The norm of each clip's difference over the norm of what is wanted."""
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-12)


class Clips:
    """A demo's held-out clips and a network, ready to generate and to judge.

    Raises:
        InputError: a file that is missing or does not fit.
    """

    def __init__(
        self, demo: Path, checkpoint: Path, ema: str, device: torch.device, count: int | None
    ) -> None:
        weights = read_weights(checkpoint, ema)
        if weights.config is None:
            raise InputError(f"{checkpoint}: it carries no configuration")
        self.config = config_from_dict(weights.config, where=str(checkpoint))
        self.model = build_model(self.config)
        load_into(self.model, weights.state, checkpoint)
        clips = read_heldout(demo, self.config).first(count)
        self.model.to(device).eval().requires_grad_(False)
        self.features = clips.features
        self.seeds = [row_seed(self.config.training.seed, row.id) for row in clips.rows]
        self._clips = [{"kind": scene["kind"], "events": scene["times"]} for scene in clips.scenes]
        self._heard = Listener(demo / "toy" / "events.json")

    def __len__(self) -> int:
        return len(self._clips)

    def first(self, count: int) -> Clips:
        """The first of these clips, with the same network."""
        fewer = copy.copy(self)
        fewer.features, fewer.seeds = self.features[:count], self.seeds[:count]
        fewer._clips = self._clips[:count]
        return fewer

    def solver(self, choice: Choice) -> Recommended:
        sampling = self.config.sampling
        return choice.solver or Recommended(sampling.method, sampling.num_steps, "even")

    def sampler(self, choice: Choice) -> Sampler:
        """The sampler that generates; a ValueError says why the library does not offer it."""
        dtype = torch.float32
        if choice.prepared is not None:
            network, dtype = (
                prepare_inference(self.model, **choice.prepared),
                choice.prepared["dtype"],
            )
        else:
            network = copy.copy(self.model)
            network.is_prepared = True  # the parameters are used as they are
        return Sampler(network, self.config, network.device, dtype, choice.engine)

    def waves(
        self, choice: Choice, sampler: Sampler, batch: int, progress: Callable[[int, int], None]
    ) -> Tensor:  # (clips t)
        """The sounds that the choice makes."""
        way = self.solver(choice)
        with wk.use_backend(choice.backend):
            sounds = sampler.generate_features(
                self.features,
                self.seeds,
                solver=way.solver,
                steps=way.steps,
                times=way.times,
                guidance_interval=way.guidance_interval,
                batch_size=batch,
                progress=progress,
            )
        return torch.stack([sound.audio for sound in sounds])

    def figures(self, waves: Tensor) -> dict[str, float]:
        """The demo's figures of sounds made from video and text."""
        return self._heard.figures(self._clips, waves.unbind())


def compared(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    """A row's differences between waves (clips t)."""
    error = relative_l2(found, wanted)
    return {
        "relative_l2": {"median": error.median().item(), "worst": error.max().item()},
        "log_spectral_distance": log_spectral_distance(found, wanted).median().item(),
    }


def results(
    clips: Clips, choices: Sequence[Choice], batch: int, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """The rows; `left_out` says why one has no figures. Progress is in steps of a clip."""
    made: dict[str, Tensor] = {}
    rows = []
    before, total = 0, len(clips) * sum(clips.solver(choice).steps for choice in choices)
    for choice in choices:
        way = clips.solver(choice)
        row = {"choice": choice.name, **way._asdict(), "against": choice.against}

        def show(done: int, _: int, before: int = before, steps: int = way.steps) -> None:
            progress(before + done * steps, total)

        before += len(clips) * way.steps
        try:
            sampler = clips.sampler(choice)
        except ValueError as error:
            rows.append(row | {"left_out": str(error)})
            continue
        found = made[choice.name] = clips.waves(choice, sampler, batch, show)
        if choice.against is not None:
            row |= compared(found, made[choice.against])
        rows.append(row | clips.figures(found))
    return rows


def main(
    demo: Annotated[Path, typer.Option(help="Folder of a finished wavflow demo; is only read.")],
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or packaged weights.")] = Path(
        "toy_8k"
    ),
    ema: Annotated[str, typer.Option(help="ema1, ema2 or none.")] = "ema1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    clips: Annotated[int | None, typer.Option(help="The first N; default all.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Clips at a time.", min=1)] = BATCH,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Generate a demo's clips in every fast way and print how far each is from the exact one."""
    name = "bench.run fidelity"
    if importlib.util.find_spec("sklearn") is None:
        fail(f"{name}: the demo's figures need scikit-learn: pip install 'wavflow[demo]'")
    try:
        where = resolve_device(device)
        if where.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        given = Clips(demo, checkpoint, ema, where, clips)
        with counter("clip steps") as progress:
            rows = results(given, CHOICES, batch, progress)
    except InputError as error:
        fail(f"{name}: {error}")
    result = {
        "clips": len(given),
        "guidance": given.config.inference.cfg,
        "parameters": sum(p.numel() for p in given.model.parameters()),
        "rows": rows,
    } | machine(where)
    if json_path is not None:
        write_json(json_path, result)
    show(result)


def show(result: dict[str, Any]) -> None:
    headers = ("choice", "solver", "compared with", "L2", "worst", "LSD, dB",
               "recall", "precision", "kind")  # fmt: skip
    table = Table(*headers)
    for row in result["rows"]:
        cells = [row["choice"], f"{row['solver']} {row['steps']} {row['times']}"]
        cells.append(row["against"] or "")
        if "left_out" in row:
            table.add_row(*cells[:2], f"left out: {row['left_out']}")
            continue
        differences = [""] * 3
        if "relative_l2" in row:
            error = row["relative_l2"]
            differences = [f"{error['median']:.2e}", f"{error['worst']:.2e}"]
            differences.append(f"{row['log_spectral_distance']:.2f}")
        judged = (row[key] for key in ("onset_recall", "onset_precision", "class_accuracy"))
        table.add_row(*cells, *differences, *(f"{value:.3f}" for value in judged))
    Console(width=130).print(table)
    print(
        f"{result['clips']} held-out clips from video and text, guidance {result['guidance']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters\n"
        "L2: norm of a wave's difference over its norm, median and worst clip; LSD: log-spectral "
        f"distance above {FLOOR_DB:.0f} dB of the peak, median\n"
        f"{result['device']}, torch {result['torch']}, {result['threads']} threads"
    )
