"""The optimiser of a model."""

from __future__ import annotations

import torch
from torch import nn

from wavflow.config.schema import TrainingConfig


def make_optimizer(
    model: nn.Module, settings: TrainingConfig, processes: int = 1
) -> torch.optim.AdamW:
    """Makes a fused AdamW, betas (0.9, 0.95); only tensors of two or more axes have weight decay.

    Args:
        model: its parameters that require a gradient are trained.
        settings: learning rate and weight decay.
        processes: how many share a step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
    ]
    rate = settings.peak_lr(processes)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
