"""Networks of the smallest size, without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from support.golden_weights import golden_state_dict, load_golden
from wavflow.config.load import load_config
from wavflow.pipeline.sampler import Sampler
from wavflow.systems.wavflow.build import build_model
from wavflow.systems.wavflow.conditioner import WavflowField
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.training import checkpoint

TINY = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "sampling.num_steps=3",
]


def field_of(model: WavflowModel, dtype: torch.dtype = torch.float32) -> WavflowField:
    """The field of a network, as any configuration has it."""
    return WavflowField(model, load_config("toy_8k", TINY), dtype)


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


CPU = torch.device("cpu")


def random_model(config):
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08)
    return model


def tiny_sampler(dtype=torch.float32, **sampling):
    config = load_config("toy_8k", TINY)
    config = replace(config, sampling=replace(config.sampling, num_steps=4, **sampling))
    return Sampler(random_model(config), config, CPU, dtype)


def random_features(seed, *, video=True, text=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = load_config("toy_8k").data.feature_shapes
    kinds = {"clip_features": video, "sync_features": video, "text_features": text}
    return {k: torch.randn(shapes[k], generator=generator) for k, wanted in kinds.items() if wanted}


MIXED = [{}, {"video": False}, {"text": False}, {"video": False, "text": False}, {}]


def mixed():
    return [random_features(i, **kind) for i, kind in enumerate(MIXED)]


def golden_model(name, **changes):
    golden, metadata = load_golden(name)
    model = WavflowModel(**json.loads(metadata["config"]), **changes)
    model.load_weights(golden_state_dict(model))
    return model, golden


def inputs(model, batch, seed=0):
    """latent, clip_f, sync_f, text_f, t for ``forward``."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator)

    return (
        normal(config.latent_seq_len, config.latent_dim),
        normal(config.clip_seq_len, config.clip_dim),
        normal(config.sync_seq_len, config.sync_dim),
        normal(config.text_seq_len, config.text_dim),
        torch.rand(batch, generator=generator),
    )


#: A network whose attention can be restricted to neighbours in time.
LOCAL_SIZES = {
    **{"latent_dim": 6, "clip_dim": 5, "sync_dim": 4, "text_dim": 5, "hidden_dim": 16},
    **{"depth": 4, "fused_depth": 3, "num_heads": 2, "mlp_ratio": 4.0},
    **{"latent_seq_len": 100, "clip_seq_len": 13, "sync_seq_len": 24, "text_seq_len": 3},
}


def local_model(**changes) -> WavflowModel:
    model = WavflowModel(**{**LOCAL_SIZES, **changes})
    model.load_weights(golden_state_dict(model))
    return model
