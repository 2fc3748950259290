"""``python -m bench.run solvers``: how far from the exact trajectory each solver ends, and when.

The network, noise and conditions are those of a finished demo's held-out clips. One evaluation is
one guided step. A clip's error is the norm of the difference of its final tokens over their norm,
of a float32 generation from a reference solution: float64, by the Runge-Kutta method of order 4 to
t = 0.999 and the predicted data there. With guidance the prediction goes on changing as t nears 1,
where the velocity divides by 1 - t: an end must be chosen. A second reference, by adaptive steps
of order 5 to the same end, says how exact the first is; their difference is reported beside the
smallest error and should be a tenth of it at most.

``--guidance-interval`` adds studies with guidance in that interval only: another equation, with a
reference of its own.

Where a path turns to another sound the error is near 1: the median over clips says how exact a
solver is, the norm over all clips mostly how often paths turn.

The demo's figures (onset recall and precision, kind of sound) are those of more clips, generated
as ``wavflow generate`` does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import wavflow_kernels as wk
from bench.fidelity import Clips, relative_l2
from bench.machine import fail, machine
from bench.plot import INK, RULE
from wavflow.base.console import counter
from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, write_json
from wavflow.base.precision import resolve_device, resolve_dtype
from wavflow.flow.guidance import mix_guidance
from wavflow.flow.solvers import ADAPTIVE_END, adaptive, solver_table
from wavflow.flow.times import sampling_times, time_grid
from wavflow.pipeline.sampler import Sampler
from wavflow.sampling.engine import Engine
from wavflow.systems.wavflow.conditioner import WavflowField
from wavflow.systems.wavflow.conditions import Conditions

#: Evaluations that are compared.
BUDGETS = (8, 10, 14, 20, 28, 50)
#: Of them, those whose sounds are judged.
JUDGED = (14, 50)
#: Calls of the network a step.
CALLS = {"euler": 1, "ab2": 1, "2m": 1, "midpoint": 2, "heun": 2, "rk4": 4}


Interval = tuple[float, float]


@dataclass(frozen=True)
class Way:
    """A solver and its times: as `sampling_times` makes them, or "unshifted", even ones."""

    solver: str
    times: str

    def steps(self, evaluations: int) -> int:
        """How many steps these evaluations pay for, at least one."""
        return max(1, evaluations // CALLS[self.solver])

    @property
    def name(self) -> str:
        return f"{self.solver}, {self.times}"


WAYS = (
    Way("euler", "even"),
    Way("euler", "unshifted"),
    Way("euler", "sigmoid"),
    Way("euler", "log-snr"),
    Way("2m", "even"),
    Way("2m", "sigmoid"),
    Way("2m", "log-snr"),
    Way("ab2", "log-snr"),
    Way("midpoint", "log-snr"),
    Way("heun", "log-snr"),
    Way("rk4", "log-snr"),
)
JUDGED_WAYS = tuple(way for way in WAYS if way.times != "unshifted")
EVERYWHERE: Interval = (0.0, 1.0)
#: Half the length of the reference's step over an end of the guidance interval.
JUMP = 1e-9
#: Bounds of the adaptive reference's error estimates, and about how many calls it takes.
TOLERANCE, ADAPTIVE_CALLS = 1e-5, 400


class Problem:
    """Noise and conditions of a demo's first clips, at one weight of guidance.

    Args:
        clips: of the demo.
        count: how many of them.
        guidance: 1 for none.
        interval: the times with guidance.
    """

    def __init__(self, clips: Clips, count: int, guidance: float, interval: Interval) -> None:
        self.guidance, self.interval, self.sampling = guidance, interval, clips.config.sampling
        self._model, self._config = clips.model, clips.config
        self._features = [
            torch.stack([row[key] for row in clips.features[:count]]).to(clips.model.device)
            for key in clips.config.data.feature_shapes
        ]
        self._noise = wk.philox_normal(
            torch.tensor(clips.seeds[:count], device=clips.model.device),
            clips.model.latent_seq_len,
            clips.model.latent_dim,
            noise_scale=self.sampling.noise_scale,
        )
        self._float32 = self._ready(torch.float32)

    def table(self, way: Way, evaluations: int) -> Tensor:
        shifted = way.times != "unshifted"
        times = sampling_times(
            way.times if shifted else "even",
            way.steps(evaluations),
            shift=self.sampling.noise_shift if shifted else 1.0,
        )
        return self._table(way.solver, times)

    def _table(self, solver: str, times: Tensor) -> Tensor:
        kind = self.sampling.prediction_type
        return solver_table(
            solver, times, prediction=kind, guidance=self.guidance, interval=self.interval
        )

    def _ready(self, dtype: torch.dtype) -> tuple[Engine, Tensor, Conditions, Conditions | None]:
        model = copy.deepcopy(self._model).to(dtype)
        with torch.inference_mode():
            conditions = model.preprocess_conditions(*(f.to(dtype) for f in self._features))
            empty = model.get_empty_conditions(len(self._noise)) if self.guidance > 1 else None
        field = WavflowField(model, self._config, dtype)
        return Engine(field, "eager", dtype), self._noise.to(dtype), conditions, empty

    def solve(self, table: Tensor, evaluated: Callable[[], None]) -> Tensor:  # b n d
        """The final tokens by the float32 network; `evaluated` is called after every row."""
        engine, noise, conditions, empty = self._float32
        return engine.solve(noise, table, conditions, empty, after=lambda *_: evaluated())

    def exact(self, steps: int, evaluated: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """The final tokens in float64, by Runge-Kutta steps and by adaptive ones."""
        engine, noise, conditions, empty = self._ready(torch.float64)
        grid = time_grid(steps, 0.0, 1 - ADAPTIVE_END, slope=10.0)
        edges = torch.tensor([edge for edge in self.interval if 0 < edge < 1], dtype=torch.float64)
        # Where guidance begins or ends a step of next to no length takes the jump.
        times = torch.cat((grid, edges - JUMP, edges + JUMP, torch.ones(1).double())).sort().values
        table = self._table("rk4", times)
        fixed = engine.solve(noise, table, conditions, empty, after=lambda *_: evaluated())

        stepped, low, (begin, stop) = noise, 0.0, self.interval
        for high, weight in ((begin, 1.0), (stop, self.guidance), (1.0, 1.0)):
            if low == high:
                continue

            def predict(t: Tensor, x: Tensor, weight: float = weight) -> Tensor:
                evaluated()
                return mix_guidance(engine.predict(float(t), x, conditions, empty, weight), weight)

            stepped = adaptive(
                predict,
                stepped,
                low,
                high,
                prediction=self.sampling.prediction_type,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                max_calls=10_000,
            )
            low = high
        return fixed, stepped


def difference(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """The norm of the difference over the norm of what is wanted: of all clips, and the median."""
    found, wanted = found.double().flatten(1), wanted.double().flatten(1)
    over_all = (found - wanted).norm() / wanted.norm()
    return {"error": over_all.item(), "median": relative_l2(found, wanted).median().item()}


def study(problem: Problem, exact: int, evaluated: Callable[[], None]) -> dict[str, Any]:
    """Errors and seconds of all ways and budgets, and how exact the reference is."""
    wanted, other = problem.exact(exact, evaluated)
    rows = []
    for way in WAYS:
        for budget in BUDGETS:
            table = problem.table(way, budget)
            begun = time.perf_counter()
            found = problem.solve(table, evaluated)
            rows.append(
                {
                    **asdict(way),
                    "evaluations": len(table),
                    "seconds": time.perf_counter() - begun,
                    **difference(found, wanted),
                }
            )
    return {
        "guidance": problem.guidance,
        "interval": problem.interval,
        "reference_difference": difference(other, wanted)["error"],
        "smallest_error": min(row["error"] for row in rows),
        "rows": rows,
    }


def judge(
    clips: Clips, guidance: float, interval: Interval, batch: int, evaluated: Callable[[], None]
) -> list[dict[str, Any]]:
    """The demo's figures of all ways at the budgets JUDGED, in the dtype of `wavflow generate`."""
    dtype = resolve_dtype("auto", clips.model.device)
    sampler = Sampler(copy.deepcopy(clips.model), clips.config, clips.model.device, dtype)
    rows = []
    for way in JUDGED_WAYS:
        for budget in JUDGED:
            sounds = sampler.generate_features(
                clips.features,
                clips.seeds,
                solver=way.solver,
                steps=way.steps(budget),
                times=way.times,
                guidance=guidance,
                guidance_interval=interval,
                batch_size=batch,
                on_step=lambda _: evaluated(),
            )
            judged = clips.figures(torch.stack([sound.audio for sound in sounds]))
            rows.append({**asdict(way), "evaluations": budget, **judged})
    return rows


def evaluations(exact: int, batches: int, studies: int) -> int:
    """About how often a run calls the network, for its progress bar."""
    studied, judged = (
        sum(CALLS[way.solver] * way.steps(budget) for way in ways for budget in budgets)
        for ways, budgets in ((WAYS, BUDGETS), (JUDGED_WAYS, JUDGED))
    )
    fine = CALLS["rk4"] * exact + ADAPTIVE_CALLS
    return studies * (fine + studied + batches * judged)


def main(
    demo: Annotated[Path, typer.Option(help="Folder of a finished wavflow demo; is only read.")],
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or packaged weights.")] = Path(
        "toy_8k"
    ),
    ema: Annotated[str, typer.Option(help="ema1, ema2 or none.")] = "ema1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    guidance: Annotated[tuple[float, float], typer.Option(help="Two weights, 1 for none.")] = (
        1.0,
        4.5,
    ),
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="The weights above 1 also with guidance between these times only."),
    ] = None,
    clips: Annotated[int, typer.Option(help="Whose errors are measured.", min=1)] = 8,
    judged: Annotated[int, typer.Option(help="Whose sounds are judged.", min=2)] = 32,
    exact: Annotated[int, typer.Option(help="Steps of the reference solution.", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="Judged clips at a time.", min=1)] = 16,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
) -> None:
    """Measure every solver's error against its evaluations on a trained network."""
    name = "bench.run solvers"
    try:
        where = resolve_device(device)
        given = Clips(demo, checkpoint, ema, where, max(clips, judged))
        cases = [(weight, EVERYWHERE) for weight in guidance]
        if guidance_interval is not None:
            cases += [(weight, guidance_interval) for weight in guidance if weight > 1]
        total = evaluations(exact, -(-judged // batch), len(cases))
        results = []
        with counter("evaluations") as progress:
            done = 0

            def evaluated() -> None:
                nonlocal done
                done += 1
                progress(done, total)

            for case in cases:
                found = study(Problem(given, clips, *case), exact, evaluated)
                found["judged"] = judge(given.first(judged), *case, batch, evaluated)
                results.append(found)
    except InputError as error:
        fail(f"{name}: {error}")
    result = {
        "parameters": sum(p.numel() for p in given.model.parameters()),
        "clips": clips,
        "judged_clips": judged,
        "exact": exact,
        "studies": results,
    } | machine(where)
    if json_path is not None:
        write_json(json_path, result)
    if plot is not None:
        draw(result, plot)
    show(result)


def describe(found: dict[str, Any]) -> str:
    """A study's guidance in words."""
    low, high = found["interval"]
    part = "" if (low, high) == EVERYWHERE else f" for t in {low:g} to {high:g}"
    return f"guidance {found['guidance']:g}{part}"


def show(result: dict[str, Any]) -> None:
    for found in result["studies"]:
        table = Table("solver, times", *(str(budget) for budget in BUDGETS), "s at 50")
        for figure in ("recall", "precision", "kind"):
            table.add_column(f"{figure} at {', '.join(map(str, JUDGED))}")
        for way in WAYS:
            key = asdict(way)
            rows = [row for row in found["rows"] if key.items() <= row.items()]
            marks = [row for row in found["judged"] if key.items() <= row.items()]
            cells = [f"{row['error']:.3f} {row['median']:.3f}" for row in rows]
            cells.append(f"{rows[-1]['seconds']:.1f}")
            for figure in ("onset_recall", "onset_precision", "class_accuracy"):
                cells.append(", ".join(f"{row[figure]:.3f}" for row in marks))
            table.add_row(way.name, *cells)
        print(f"{describe(found)}: error of all and median, by evaluations")
        Console(width=150).print(table)
        print(
            f"the references differ by {found['reference_difference']:.2e}, "
            f"{found['reference_difference'] / found['smallest_error']:.3f} of the smallest error"
        )
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, errors of {result['clips']} clips, "
        f"figures of {result['judged_clips']}\n{result['device']}, torch {result['torch']}, "
        f"{result['threads']} threads"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each weight of guidance, error over evaluations, a line a way."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    colours = {"euler": "#4c78a8", "2m": "#c8556b", "ab2": "#f2a13a"}
    colours |= {"midpoint": "#54a868", "heun": "#7c6fb0", "rk4": "#8a6d3b"}
    dashes = {"even": ":", "unshifted": "-.", "sigmoid": "--", "log-snr": "-"}
    style = {"font.size": 9, "axes.edgecolor": RULE, "text.color": INK, "ytick.color": INK}
    with rc_context(style):
        studies = result["studies"]
        figure = Figure((5.2 * len(studies), 4.4), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]
        for panel, found in zip(panels, studies, strict=True):
            for way in WAYS:
                rows = [row for row in found["rows"] if asdict(way).items() <= row.items()]
                panel.plot(
                    [row["evaluations"] for row in rows],
                    [row["median"] for row in rows],
                    dashes[way.times],
                    color=colours[way.solver],
                    marker="o",
                    markersize=2.5,
                    linewidth=1.3,
                    label=way.name,
                )
            panel.set(xscale="log", yscale="log", xlabel="evaluations of the network")
            panel.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(color=RULE, which="both", linewidth=0.5)
            panel.set_title(describe(found), fontsize=10)
        panels[0].set_ylabel("relative error of the trajectory's end, median of clips")
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
        figure.suptitle(
            f"Error against evaluations, {result['parameters'] / 1e6:.1f} M parameters", fontsize=11
        )
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
