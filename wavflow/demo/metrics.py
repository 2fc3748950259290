"""Figures that judge generated sound: when it starts, and what kind of thing is heard.

Both are blind to loudness. A wave is a float tensor or array (t,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

#: Seconds between an onset and the event it belongs to, at most.
TOLERANCE = 0.05

_HOP, _WINDOW = 0.005, 0.032  # seconds
_RANGE = 35.0  # dB below the clip's loudest moment where levels end
_SIDE = 4  # hops on either side of a moment that are compared
_GAP = 30  # hops between onsets, at least
_LEAST_RISE = 6.0  # dB
_SHARE = 0.4  # of the clip's steepest rise
_LEAST_LEVEL = -14.0  # dB, relative to the clip's loudest moment
_QUIET = 2.0**-15  # RMS below one step of a 16-bit file
_BANDS = 24


def _spectra(wave: Tensor | np.ndarray, rate: int) -> np.ndarray:  # (frames, bins) float64
    """Power spectra around 0, 5, 10 ... ms, normalised so that a row sums to the mean square."""
    x = np.asarray(wave, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"wave has shape {x.shape}, wanted (t,) with t > 0")
    hop, half = max(round(_HOP * rate), 1), max(round(_WINDOW * rate / 2), 2)
    x = np.pad(x, half, mode="reflect" if x.size > half else "edge")
    rows = np.lib.stride_tricks.sliding_window_view(x, 2 * half)[::hop]
    window = np.hanning(2 * half + 1)[:-1]
    power = np.abs(np.fft.rfft(rows * window)) ** 2
    power[:, 1:-1] *= 2
    return power / (2 * half * np.sum(window**2))


def onsets(wave: Tensor | np.ndarray, rate: int) -> np.ndarray:
    """Times (s), ascending, at which sounds start; none in silence or in a steady sound.

    A start is a steep rise of the level, compared with the clip's steepest rise and its loudest
    moment. Its time is where the level passes 6 dB below the peak that follows.
    """
    power = _spectra(wave, rate).sum(axis=1)
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
    return np.array([_crossing(level, at) for at in sorted(found)]) * _HOP


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
    power = _spectra(wave, rate)
    total = power.sum(axis=1)
    if np.sqrt(total.max()) <= _QUIET:
        return np.zeros(3 * _BANDS + 4)
    kept = np.flatnonzero(total >= total.max() * 10 ** (-15 / 10))
    power, total = power[kept], total[kept]
    bands = power @ _triangles(power.shape[1], rate)
    shape = 10 * np.log10(bands / total[:, None] + 1e-3)
    mix = 10 * np.log10(bands.sum(axis=0) / total.sum() + 1e-3)
    # 0: as spread out as can be; far below: a pure tone.
    flatness = np.log(power + 1e-12 * total.max()).mean(axis=1) - np.log(power.mean(axis=1))
    centre = bands @ np.arange(_BANDS) / (bands.sum(axis=1) + 1e-12 * total)
    course = np.append(np.diff(centre)[np.diff(kept) == 1], 0.0)
    rest = [flatness.mean(), centre.std(), np.median(course), np.abs(course).mean()]
    return np.concatenate([mix, shape.mean(axis=0), shape.std(axis=0), rest])


def _triangles(bins: int, rate: int) -> np.ndarray:  # (bins, bands)
    """Overlapping triangles, even on the mel scale from 40 Hz to rate / 2."""
    width = rate / 2 / (bins - 1)
    mel = 2595 * np.log10(1 + np.array([40.0, rate / 2]) / 700)
    edges = 700 * (10 ** (np.linspace(*mel, _BANDS + 2) / 2595) - 1)
    sides = np.maximum(np.diff(edges), width)
    frequency = np.arange(bins) * width
    rise = 1 + (frequency - edges[1:-1, None]) / sides[:-1, None]
    fall = 1 + (edges[1:-1, None] - frequency) / sides[1:, None]
    return np.clip(np.minimum(rise, fall), 0, None).T


class KindClassifier:
    """Tells kinds of sound apart: logistic regression on `kind_features`.

    Fitted on each wave as it is, and with white noise 3 to 30 dB below it, so that a little
    hiss does not change the verdict.
    """

    def __init__(self, rate: int, seed: int = 0) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

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
        rows = [kind_features(wave, self.rate) for wave in waves]
        return [str(kind) for kind in self._model.predict(np.stack(rows))] if rows else []
