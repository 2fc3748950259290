"""Short-time power spectra and mel bands, in numpy and float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

#: Seconds from one spectrum to the next, and seconds that one spans.
HOP, WINDOW = 0.005, 0.032


def power_spectra(wave: Tensor | np.ndarray, rate: int) -> np.ndarray:  # (frames, bins) float64
    """Power spectra around 0, 5, 10 ... ms, normalised so that a row sums to the mean square."""
    x = np.asarray(wave, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"wave has shape {x.shape}, wanted (t,) with t > 0")
    hop, half = max(round(HOP * rate), 1), max(round(WINDOW * rate / 2), 2)
    x = np.pad(x, half, mode="reflect" if x.size > half else "edge")
    rows = np.lib.stride_tricks.sliding_window_view(x, 2 * half)[::hop]
    window = np.hanning(2 * half + 1)[:-1]
    power = np.abs(np.fft.rfft(rows * window)) ** 2
    power[:, 1:-1] *= 2
    return power / (2 * half * np.sum(window**2))


def mel_triangles(bins: int, rate: int, bands: int) -> np.ndarray:  # (bins, bands)
    """Weights of mel bands: overlapping triangles, even on the mel scale from 40 Hz to rate / 2."""
    width = rate / 2 / (bins - 1)
    mel = 2595 * np.log10(1 + np.array([40.0, rate / 2]) / 700)
    edges = 700 * (10 ** (np.linspace(mel[0], mel[1], bands + 2) / 2595) - 1)
    sides = np.maximum(np.diff(edges), width)
    frequency = np.arange(bins) * width
    rise = 1 + (frequency - edges[1:-1, None]) / sides[:-1, None]
    fall = 1 + (edges[1:-1, None] - frequency) / sides[1:, None]
    return np.clip(np.minimum(rise, fall), 0, None).T
