"""From a configuration to a network."""

from __future__ import annotations

import dataclasses
import logging
import math

from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import load_tensors
from wavflow.features.registry import get_encoders
from wavflow.systems.wavflow.config import PRESETS, TEXT_KEYS, RunConfig
from wavflow.systems.wavflow.network import WavflowModel

log = logging.getLogger("wavflow")


def build_model(config: RunConfig, empty_string_feat: Tensor | None = None) -> WavflowModel:
    """The network of a configuration: the named preset, with the sizes the configuration gives.

    Args:
        config: its sections `model`, `data` and `training` are read.
        empty_string_feat: features of the empty caption, (text_seq_len, text_dim); by default
            zeros.

    Raises:
        InputError: an unknown `model.name`.
    """
    model, data = config.model, config.data
    if model.name not in PRESETS:
        raise InputError(f"model.name is {model.name!r}; wanted one of {', '.join(PRESETS)}")
    own = {
        name: getattr(model, name)
        for name in ("hidden_dim", "depth", "fused_depth", "num_heads", "mlp_ratio")
        if getattr(model, name) is not None
    }
    window = model.attention_window
    if window is not None:
        window = max(round(window * data.target_sample_rate / data.audio_dim), 1)
    sizes = dataclasses.replace(
        PRESETS[model.name],
        latent_dim=data.audio_dim,
        latent_seq_len=data.latent_seq_len,
        clip_seq_len=data.clip_seq_len,
        clip_dim=data.clip_dim,
        sync_seq_len=data.sync_seq_len,
        sync_dim=data.sync_dim,
        text_seq_len=data.text_seq_len,
        text_dim=data.text_dim,
        attention_window=window,
        rope_scaling=model.rope_scaling,
        **own,
    )
    return WavflowModel(
        **dataclasses.asdict(sizes),
        empty_string_feat=empty_string_feat,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


def empty_caption(config: RunConfig) -> Tensor:
    """Features of the empty caption, (77, text_dim): from `empty_string_ckpt`, else the encoder.

    A file holds (77, text_dim) or (1, 77, text_dim). The mean length of its rows is logged, since
    there are files of rows that were not normalized.

    Raises:
        InputError: the file or the encoders do not fit the configuration.
    """
    shape = config.data.feature_shapes[TEXT_KEYS[0]]
    path = config.model.empty_string_ckpt
    if path is not None:
        found = load_tensors(path, "file of the empty caption (model.empty_string_ckpt)")
        where = f"{path}: the empty caption"
    else:
        # Encoders on the CPU, made for this once: a training keeps none in its memory.
        found = get_encoders(**config.model.encoder_options, device="cpu").text.encode([""])
        where = f"encoders {config.model.encoders}: the empty caption"
    if (
        not isinstance(found, Tensor)
        or tuple(found.shape[-2:]) != shape
        or found.numel() != math.prod(shape)
    ):
        raise InputError(f"{where} is {tuple(getattr(found, 'shape', ()))}; wanted {shape}")
    found = found.reshape(shape).float()
    if path is not None:
        log.info(
            "%s: rows of mean length %.3g; CLIP's captions have rows of length 1",
            path,
            found.norm(dim=-1).mean(),
        )
    return found
