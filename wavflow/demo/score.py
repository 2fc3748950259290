"""Scores of a finished demo, recomputed from the files it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wavflow.demo.metrics import KindClassifier, Matches, match, onsets
from wavflow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

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
#: Training clips that the classifier of kinds learns from, at most.
CLASSIFIER_CLIPS = 600


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
    heard = Listener(out)

    def figures_of(mode: str, control: str | None) -> dict[str, float]:
        judged = [clip for clip in clips if clip["mode"] == mode and clip["control"] == control]
        return heard.figures(mode, judged, [heard.load(out / c["generated"]) for c in judged])

    own = {clip["id"]: clip for clip in clips}
    true = {id: heard.load(out / clip["true"]) for id, clip in own.items()}
    true_onsets = {id: heard.onsets(wave) for id, wave in true.items()}
    kinds = [clip["kind"] for clip in own.values()]
    said = heard.kinds(true.values())
    shifts = [[list(own)[i - by] for i in range(len(own))] for by in range(1, len(own))]
    chance = _onset_figures(
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
        "class_accuracy": float(np.mean([_share(said, shift) for shift in rolled] or [0.0]))
    }
    figures["ceiling"] = _onset_figures((true_onsets[id], own[id]["events"]) for id in own) | {
        "class_accuracy": _share(said, kinds)
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


class Listener:
    """Says what is heard in sounds; learns the kinds from the training audio in `out/toy`.

    Raises:
        InputError: a file that is missing or cannot be read.
    """

    def __init__(self, out: Path) -> None:
        from wavflow.audio import load_audio
        from wavflow.data.manifest import read_manifest

        rows = read_manifest(out / "toy" / "train.csv", ("id", "audio_path"))[:CLASSIFIER_CLIPS]
        world = read_json(out / "toy" / "events.json")
        self.rate = _rate(rows[0].audio_path)
        self._load = load_audio
        self._classifier = KindClassifier(self.rate).fit(
            [self.load(row.audio_path) for row in rows], [world[row.id]["kind"] for row in rows]
        )

    def load(self, path: Path) -> Tensor:  # (t,)
        """A sound file's wave at the rate of the training audio."""
        return self._load(path, self.rate)

    def onsets(self, wave: Tensor) -> np.ndarray:
        return onsets(wave, self.rate)

    def kinds(self, waves: Iterable[Tensor]) -> list[str]:
        return self._classifier.predict(waves)

    def figures(
        self, mode: str, clips: Sequence[dict[str, Any]], waves: Sequence[Tensor]
    ) -> dict[str, float]:
        """The mode's figures: waves (t,) judged by `kind` and `events` (s) of their clips."""
        figures = {"class_accuracy": _share(self.kinds(waves), [clip["kind"] for clip in clips])}
        if "onset_recall" in WANTED[mode]:
            heard = map(self.onsets, waves)
            pairs = zip(heard, (clip["events"] for clip in clips), strict=True)
            figures = _onset_figures(pairs) | figures
        return figures


def _onset_figures(
    pairs: Iterable[tuple[np.ndarray, Sequence[float]]],
) -> dict[str, float]:
    counts = sum((match(heard, events) for heard, events in pairs), Matches())
    return {"onset_recall": counts.recall, "onset_precision": counts.precision}


def _share(said: Sequence[str], wanted: Sequence[str]) -> float:
    same = [a == b for a, b in zip(said, wanted, strict=True)]
    return sum(same) / len(same) if same else 0.0


def _rate(path: Path) -> int:
    import soundfile

    with soundfile.SoundFile(path) as file:
        return int(file.samplerate)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
