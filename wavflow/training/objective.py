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
        batch: of all that were asked for.
        problems: the place in the batch of each that could not be read -> why. Its loss is left
            out.
    """

    @property
    def batch(self) -> Batch: ...
    @property
    def problems(self) -> dict[int, str]: ...


class Objective(Protocol):
    """What is trained: a model, and the loss of a batch."""

    def build(self) -> nn.Module:
        """A fresh model on the CPU; the same at every call with the same state of torch's
        generator. Parameters that are not trained require no gradient."""
        ...

    def loss(self, model: nn.Module, batch: Any, draw: Draw) -> LossTerms:
        """The loss, of the model through its `forward` alone; all randomness is the draw's."""
        ...

    def samples(self, model: nn.Module, dataset: Any) -> list[Sample]:
        """What a model makes of a dataset's first clips."""
        ...


class Dataset(Protocol):
    """Where batches come from. `load` is called from loader threads."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def order(self, seed: int) -> Order: ...
    def load(self, indices: Sequence[int], draw: Draw) -> Loaded: ...
    def fingerprint(self) -> str: ...
