"""How much memory WavFlow's network takes to generate a clip."""

from __future__ import annotations

import torch

from wavflow.layers.token_layers import stretch, swiglu_inner
from wavflow.systems.wavflow.config import WavflowConfig
from wavflow_kernels import cpu


def clip_bytes(
    config: WavflowConfig, dtype: torch.dtype, guided: bool, device: torch.device
) -> int:
    """An upper estimate of what one clip adds to the memory of generation.

    A step takes most in the feed-forward of the audio's input projection or of a block. There lie
    its residual, input and modulated input, and the halves of the gated product in the layout of
    the convolution and in ours; with Winograd's form on the CPU also transformed inputs and four
    products a pair of tokens. For a long clip all this is of a stretch of its tokens. Beside it lie
    the other streams and, in float32, modulations, conditions and the solver's state. The factors
    cover what was measured on the CPU, with what malloc loses.

    Args:
        config: the network's sizes, with the token counts of the clip.
        dtype: dtype of the matrix products.
        guided: whether a clip is two rows of the network's batch.
        device: where it is generated.
    """
    hidden, inner = config.hidden_dim, swiglu_inner(max(4 * config.hidden_dim, config.ffn_width))
    tokens, rows = config.latent_seq_len, 2 if guided else 1
    others = config.clip_seq_len + config.sync_seq_len + config.text_seq_len
    together = min(tokens, 2 * stretch(device, inner, rows, dtype.itemsize))
    products = cpu.product_dtype(dtype) if device.type == "cpu" else dtype
    rounded = 16 * (tokens + others) * hidden * dtype.itemsize
    gated = 9 * together * inner * products.itemsize
    exact = 2 * (tokens + others) * hidden
    state = 8 * tokens * config.latent_dim
    return rows * (rounded + gated + exact * 4) + state * 4
