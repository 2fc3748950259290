"""Deterministic weights for golden vectors: a counter-based generator, so none are stored."""

from __future__ import annotations

import math

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from support.paths import GOLDEN


def uniform(stream: int, count: int) -> np.ndarray:
    """``count`` float64 values in [-1, 1) of one SplitMix64 stream."""
    n = np.arange(1, count + 1, dtype=np.uint64)
    offset = np.uint64(stream * 0xD1B54A32D192ED03 % 2**64)
    z = n * np.uint64(0x9E3779B97F4A7C15) + offset
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def golden_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights for every name of the model's state dict; stream i is the i-th name, sorted."""
    state = {}
    for stream, (name, like) in enumerate(sorted(model.state_dict().items())):
        u = uniform(stream, like.numel()).reshape(like.shape)
        if like.dim() >= 2:
            value = u * math.sqrt(3 / (like.numel() / like.shape[0]))
        elif name.endswith("norm.weight"):
            value = 1 + 0.1 * u
        else:
            value = 0.1 * u
        state[name] = torch.from_numpy(value).float()
    return state


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
