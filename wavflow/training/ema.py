"""Averages of a model's weights, usable from the first steps on.

With a constant decay of 0.9999 the average after 1,000 steps is 90 % initialisation, and sounds
like it. The decay therefore grows with the number of updates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from wavflow.base.errors import InputError
from wavflow.training.parallel import fill, local


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
    """Average of a model's parameters, its decay warmed up (`warmed_up_decay`).

    `values` are float32 (float64 for such parameters), sharded as the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, age: int) -> None:
        """Moves the average towards the parameters; `age` counts the updates before this one."""
        values = [local(value) for value in self.values.values()]
        now = [
            local(p.detach()).to(v.dtype) for p, v in zip(model.parameters(), values, strict=True)
        ]
        torch._foreach_lerp_(values, now, 1 - warmed_up_decay(self.decay, age))

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Starts anew from the model's present weights."""
        for value, p in zip(self.values.values(), model.parameters(), strict=True):
            local(value).copy_(local(p))

    @torch.no_grad()
    def load(self, values: dict[str, Tensor], path: Path) -> None:
        """Takes the average from values that were read, whole, from `path`.

        Raises:
            InputError: a value is missing or of another shape.
        """
        for name, value in self.values.items():
            if name not in values or values[name].shape != value.shape:
                raise InputError(f"{path}: its average of {name} is missing or of another size")
            fill(value, values[name])
