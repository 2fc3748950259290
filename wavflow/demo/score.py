"""Scores of a finished demo, recomputed from the files it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wavflow.base.files import read_json
from wavflow.evaluation.toy import Listener, onset_figures, share

#: What a network must reach, at least.
WANTED = {
    "vt2a": {"onset_recall": 0.9, "onset_precision": 0.8, "class_accuracy": 0.9},
    "v2a": {"onset_recall": 0.9, "onset_precision": 0.8, "class_accuracy": 0.8},
    "t2a": {"class_accuracy": 0.9},
}
#: A control may be above chance by this much.
MARGIN = 0.15
MODES = tuple(WANTED)
#: Whose sounds there are: the packaged network's, the controls', and those of a network trained in
#: the demo, for so many seconds ("quick") or for as many steps as the packaged one ("full").
SHIPPED, QUICK, FULL = "shipped", "quick", "full"
CONTROLS = ("untrained", "shuffled")
SERIES = (SHIPPED, QUICK, FULL, *CONTROLS)
#: What the series are called.
NAMES = {
    SHIPPED: "packaged network",
    "untrained": "control, untrained",
    "shuffled": "control, other clips' inputs",
    QUICK: "trained here, briefly",
    FULL: "trained here",
}
#: Series that must reach what is wanted.
JUDGED = (SHIPPED, FULL)


def recompute(out: Path, heard: Listener | None = None) -> dict[str, Any]:
    """All figures of the demo in the folder `out`, from its files alone.

    Reads events.json, the wavs it names, and the training audio of `toy/`.

    Args:
        out: the demo's folder.
        heard: what listens, fitted on that training audio; by default it is made.

    Returns:
        Plain numbers: what was heard by series and mode, `chance` (true sounds judged by other
        clips' events and kinds), `ceiling` (true sounds judged by their own) and `bars`.

    Raises:
        InputError: a file that is missing or cannot be read.
    """
    out = Path(out)
    clips = read_json(out / "events.json")
    heard = heard or Listener(out / "toy" / "events.json")

    def figures_of(series: str, mode: str) -> dict[str, float]:
        judged = [clip for clip in clips if (clip["series"], clip["mode"]) == (series, mode)]
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
    there = {clip["series"] for clip in clips}
    figures: dict[str, Any] = {
        series: {mode: figures_of(series, mode) for mode in MODES}
        for series in SERIES
        if series in there
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
    for series in (*JUDGED, *CONTROLS):
        for mode, values in figures.get(series, {}).items():
            for name, value in values.items():
                least, most = WANTED[mode][name], figures["chance"][name] + MARGIN
                is_judged = series in JUDGED
                found[f"{series}.{mode}.{name}"] = {
                    "value": value,
                    "wanted": f">= {least:g}" if is_judged else f"<= {most:.3f}",
                    "passed": value >= least if is_judged else value <= most,
                }
    return found
