"""``python -m bench.plot results.json``: the speed-ups and shares of peak of a run as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.machine import fail
from wavflow.media.pictures import INK, QUIET, RULE, STYLE, can_draw

# In this order from the top of each group; the same colour means the same peer everywhere.
PEERS = {"reference": ("eager torch", "#4c78a8"), "compile": ("torch.compile", "#f2a13a")}
BEST = ("best other call", "#54a868")
PEAKS = {
    "of_copy_peak": ("memory: % of this machine's copy", "#7c6fb0"),
    "of_gemm_peak": ("arithmetic: % of this machine's GEMM", "#c8556b"),
}


def speedups(row: dict[str, Any]) -> dict[str, float]:
    """How many times faster the op is than eager torch, torch.compile and the best other call."""
    seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
    ours = seconds.pop(row["runs_as"])
    found = {name: seconds.pop(name) / ours for name in PEERS if name in seconds}
    seconds.pop("copy", None)
    if seconds:
        found["best"] = min(seconds.values()) / ours
    return found


def peak(row: dict[str, Any]) -> tuple[str, float] | None:
    """Which peak bounds the row, and the share of it that was reached; None if not known."""
    known = [(name, row[name]) for name in PEAKS if row.get(name) is not None]
    return max(known, key=lambda item: item[1], default=None)


def label(row: dict[str, Any]) -> str:
    backward = " + backward" if row.get("direction", "forward") != "forward" else ""
    return f"{row['op']}{backward}\n{row.get('workload', '')}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: one group of bars a row, speed-ups on the left, shares of peak on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    with rc_context(STYLE | {"ytick.color": INK}):
        height = 0.52 * len(rows) + 1.9  # inches; the head and foot take 1.9
        figure = Figure((11, height), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        names = [*PEERS.values(), BEST]
        for y, row in enumerate(rows):
            found = speedups(row)
            keys = [key for key in (*PEERS, "best") if key in found]
            bar = 0.78 / max(len(keys), 1)
            for i, key in enumerate(keys):
                at = y + (i - (len(keys) - 1) / 2) * bar
                colour = dict(zip((*PEERS, "best"), names, strict=True))[key][1]
                left.barh(at, found[key] - 1, bar * 0.9, left=1, color=colour, zorder=2)
                ends = (found[key], 4) if found[key] >= 1 else (1, 4)
                left.annotate(
                    f"{found[key]:.2g}" if found[key] < 10 else f"{found[key]:.0f}",
                    (ends[0], at),
                    (ends[1], 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    color=INK,
                )
            share = peak(row)
            if share is not None:
                right.barh(y, 100 * share[1], 0.5, color=PEAKS[share[0]][1], zorder=2)
                right.annotate(
                    f"{100 * share[1]:.0f} %",
                    (100 * share[1], y),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=INK,
                )
        left.set_xscale("log")
        low, high = left.get_xlim()
        low, high = min(low, 0.7), max(high * 1.25, 2)
        ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
        left.set_xticks([x for x in ticks if low <= x <= high])
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} x"))
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xlim(low, high)
        left.axvline(1, color=QUIET, linewidth=0.8, zorder=3)
        left.set_yticks(range(len(rows)), [label(row) for row in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_title("times faster than", loc="left", color=QUIET, fontsize=9)
        right.set_title("share of the peak that bounds it", loc="left", color=QUIET, fontsize=9)
        right.set_xlim(0, max(112, right.get_xlim()[1] * 1.1))
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f} %"))
        right.axvline(100, color=QUIET, linewidth=0.8, zorder=3)
        for axes, entries in ((left, names), (right, list(PEAKS.values()))):
            axes.grid(axis="x", color=RULE, linewidth=0.6, zorder=0)
            axes.tick_params(length=0)
            for side in ("top", "right", "left", "bottom"):
                axes.spines[side].set_visible(False)
            for name, colour in entries:
                axes.barh(0, 0, color=colour, label=name, left=1)
        figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize=8)
        about = rows[0]
        figure.suptitle(
            f"{about['device']}, torch {about['torch']}, {about['dtype']}",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        figure.savefig(path)


def main(
    results: Annotated[Path, typer.Argument(help="What bench.run --json wrote.")],
    out: Annotated[Path | None, typer.Option(help="The PNG; default beside the results.")] = None,
) -> None:
    """Draw the results of a run as bars."""
    if not can_draw():
        fail("bench.plot: matplotlib is not installed (pip install matplotlib)")
    try:
        rows = json.loads(results.read_text(encoding="utf-8"))
        rows = [row for row in rows if "seconds" in row]
    except OSError as error:
        fail(f"bench.plot: {results}: {error.strerror}")
    except (ValueError, TypeError) as error:
        fail(f"bench.plot: {results} is not what bench.run writes: {error}")
    if not rows:
        fail(f"bench.plot: {results} holds no timed row")
    path = results.with_suffix(".png") if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, path)
    print(path)


if __name__ == "__main__":
    typer.run(main)
