"""An evaluation, shown on the console."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table
from rich.text import Text

from wavflow.base.console import console
from wavflow.evaluation.evaluate import Evaluation
from wavflow.evaluation.figures import Figure
from wavflow.evaluation.listen import SIDES

#: Sorts of problems that are shown, and ids that are named of each, at most.
SHOWN = 8
ARROWS = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}


def show(result: Evaluation) -> None:
    """Prints an evaluation: figures, counts and what was left out."""
    confidence = f"{100 * result.settings['confidence']:g} % interval"
    table = Table("figure, and where it is better")
    for title in ("value", confidence, "sounds"):
        table.add_column(title, justify="right", no_wrap=True)
    if any(figure.note for figure in result.figures):
        table.add_column("note")
    group = ""
    for figure in result.figures:
        if group not in ("", (group := figure.name.partition(".")[0])):
            table.add_section()
        table.add_row(*map(Text, _cells(figure)[: len(table.columns)]))
    console().print(table)
    for side in SIDES:
        c = result.counts[side]
        _say(
            f"{side}: {c['read']} of {c['files']} files read, {c['seconds']:.0f} s, "
            f"{c['silent']} silent, {c['clipped']} clipped"
        )
    counts = result.counts
    _say(
        f"{counts['pairs']} pairs, {counts['missing']} missing, {counts['extra']} extra, "
        f"compared at {result.settings['rate']} Hz"
    )
    groups = defaultdict(list)
    for problem in result.problems:
        groups[problem.where, problem.reason].append(problem.id)
    for (where, reason), ids in list(groups.items())[:SHOWN]:
        names = ", ".join(ids[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")
        _say(f"left out, {where}, {len(ids)}: {names}: {reason}")
    if len(groups) > SHOWN:
        _say(f"and {len(groups) - SHOWN} more of the kind; --json names all")


def _cells(figure: Figure) -> tuple[str, ...]:
    name = f"{figure.name} {ARROWS[figure.better]}"
    value = "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}".strip()
    interval = "" if figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"
    return name, value, interval, str(figure.count), figure.note


def _say(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=True, markup=False)
