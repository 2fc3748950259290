"""Networks with random weights and inputs for them, the same ones in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from wavflow.systems.wavflow.network import WavflowModel, get_wavflow_model

T, SEED = 0.4, 0


def filled(name: str, device: torch.device) -> WavflowModel:
    """A preset's network with random weights everywhere: a fresh one predicts zeros."""
    model = get_wavflow_model(name)
    fill(model)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def fill(model: WavflowModel) -> None:
    """Give a network on the CPU random weights everywhere, the same ones each time."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator).add_(1 if parameter.dim() == 1 else 0)


def inputs(model: WavflowModel, batch: int) -> list[Tensor]:
    """Random inputs of the network: clip, sync and text features, latent, t."""
    c, generator = model.config, torch.Generator().manual_seed(SEED)
    shapes = (
        (c.clip_seq_len, c.clip_dim),
        (c.sync_seq_len, c.sync_dim),
        (c.text_seq_len, c.text_dim),
        (c.latent_seq_len, c.latent_dim),
    )
    given = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    return [x.to(model.device) for x in given] + [torch.tensor(T, device=model.device)]
