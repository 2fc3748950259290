"""Timestep embedding, and rotary positions beyond the lengths of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Base of the frequencies of timesteps and rotary positions.
FREQUENCY_BASE = 10000.0
#: Width of `timestep_features`.
TIMESTEP_FEATURES = 256


def timestep_features(t: Tensor) -> Tensor:  # (b) -> (b 256)
    """Sinusoids ``[cos(t f), sin(t f)]`` of t in [0, 1], f = 10000^(-2i/256), float32 at least."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponent = torch.arange(0, TIMESTEP_FEATURES, 2, device=t.device, dtype=t.dtype)
    angle = t[:, None] * FREQUENCY_BASE ** (-exponent / TIMESTEP_FEATURES)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """A two-layer MLP of the timestep's sinusoids, (b) -> (b c).

    Autocast is off inside: t close to 1 needs more than bfloat16's 8 bits, and it is b rows only.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            first: Any = self.mlp[0]
            return self.mlp(timestep_features(t).to(first.weight.dtype))


def rope_scale(scaling: str, stretch: float, head_dim: int) -> tuple[float, float]:
    """Distance of two tokens and base of the frequencies, for a clip longer than in training.

    Args:
        scaling: "linear" squeezes the positions into those of training (position interpolation,
            arXiv 2306.15595). "ntk" raises the base so that the slowest frequency turns as far as
            it did in training, and the fastest as fast (arXiv 2309.00071, section 3.1). "none"
            goes on with the positions of training.
        stretch: the clip's length over that of training; up to 1 nothing is scaled.
        head_dim: channels of a head; more than 2 for "ntk".

    Returns:
        The distance of two neighbours, 1 in training, and the base, FREQUENCY_BASE in training.
    """
    if scaling == "none" or stretch <= 1:
        return 1.0, FREQUENCY_BASE
    if scaling == "linear":
        return 1 / stretch, FREQUENCY_BASE
    return 1.0, FREQUENCY_BASE * stretch ** (head_dim / (head_dim - 2))
