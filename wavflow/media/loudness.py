"""Loudness in LUFS (ITU-R BS.1770), measured and set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def measure_loudness(wave: Tensor, rate: int) -> float | None:
    """Integrated loudness of `wave` (t,) in LUFS (ITU-R BS.1770-4).

    None when shorter than one 0.4 s block or below -70 LUFS, the standard's absolute gate.

    Raises:
        ValueError: another shape.
    """
    if wave.ndim != 1:
        raise ValueError(f"measure_loudness: wave has shape {tuple(wave.shape)}, wanted (t,)")
    import pyloudnorm

    meter = pyloudnorm.Meter(rate)
    if wave.numel() < meter.block_size * rate:
        return None
    with np.errstate(divide="ignore"):
        loudness = meter.integrated_loudness(wave.detach().to("cpu", torch.float64).numpy())
    return float(loudness) if loudness >= -70.0 else None


def normalize_loudness(wave: Tensor, rate: int, lufs: float = -23.0) -> Tensor:  # (t,)
    """Scale `wave` (t,) to an integrated loudness of `lufs` (ITU-R BS.1770-4).

    Left as it is where `measure_loudness` finds none. When the gain would push the peak beyond 1,
    the peak becomes 0.99 instead.
    """
    loudness = measure_loudness(wave, rate)
    if loudness is None:
        return wave
    wave = wave * 10.0 ** ((lufs - loudness) / 20.0)
    peak = float(wave.abs().max())
    return wave * (0.99 / peak) if peak > 1.0 else wave
