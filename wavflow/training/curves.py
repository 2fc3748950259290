"""How training runs went, as a picture: the lines of their metrics.jsonl over the steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wavflow.base.errors import InputError
from wavflow.media import pictures
from wavflow.media.pictures import INK, QUIET, RULE, STYLE
from wavflow.training.run_log import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b6fb6", "#e9862a", "#2a9d8f", "#c8556b", "#7c6fb0", "#8a6d3b")
BY_T = "loss_by_t/"
VALIDATION = {"val/loss": "o", "val/loss_ema1": "D"}  # losses: markers
# Panels besides the losses: title, and how its numbers are shown.
PANELS = {
    "grad_norm": ("gradient norm", "{x:g}"),
    "lr": ("learning rate", "{x:g}"),
    "clips_per_second": ("clips a second", "{x:g}"),
    "mfu": ("MFU", "{x:.0%}"),
    "memory_gb": ("memory, GB", "{x:g}"),
}


@dataclass(frozen=True)
class Curve:
    """Values (n,) at steps (n,); a value that was not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self) -> np.ndarray:  # n
        """The mean of a fortieth of the curve, at least five points, around each point."""
        reach = max(len(self.values) // 80, 2)
        known = np.isfinite(self.values)
        kernel = np.ones(2 * reach + 1)
        total = np.convolve(np.where(known, self.values, 0), kernel)[reach:-reach]
        count = np.convolve(known, kernel)[reach:-reach]
        return np.divide(total, count, where=count > 0, out=np.full(len(total), np.nan))


@dataclass(frozen=True)
class Run:
    """A run's name and curves, {metric: curve}."""

    name: str
    curves: dict[str, Curve]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The curves of a run's folder.

    Raises:
        InputError: no such folder, no metrics.jsonl, or no line in it.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise InputError(f"{folder}: no {METRICS}; wanted the folder of a training run")
    points: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(path):
        for key, value in line.items():
            if value is None or isinstance(value, (int, float)):
                points.setdefault(key, []).append(
                    (line["step"], np.nan if value is None else value)
                )
    if not points:
        raise InputError(f"{path}: no line yet")
    curves = {key: Curve(*np.array(found, dtype=float).T) for key, found in points.items()}
    return Run(Path(folder).resolve().name, curves)


def plot_runs(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None) -> Path:
    """Draws the loss, its parts, and what else was recorded of one run or several, overlaid.

    Args:
        runs: folders of runs.
        out: the PNG; None for curves.png in the folder of the one run.

    Returns:
        The file.

    Raises:
        InputError: matplotlib is missing, a folder without metrics, several runs without `out`.
    """
    if not pictures.can_draw():
        raise InputError(f"plots need matplotlib ({pictures.INSTALL})")
    if out is None and len(runs) > 1:
        raise InputError("several runs need --out, the file to write")
    path = Path(runs[0]) / "curves.png" if out is None else Path(out)
    _draw([read_run(run) for run in runs], path)
    return path


def _draw(runs: Sequence[Run], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    by_t = any(key.startswith(BY_T) for run in runs for key in run.curves)
    panels = [key for key in PANELS if any(key in run.curves for run in runs)]
    with rc_context(STYLE):
        figure = Figure((13, 7.6 if panels else 4.6), layout="constrained")
        rows: Any = figure.subfigures(2, 1, height_ratios=(3, 2)) if panels else [figure]
        top = rows[0].subplots(1, 1 + by_t, width_ratios=(3, 2)[: 1 + by_t], squeeze=False)[0]
        _draw_losses(top[0], runs)
        if by_t:
            _draw_by_t(top[1], runs)
        if panels:
            for key, axes in zip(panels, np.ravel(rows[1].subplots(1, len(panels))), strict=True):
                _draw_panel(axes, runs, key)
        figure.suptitle(
            ", ".join(run.name for run in runs), x=0.01, ha="left", fontsize=12, fontweight="bold"
        )
        pictures.save(figure, path)


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    several = len(runs) > 1
    for run, colour in zip(runs, _colours(runs), strict=True):
        if "loss" in run.curves:
            _draw_curve(axes, run.curves["loss"], colour, run.name if several else "training")
        for key, marker in VALIDATION.items():
            if key not in run.curves:
                continue
            curve, name = run.curves[key], key.removeprefix("val/").replace("loss_", "")
            label = f"held out{'' if name == 'loss' else f', {name}'}"
            axes.plot(
                curve.steps,
                curve.values,
                marker=marker,
                ms=5,
                lw=0.8,
                color=colour if several else INK,
                mfc="white" if key != "val/loss" else None,
                label=f"{run.name}, {label}" if several else label,
                zorder=4,
            )
    _finish(axes, runs, "loss", "{x:g}", ("loss", *VALIDATION))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _draw_by_t(axes: Axes, runs: Sequence[Run]) -> None:
    """One smoothed curve a bucket of t, darker towards the data."""
    buckets = sorted({key for run in runs for key in run.curves if key.startswith(BY_T)})
    for run, colour in zip(runs, _colours(runs), strict=True):
        for place, key in enumerate(buckets):
            if key not in run.curves:
                continue
            axes.plot(
                run.curves[key].steps,
                run.curves[key].smoothed(),
                color=_mixed(colour, 0.3 + 0.7 * (place + 1) / len(buckets)),
                lw=1.5,
                label=f"t {key.removeprefix(BY_T)}" if run is runs[0] else None,
            )
    _finish(axes, runs, "loss by t (0 noise, 1 data)", "{x:g}", buckets)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2)


def _draw_panel(axes: Axes, runs: Sequence[Run], key: str) -> None:
    title, form = PANELS[key]
    for run, colour in zip(runs, _colours(runs), strict=True):
        if key == "lr" and key in run.curves:  # its corners are meant
            axes.plot(run.curves[key].steps, run.curves[key].values, color=colour, lw=1.5)
        elif key in run.curves:
            _draw_curve(axes, run.curves[key], colour, None)
    _finish(axes, runs, title, form, (key,), from_zero=key != "grad_norm")


def _draw_curve(axes: Axes, curve: Curve, colour: str, label: str | None) -> None:
    axes.plot(curve.steps, curve.values, color=_mixed(colour, 0.35), lw=0.7)
    axes.plot(curve.steps, curve.smoothed(), color=colour, lw=2, label=label, zorder=3)


def _finish(
    axes: Axes,
    runs: Sequence[Run],
    title: str,
    form: str,
    keys: Sequence[str],
    *,
    from_zero: bool = False,
) -> None:
    """Title, grid and scale: from zero, or logarithmic where values span a factor of four."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    values = np.concatenate(
        [run.curves[key].values for run in runs for key in keys if key in run.curves]
        or [np.empty(0)]
    )
    values = values[np.isfinite(values)]
    if from_zero:
        axes.set_ylim(0, 1.08 * values.max(initial=0) or None)
    elif len(values) and values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(form)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step")
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", labelcolor=QUIET)
    axes.spines[:].set_visible(False)


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(runs))]


def _mixed(colour: str, share: float) -> tuple[float, ...]:
    """Mixes `share` of a colour with white."""
    from matplotlib.colors import to_rgb

    return tuple(1 - share * (1 - part) for part in to_rgb(colour))
