"""Randomness that depends on where in a run it is used, and on nothing that came before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """The randomness of some examples of a run, each a function of (seed, position) alone.

    An example's position counts the examples that the run has taken before it. What it draws is
    the same on every device, in any batch, on any number of processes and after a resume.

    Attributes:
        seed: the run's seed.
        positions: the examples' positions in the run, (b,).
    """

    seed: int
    positions: Sequence[int]

    @property
    def seeds(self) -> Tensor:
        """A seed for each example, (b,) int64, not negative: for noise drawn inside a kernel."""
        return torch.tensor([mix(self.seed, p) >> 1 for p in self.positions])

    def uniform(self, name: str) -> Tensor:
        """A number in (0, 1) for each example, (b,) float64; other names give other numbers."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        bits = [mix(self.seed, p, key) >> 12 for p in self.positions]
        return (torch.tensor(bits, dtype=torch.float64) + 0.5) / 2**52

    def normal(self, name: str) -> Tensor:
        """A standard normal number for each example, (b,) float64; drawn as in `uniform`."""
        return torch.special.ndtri(self.uniform(name))


def mix(*numbers: int) -> int:
    """Hashes integers to one integer in [0, 2^64), by splitmix64 of each in turn."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state
