"""Randomness that depends on where it is used and on nothing that came before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The randomness of one step: a function of (seed, step, item), hence of nothing earlier."""

    seed: int
    step: int
    indices: list[int]

    def generator(self) -> torch.Generator:
        """A fresh CPU generator for the whole step."""
        return torch.Generator().manual_seed(_mix(self.seed, self.step))

    @property
    def seeds(self) -> Tensor:
        """One seed per item, (b,) int64."""
        return torch.tensor([_mix(self.seed, self.step, i) for i in self.indices])


def _mix(*numbers: int) -> int:
    """Hashes integers to one in [0, 2^63): splitmix64 of each in turn."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
