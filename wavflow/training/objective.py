"""What the trainer asks of what it trains and of what it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wavflow.base.seeding import Draw
from wavflow.data.order import Order
from wavflow.training.run_log import Sample


@dataclass(frozen=True)
class LossTerms:
    """The loss of some clips.

    Attributes:
        values: (b,), differentiable in the model's parameters.
        t: (b,), the times of the flow at which they were taken, or None.
    """

    values: Tensor
    t: Tensor | None = None


class Batch(Protocol):
    """Some clips side by side."""

    def pin_memory(self) -> Batch: ...
    def to(self, device: torch.device) -> Batch: ...


class Loaded(Protocol):
    """Clips as a dataset gives them.

    Attributes:
        batch: all clips that were asked for, in their order.
        problems: for each clip that could not be read, its place in the batch -> why. Its loss is
            left out.
    """

    @property
    def batch(self) -> Batch: ...
    @property
    def problems(self) -> dict[int, str]: ...


class Objective(Protocol):
    """What is trained: a model, and the loss of a batch."""

    def build(self) -> nn.Module:
        """A fresh model on the CPU, the same wherever torch's generator has the same state.

        Parameters that are not trained require no gradient.
        """
        ...

    def loss(self, model: nn.Module, batch: Any, draw: Draw) -> LossTerms:
        """The loss, of the model through its `forward` alone; all randomness is the draw's."""
        ...

    def samples(self, model: nn.Module, dataset: Any) -> list[Sample]:
        """Sounds that the model makes of a dataset's first clips, to listen to."""
        ...


class Dataset(Protocol):
    """Where batches come from.

    `load` gives the clips of these indices and is called from loader threads; `order` says which
    clip is which example of a run; `fingerprint` changes where the usable clips do.
    """

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def order(self, seed: int) -> Order: ...
    def load(self, indices: Sequence[int], draw: Draw) -> Loaded: ...
    def fingerprint(self) -> str: ...
