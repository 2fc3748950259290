"""A network of the smallest size, without training, on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from wavflow.config.load import load_config
from wavflow.systems.wavflow.build import build_model
from wavflow.training import checkpoint

TINY = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "sampling.num_steps=3",
]


def save_tiny(path: Path) -> Path:
    """Writes a checkpoint without averages; returns its path."""
    torch.manual_seed(0)
    config = load_config("toy_8k", TINY)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1).add_(1 if parameter.ndim == 1 else 0)
    content = {"model": model.state_dict(), "optimizer": {}, "epoch": 1, "global_step": 900}
    checkpoint.save(path, {**content, "config": config.to_dict()})
    return path
