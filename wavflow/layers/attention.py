"""Attention of one or several streams of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import wavflow_kernels as wk
from wavflow.layers.sequence_parallel import Sharing
from wavflow_kernels import AttentionWindow, PreparedConv, TokenRows

# RMSNorm's eps is float32's machine epsilon whatever the input's dtype.
RMS_NORM_EPS = torch.finfo(torch.float32).eps


class AttentionInput(nn.Module):
    """Projects tokens to queries, keys and values; holds the weights of the norms of q and k.

    Without queries the parameters are the same; the rows of the queries are left out at run time.
    """

    prepared: PreparedConv | None = None

    def __init__(self, dim: int, num_heads: int, *, with_query: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.with_query = with_query
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)

    def prepare(self, dtype: torch.dtype, winograd: bool | None = None) -> None:
        """Holds the projection's weight as inference in `dtype` wants it."""
        weight, self.bias = self._projection()
        self.prepared = wk.prepare_conv(weight, dtype=dtype, winograd=winograd)
        del self.qkv

    def _projection(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.with_query:
            return weight, bias
        weight, bias = (x.unflatten(0, (-1, 3))[:, 1:].flatten(0, 1) for x in (weight, bias))
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Projects x (b n c) to (b n 3c), or (b n 2c) without queries.

        Its channels are laid out as (head, channel, {q, k, v}).
        """
        if self.prepared is not None:
            return wk.conv1d(x, self.prepared, self.bias)
        return wk.conv1d(x, *self._projection())


class Entered(NamedTuple):
    """One stream on its way through a block."""

    x: Tensor  # b n c
    projected: Tensor  # b n 3c or 2c
    modulation: tuple[Tensor, ...]  # (b r c) each
    tokens: TokenRows | None


def attention(
    inputs: Sequence[AttentionInput],
    projected: Sequence[Tensor],
    rope: Tensor,
    window: AttentionWindow | None,
    sharing: Sharing | None,
) -> tuple[Tensor, ...]:
    """Attention over the tokens of all streams; (b n c) for each stream with queries.

    Args:
        inputs: what projected each stream.
        projected: the streams' projections, (b n 3c) or, without queries, (b n 2c) each.
        rope: (tokens of all streams, head_dim), the rotations.
        window: which tokens of all streams see each other; None for all.
        sharing: how processes share the tokens of the first stream; None where they do not.
    """
    q, k, v = wk.qkv_rope(
        projected,
        [a.q_norm.weight.to(rope.dtype) for a in inputs],
        [a.k_norm.weight.to(rope.dtype) for a in inputs],
        rope,
        heads=inputs[0].num_heads,
    )
    dim = v.shape[1] * v.shape[3]
    lengths = [p.shape[1] for p in projected if p.shape[2] == 3 * dim]
    if sharing is not None and sharing.size > 1:
        own = projected[0].shape[1]
        k, v = (torch.cat((sharing.whole(x[:, :, :own], 2), x[:, :, own:]), dim=2) for x in (k, v))
    return wk.rope_attention(q, k, v, window=window).split(lengths, dim=1)
