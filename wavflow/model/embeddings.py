"""Timestep embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FREQUENCY_BASE = 10000.0
TIMESTEP_FEATURES = 256


def timestep_features(t: Tensor) -> Tensor:  # (b) -> (b 256)
    """``[cos(t f), sin(t f)]`` of t in [0, 1], f = 10000^(-2i/256), in float32 at least."""
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
            return self.mlp(timestep_features(t).to(self.mlp[0].weight.dtype))
