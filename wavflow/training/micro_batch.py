"""From a micro-batch's examples to their losses, for training and for validation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wavflow.base.seeding import Draw
from wavflow.data.order import Work
from wavflow.training.objective import Batch, Dataset, Loaded, LossTerms, Objective


@dataclass(frozen=True)
class _Pinned:
    """What was loaded, in page-locked memory."""

    batch: Batch
    problems: dict[int, str]


class BatchLoss:
    """Loads micro-batches and takes the losses of one model.

    A process that has no example in a micro-batch takes one that does not count: all processes
    exchange gradients and shards in every forward and backward.

    Args:
        objective: gives the loss.
        model: called by the objective, on `device`; wrapped or compiled as it is trained.
        device: where the loss is taken.
        dtype: what autocast casts to; there is none in float32 and float64.
        seed: what the draws depend on, beside the examples' positions.
        pinned: whether batches are loaded to page-locked memory, where `device` is a GPU.
    """

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int,
        pinned: bool = False,
    ) -> None:
        self.objective, self.model = objective, model
        self.device, self.dtype = device, dtype
        self.seed, self.pinned = seed, pinned and device.type == "cuda"

    def load(self, dataset: Dataset, work: Work) -> Loaded:
        """The clips of a micro-batch; called from loader threads."""
        loaded = dataset.load(work.indices or [0], self._draw(work))
        return _Pinned(loaded.batch.pin_memory(), loaded.problems) if self.pinned else loaded

    def __call__(self, work: Work, loaded: Loaded) -> tuple[LossTerms, Tensor]:
        """The losses, 0 where they do not count, and whether they do: (b,) 0 or 1."""
        counts = torch.ones(max(len(work.positions), 1))
        counts[[*loaded.problems] if work.positions else [0]] = 0
        with self._autocast():
            batch = loaded.batch.to(self.device)
            terms = self.objective.loss(self.model, batch, self._draw(work))
        if terms.values.shape != counts.shape:
            raise ValueError(
                f"the loss has shape {tuple(terms.values.shape)}, wanted {tuple(counts.shape)}"
            )
        counts = to_device(counts, self.device)
        return replace(terms, values=torch.where(counts > 0, terms.values, 0)), counts

    def _draw(self, work: Work) -> Draw:
        return Draw(self.seed, work.positions or [0])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
