"""Scores of a finished demo, recomputed from the files it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wavflow.evaluation.toy import Listener, onset_figures, share
from wavflow.files import read_json

#: What a demo must reach, at least.
WANTED = {
    "vt2a": {"onset_recall": 0.9, "onset_precision": 0.8, "class_accuracy": 0.9},
    "v2a": {"onset_recall": 0.9, "onset_precision": 0.8, "class_accuracy": 0.8},
    "t2a": {"class_accuracy": 0.9},
}
#: A control may be above chance by this much.
MARGIN = 0.15
MODES = tuple(WANTED)
CONTROLS = ("untrained", "shuffled")


def recompute(out: Path) -> dict[str, Any]:
    """All figures of the demo in the folder `out`, from its files alone.

    Reads events.json, the wavs it names, and the training audio of `toy/`. Returns, as plain
    numbers, `vt2a`, `v2a`, `t2a`, `controls`, `chance` (true sounds judged by other clips'
    events and kinds), `ceiling` (true sounds judged by their own) and `bars`.

    Raises:
        InputError: a file that is missing or cannot be read.
    """
    out = Path(out)
    clips = read_json(out / "events.json")
    heard = Listener(out / "toy" / "events.json")

    def figures_of(mode: str, control: str | None) -> dict[str, float]:
        judged = [clip for clip in clips if clip["mode"] == mode and clip["control"] == control]
        found = heard.figures(judged, [heard.load(out / c["generated"]) for c in judged])
        return {name: found[name] for name in WANTED[mode]}

    own = {clip["id"]: clip for clip in clips}
    true = {id: heard.load(out / clip["true"]) for id, clip in own.items()}
    true_onsets = {id: heard.onsets(wave) for id, wave in true.items()}
    kinds = [clip["kind"] for clip in own.values()]
    said = heard.kinds(true.values())
    shifts = [[list(own)[i - by] for i in range(len(own))] for by in range(1, len(own))]
    chance = onset_figures(
        (true_onsets[other], own[id]["events"])
        for shift in shifts
        for id, other in zip(own, shift, strict=True)
    )
    rolled = [kinds[by:] + kinds[:by] for by in range(1, len(own))]
    figures: dict[str, Any] = {mode: figures_of(mode, None) for mode in MODES}
    figures["controls"] = {
        control: {mode: figures_of(mode, control) for mode in MODES} for control in CONTROLS
    }
    figures["chance"] = chance | {
        "class_accuracy": float(np.mean([share(said, shift) for shift in rolled] or [0.0]))
    }
    figures["ceiling"] = onset_figures((true_onsets[id], own[id]["events"]) for id in own) | {
        "class_accuracy": share(said, kinds)
    }
    figures["bars"] = bars(figures)
    return figures


def bars(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure that has something to reach, or to stay below: value, wanted, passed."""
    found = {}
    for mode, wanted in WANTED.items():
        for name, least in wanted.items():
            value = figures[mode][name]
            found[f"{mode}.{name}"] = {
                "value": value,
                "wanted": f">= {least:g}",
                "passed": value >= least,
            }
    for control, modes in figures["controls"].items():
        for mode, values in modes.items():
            for name, value in values.items():
                most = figures["chance"][name] + MARGIN
                found[f"{control}.{mode}.{name}"] = {
                    "value": value,
                    "wanted": f"<= {most:.3f}",
                    "passed": value <= most,
                }
    return found
