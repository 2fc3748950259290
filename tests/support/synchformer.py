"""A Synchformer of the smallest size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.golden_weights import uniform
from wavflow.features.synchformer import (
    PREFIX,
    Synchformer,
    SynchformerConfig,
)

TINY = SynchformerConfig(dim=48, depth=2, num_heads=4)


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The golden weights of a public file's names; stream i is the i-th name, sorted."""
    state = {}
    for stream, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        u = uniform(stream, math.prod(shape)).reshape(shape)
        *_, before, last = name.split(".")
        if last in ("cls_token", "pos_embed", "temp_embed"):
            value = 0.5 * u
        elif len(shape) >= 2:
            value = u * math.sqrt(3 / math.prod(shape[1:]))
        elif before.startswith("norm") and last == "weight":
            value = 1 + 0.1 * u
        else:
            value = 0.1 * u
        state[name] = torch.from_numpy(value).float()
    return state


def content(config: SynchformerConfig = TINY) -> dict[str, Tensor]:
    """What a public file of a network of that size holds of the visual branch."""
    with torch.device("meta"):
        model = Synchformer(config)
    shapes = {PREFIX + name: list(value.shape) for name, value in model.state_dict().items()}
    shapes[PREFIX + "patch_embed.proj.weight"] = [config.dim, 3, 16, 16]
    shapes[PREFIX + "patch_embed.proj.bias"] = [config.dim]
    return filled(shapes)
