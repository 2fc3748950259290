"""The loss of held-out clips: always the same clips, noise and times, so that steps compare."""

from __future__ import annotations

import math

import torch
from torch import nn

from wavflow.base.processes import World
from wavflow.data.order import plan
from wavflow.training.ema import Ema
from wavflow.training.micro_batch import BatchLoss
from wavflow.training.objective import Dataset
from wavflow.training.parallel import local

#: What noise and times depend on, whatever the run's own seed is.
SEED = 0


@torch.no_grad()
def validate(
    loss: BatchLoss, dataset: Dataset, model: nn.Module, ema: Ema, world: World, batch_size: int
) -> dict[str, float]:
    """Mean losses `val/loss` with the model's weights and `val/loss_ema1` with their average.

    All processes call it. Weights, generators and gradients are afterwards as they were before.

    Args:
        loss: takes the losses; its seed is SEED.
        dataset: the clips, all of them.
        model: the one whose weights are exchanged for the average's and back.
        ema: the average.
        world: the processes, among which the clips are divided.
        batch_size: clips that a process takes at a time.

    Returns:
        The two losses; NaN where no clip could be read.
    """
    generators = [world.device] if world.device.type == "cuda" else []
    weights = [local(p) for p in model.parameters()]
    kept = [w.clone() for w in weights]
    model.eval()
    with torch.random.fork_rng(generators):
        figures = {"val/loss": _mean(loss, dataset, world, batch_size)}
        try:
            torch._foreach_copy_(weights, [local(v) for v in ema.values.values()])
            figures["val/loss_ema1"] = _mean(loss, dataset, world, batch_size)
        finally:
            torch._foreach_copy_(weights, kept)
            model.train()
    return figures


def _mean(loss: BatchLoss, dataset: Dataset, world: World, batch_size: int) -> float:
    clips = len(dataset)
    sums = torch.zeros(2, dtype=torch.float64)
    for work in plan(
        range(clips), batch_size=batch_size, rank=world.rank, world=world.size, end=clips
    ):
        terms, counts = loss(work, loss.load(dataset, work))
        sums += torch.stack((terms.values.sum(), counts.sum())).double().cpu()
    total, count = world.total(sums).tolist()
    return total / count if count else math.nan
