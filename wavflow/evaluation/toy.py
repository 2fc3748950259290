"""Figures that judge sounds of a toy world: when they start, and what kind of thing is heard.

Both are blind to loudness. A wave is a float tensor or array (t,).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wavflow.base.errors import InputError
from wavflow.base.files import read_json
from wavflow.data.manifest import needed, read_manifest
from wavflow.evaluation.spectra import HOP, mel_triangles, power_spectra
from wavflow.media.audio import load_audio, sound_rate

if TYPE_CHECKING:
    from torch import Tensor

#: Seconds between an onset and the event it belongs to, at most.
TOLERANCE = 0.05
#: Training clips that the classifier of kinds learns from, at most.
CLASSIFIER_CLIPS = 600

_RANGE = 35.0  # dB below the clip's loudest moment where levels end
_SIDE = 4  # hops on either side of a moment that are compared
_GAP = 30  # hops between onsets, at least
_LEAST_RISE = 6.0  # dB
_SHARE = 0.4  # of the clip's steepest rise
_LEAST_LEVEL = -14.0  # dB, relative to the clip's loudest moment
_QUIET = 2.0**-15  # RMS below one step of a 16-bit file
_BANDS = 24


def onsets(wave: Tensor | np.ndarray, rate: int) -> np.ndarray:
    """Times (s), ascending, at which sounds start; none in silence or in a steady sound.

    A start is a steep rise of the level, compared with the clip's steepest rise and its loudest
    moment. Its time is where the level passes 6 dB below the peak that follows.
    """
    power = power_spectra(wave, rate).sum(axis=1)
    if np.sqrt(power.max()) <= _QUIET:
        return np.zeros(0)
    level = np.maximum(10 * np.log10(power / power.max() + 1e-12), -_RANGE)
    padded = np.pad(level, _SIDE, mode="edge")
    means = np.convolve(padded, np.full(_SIDE, 1 / _SIDE), mode="valid")
    # rise[i]: mean of the _SIDE hops after hop i less that of the _SIDE hops before it.
    rise = means[_SIDE + 1 :] - means[: len(level)]
    wanted = max(_LEAST_RISE, _SHARE * rise.max())
    found: list[int] = []
    for at in np.argsort(-rise, kind="stable"):
        if rise[at] < wanted:
            break
        peak = level[at : at + 2 * _SIDE].max()
        if peak >= _LEAST_LEVEL and all(abs(at - other) >= _GAP for other in found):
            found.append(int(at))
    return np.array([_crossing(level, at) for at in sorted(found)]) * HOP


def _crossing(level: np.ndarray, at: int) -> float:
    """Hop, interpolated, at which the rise around `at` passes 6 dB below its peak."""
    first = max(at - _SIDE, 0)
    part = level[first : at + 2 * _SIDE]
    bar = part[at - first :].max() - 6.0
    above = int(np.argmax(part >= bar))
    if above == 0:
        return float(first)
    low, high = part[above - 1], part[above]
    return first + above - 1 + float((bar - low) / (high - low))


@dataclass(frozen=True)
class Matches:
    """Counts of onsets and events; adding two sets of clips adds their counts."""

    matched: int = 0
    events: int = 0
    onsets: int = 0

    def __add__(self, other: Matches) -> Matches:
        return Matches(
            self.matched + other.matched, self.events + other.events, self.onsets + other.onsets
        )

    @property
    def recall(self) -> float:
        """Share of the events that have an onset; 0 without events."""
        return self.matched / self.events if self.events else 0.0

    @property
    def precision(self) -> float:
        """Share of the onsets that belong to an event; 0 without onsets."""
        return self.matched / self.onsets if self.onsets else 0.0


def match(
    onsets: Sequence[float] | np.ndarray,
    events: Sequence[float] | np.ndarray,
    tolerance: float = TOLERANCE,
) -> Matches:
    """Pairs onsets with events (s), each at most once, as many pairs as there can be."""
    matched, waiting = 0, sorted(events)
    for onset in sorted(onsets):
        while waiting and waiting[0] < onset - tolerance - 1e-9:
            waiting.pop(0)
        if waiting and waiting[0] <= onset + tolerance + 1e-9:
            waiting.pop(0)
            matched += 1
    return Matches(matched, len(events), len(onsets))


def kind_features(wave: Tensor | np.ndarray, rate: int) -> np.ndarray:  # (3 * 24 + 4,)
    """What a sound is like, whatever its level: mel bands of its louder moments, and their course.

    Silence gives zeros.
    """
    power = power_spectra(wave, rate)
    total = power.sum(axis=1)
    if np.sqrt(total.max()) <= _QUIET:
        return np.zeros(3 * _BANDS + 4)
    kept = np.flatnonzero(total >= total.max() * 10 ** (-15 / 10))
    power, total = power[kept], total[kept]
    bands = power @ mel_triangles(power.shape[1], rate, _BANDS)
    shape = 10 * np.log10(bands / total[:, None] + 1e-3)
    mix = 10 * np.log10(bands.sum(axis=0) / total.sum() + 1e-3)
    # 0: as spread out as can be; far below: a pure tone.
    flatness = np.log(power + 1e-12 * total.max()).mean(axis=1) - np.log(power.mean(axis=1))
    centre = bands @ np.arange(_BANDS) / (bands.sum(axis=1) + 1e-12 * total)
    course = np.append(np.diff(centre)[np.diff(kept) == 1], 0.0)
    rest = [flatness.mean(), centre.std(), np.median(course), np.abs(course).mean()]
    return np.concatenate([mix, shape.mean(axis=0), shape.std(axis=0), rest])


class KindClassifier:
    """Tells kinds of sound apart: logistic regression on `kind_features`.

    Fitted on each wave as it is, and with white noise 3 to 30 dB below it, so that a little
    hiss does not change the verdict.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, rate: int, seed: int = 0) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise InputError(
                "kinds of sound need scikit-learn, which is not installed "
                "(pip install 'wavflow[demo]')"
            ) from None

        self.rate = rate
        self._rng = np.random.default_rng(seed)
        self._model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))

    def fit(self, waves: Iterable[Tensor | np.ndarray], kinds: Sequence[str]) -> KindClassifier:
        """Learns from waves at the classifier's rate and the kind of each."""
        rows, labels = [], []
        for wave, kind in zip(waves, kinds, strict=True):
            clean = np.asarray(wave, dtype=np.float64)
            for noise in (0.0, 10 ** (-self._rng.uniform(3, 30) / 20)):
                level = noise * np.sqrt(np.mean(clean**2))
                noisy = clean + level * self._rng.standard_normal(clean.size)
                rows.append(kind_features(noisy, self.rate))
                labels.append(kind)
        self._model.fit(np.stack(rows), labels)
        return self

    def predict(self, waves: Iterable[Tensor | np.ndarray]) -> list[str]:
        """The kind of each wave."""
        return self.predict_features([kind_features(wave, self.rate) for wave in waves])

    def predict_features(self, rows: Sequence[np.ndarray]) -> list[str]:
        """The kind of each sound, from its `kind_features`."""
        return [str(kind) for kind in self._model.predict(np.stack(rows))] if len(rows) else []


class Listener:
    """Says what is heard in sounds of a toy world; learns the kinds from its training audio.

    Args:
        events: the world's events.json, with train.csv and its sounds beside it.

    Attributes:
        path: the events.json.
        scenes: {id: {"kind": ..., "times": seconds of the impacts, ...}} of all its clips.
        rate: Hz of the training audio, at which sounds are judged.

    Raises:
        InputError: a file that is missing or cannot be read.
    """

    def __init__(self, events: Path) -> None:
        self.path = events
        rows = read_manifest(events.parent / "train.csv", ("id", "audio_path"))[:CLASSIFIER_CLIPS]
        if not rows:
            raise InputError(f"{events.parent / 'train.csv'}: no usable row")
        self.scenes = read_scenes(events)
        for row in rows:
            if row.id not in self.scenes:
                raise InputError(f"{events}: no clip {row.id!r}, which train.csv lists")
        self.rate = sound_rate(needed(rows[0].audio_path))
        self.classifier = KindClassifier(self.rate).fit(
            [self.load(needed(row.audio_path)) for row in rows],
            [self.scenes[row.id]["kind"] for row in rows],
        )

    def load(self, path: Path) -> Tensor:  # (t,)
        """A sound file's wave at the rate of the training audio."""
        return load_audio(path, self.rate)

    def onsets(self, wave: Tensor) -> np.ndarray:
        """Times (s) at which sounds start in a wave (t,)."""
        return onsets(wave, self.rate)

    def kinds(self, waves: Iterable[Tensor]) -> list[str]:
        """The kind of each wave (t,)."""
        return self.classifier.predict(waves)

    def figures(
        self, clips: Sequence[Mapping[str, Any]], waves: Sequence[Tensor]
    ) -> dict[str, float]:
        """Computes all figures: waves (t,) are judged by `kind` and `events` (s) of their clips."""
        heard = map(self.onsets, waves)
        pairs = zip(heard, (clip["events"] for clip in clips), strict=True)
        kinds = [clip["kind"] for clip in clips]
        return onset_figures(pairs) | {"class_accuracy": share(self.kinds(waves), kinds)}


def read_scenes(events: Path) -> dict[str, dict[str, Any]]:
    """A toy world's events.json: {id: {"kind", "times", "split"}}.

    Raises:
        InputError: no such file, or another content.
    """
    scenes = read_json(events)
    if not isinstance(scenes, dict) or not all(
        isinstance(scene, dict) and scene.keys() >= {"kind", "times"} for scene in scenes.values()
    ):
        raise InputError(f"{events}: wanted a toy world's {{id: {{kind, times, split}}}}")
    return scenes


def onset_figures(pairs: Iterable[tuple[np.ndarray, Sequence[float]]]) -> dict[str, float]:
    """Recall and precision over clips of (onsets heard, events), both in seconds."""
    counts = sum((match(heard, events) for heard, events in pairs), Matches())
    return {"onset_recall": counts.recall, "onset_precision": counts.precision}


def share(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of places where both say the same; 0 where there are none."""
    same = [a == b for a, b in zip(said, wanted, strict=True)]
    return sum(same) / len(same) if same else 0.0
