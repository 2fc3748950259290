"""Averages of a model's weights, usable from the first steps on.

With a constant decay of 0.9999 the average after 1,000 steps is 90 % initialisation, and sounds
like it. The decay therefore grows with the number of updates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from wavflow.errors import InputError


def warmed_up_decay(decay: float, age: int) -> float:
    """Decay of the update number `age` (from 0): min(decay, (1 + age) / (10 + age))."""
    return min(decay, (1 + age) / (10 + age))


def initial_share(decay: float, updates: int, *, warmed_up: bool) -> float:
    """Share of the initial weights that is left in an average after `updates` updates."""
    if not warmed_up:
        return decay**updates
    share = 1.0
    for age in range(updates):
        share *= warmed_up_decay(decay, age)
        if share < 1e-12:
            return 0.0
    return share


class Ema:
    """Average of a model's parameters, float32, its decay warmed up (`warmed_up_decay`)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, age: int) -> None:
        """Moves the average towards the parameters; `age` counts the updates before this one."""
        now = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - warmed_up_decay(self.decay, age))

    @torch.no_grad()
    def load(self, values: dict[str, Tensor], path: Path) -> None:
        for name, value in self.values.items():
            if name not in values or values[name].shape != value.shape:
                raise InputError(f"{path}: its average of {name} is missing or of another size")
            value.copy_(values[name])
