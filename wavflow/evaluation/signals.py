"""What can be said of a sound, and of a pair of them, from the samples alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from wavflow.media.audio import is_silent
from wavflow.media.loudness import measure_loudness

#: Where levels end in `log_spectral_distance`, relative to the true sound's loudest bin.
FLOOR_DB = -80.0
WINDOW, HOP = 512, 128  # samples, of `log_spectral_distance`
#: Hann windows of `stft_distance`, in samples; each moves on by a quarter of itself.
RESOLUTIONS = (512, 1024, 2048)
# A magnitude of 1 is that of a sine at full scale: levels end at -100 dB.
_LEAST = 1e-5
# Peaks of undistorted sounds touch full scale too, for a sample or two.
_CLIPPED_RUN = 3
_FULL_SCALE = 1 - 2.0**-15


@dataclass(frozen=True)
class Checks:
    """One sound: its length, whether it is silent, its loudness, how much of it is clipped.

    Attributes:
        seconds: its length, in seconds.
        silent: whether no sample is above one step of a 16-bit file.
        clipped: share of its samples that lie in runs of 3 or more at full scale.
        lufs: integrated loudness (BS.1770); None below -70 LUFS or shorter than 0.4 s.
    """

    seconds: float
    silent: bool
    clipped: float
    lufs: float | None


def check(wave: Tensor, rate: int) -> Checks:
    """Checks one sound (t,) at its own rate, in Hz: resampling hides what was clipped."""
    at_limit = np.abs(wave.numpy()) >= _FULL_SCALE
    edges = np.flatnonzero(np.diff(at_limit, prepend=False, append=False))
    runs = np.diff(edges.reshape(-1, 2), axis=1)
    clipped = runs[runs >= _CLIPPED_RUN].sum() / len(wave)
    return Checks(len(wave) / rate, is_silent(wave), float(clipped), measure_loudness(wave, rate))


def compare(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Distances of a generated sound from the true one, both (t,) at one rate.

    The longer one is cut to the shorter one's length.
    """
    length = min(len(found), len(wanted))
    short = max(RESOLUTIONS[-1] - length, 0)
    found, wanted = (pad(wave[None, :length], (0, short)) for wave in (found, wanted))
    return {
        "log_spectral_distance": log_spectral_distance(found, wanted).item(),
        "stft_distance": stft_distance(found, wanted).item(),
    }


def log_spectral_distance(found: Tensor, wanted: Tensor) -> Tensor:  # (clips t) each -> (clips)
    """RMS over times and frequencies of the difference of STFT magnitudes in dB.

    Magnitudes below FLOOR_DB of the clip's largest wanted one count as that much. Hann windows of
    WINDOW samples, HOP apart.
    """
    window = torch.hann_window(WINDOW, dtype=wanted.dtype)
    found, wanted = (
        torch.stft(x, WINDOW, HOP, window=window, return_complex=True).abs()
        for x in (found, wanted)
    )
    floor = wanted.amax((1, 2), keepdim=True).clamp_min(1e-12) * 10 ** (FLOOR_DB / 20)
    level, other = (20 * torch.maximum(x, floor).log10() for x in (found, wanted))
    return (level - other).square().mean((1, 2)).sqrt()


def stft_distance(found: Tensor, wanted: Tensor) -> Tensor:  # (clips t) each -> (clips)
    """Multi-resolution STFT distance (Yamamoto et al. 2020, section 2.2): 0 for equal sounds.

    The mean over RESOLUTIONS of the spectral convergence (norm of the difference of magnitudes
    over the norm of the wanted ones) and the mean absolute difference of their natural
    logarithms. Against silence the convergence is taken over the least magnitude.
    """
    total = torch.zeros(len(found), dtype=found.dtype)
    for size in RESOLUTIONS:
        window = torch.hann_window(size, dtype=wanted.dtype)
        magnitudes = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs()
            / (window.sum() / 2)
            for x in (found, wanted)
        )
        got, true = (x.clamp_min(_LEAST) for x in magnitudes)
        convergence = (got - true).norm(dim=(1, 2)) / true.norm(dim=(1, 2))
        total += convergence + (got.log() - true.log()).abs().mean((1, 2))
    return total / len(RESOLUTIONS)
