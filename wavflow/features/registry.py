"""The encoders by name."""

from __future__ import annotations

import torch

from wavflow.base.errors import InputError
from wavflow.config.schema import EncodersConfig
from wavflow.features.encoder import Encoders


def get_encoders(
    name: str = "embedded",
    *,
    clip_model_name: str = EncodersConfig.clip_model_name,
    clip_pretrained: str = EncodersConfig.clip_pretrained,
    synchformer_ckpt: str | None = None,
    dtype: str = EncodersConfig.encoder_dtype,
    device: torch.device | str = "auto",
) -> Encoders:
    """Make the encoders called `name`; weights are loaded, and fetched, at their first use.

    Args:
        name: "embedded", which heeds none of the other arguments, or "clip_synchformer".
        clip_model_name, clip_pretrained: as in `wavflow.features.clip.Clip`.
        synchformer_ckpt: a file of weights; None fetches the public one.
        dtype: dtype of matrix products, "float32" or "bfloat16".
        device: where weights live and encoding runs.

    Raises:
        InputError: a name that does not exist; a given file that does not exist.
    """
    if name == "embedded":
        from wavflow.features.embedded import EmbeddedText, EmbeddedVideo

        return Encoders(name, EmbeddedVideo(), EmbeddedText())
    if name == "clip_synchformer":
        from wavflow.features.public import clip_synchformer

        return clip_synchformer(clip_model_name, clip_pretrained, synchformer_ckpt, dtype, device)
    raise InputError(f"encoders {name!r} do not exist, wanted embedded or clip_synchformer")
