"""Building blocks of the multimodal diffusion transformer. Tensors are (b n c), channels last."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavflow.model.embeddings import apply_rope

LAYER_NORM_EPS = 1e-5
# RMSNorm's eps is float32's machine epsilon whatever the input's dtype.
RMS_NORM_EPS = torch.finfo(torch.float32).eps


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (b n c), (o c k)
    """Convolution over tokens with zero padding that keeps their number.

    In half precision it runs as a 2-D convolution of height 1: its (b c 1 n) view of ``x`` is
    channels-last in memory, which oneDNN takes without a copy. A training step of ``F.conv1d`` in
    bfloat16 on a CPU takes 1.2 to 1.8 times as long, of shifted views and one GEMM 1.05 to 2.5
    times. In float32 neither is faster at all sizes, and ``F.conv1d`` has a quarter of the error.
    """
    padding = weight.shape[-1] // 2
    x = x.transpose(1, 2)
    if x.dtype.itemsize > 2 and not torch.is_autocast_enabled(x.device.type):
        return F.conv1d(x, weight, bias, padding=padding).transpose(1, 2)
    out = F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, padding=(0, padding))
    return out.squeeze(2).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (b n c), (b n|1 c)
    """LayerNorm without affine parameters, then ``x (1 + scale) + shift``."""
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift, normed, 1 + scale)


class TokenConv(nn.Conv1d):
    """``nn.Conv1d``'s parameters and initialisation on (b n c) tensors, "same" zero padding."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, kernel_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return conv1d(x, self.weight, self.bias)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases; the layers are convolutions if given a kernel size.

    The inner width is two thirds of ``width``, rounded up to a multiple of 256. w1 and w3 stay
    two calls: joined into one they take the same time in training on a CPU.
    """

    def __init__(self, dim: int, width: int, kernel_size: int | None = None) -> None:
        super().__init__()
        inner = -(-(2 * width // 3) // 256) * 256

        def layer(in_dim: int, out_dim: int) -> nn.Module:
            if kernel_size is None:
                return nn.Linear(in_dim, out_dim, bias=False)
            return TokenConv(in_dim, out_dim, kernel_size, bias=False)

        self.w1 = layer(dim, inner)
        self.w2 = layer(inner, dim)
        self.w3 = layer(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class QKV(NamedTuple):
    """Attention inputs of one stream; ``q`` is None where the stream's output is not needed."""

    q: Tensor | None  # (b n h d)
    k: Tensor  # (b n h d)
    v: Tensor  # (b n h d)


class AttentionInput(nn.Module):
    """Projects tokens to normalised, rotated queries and keys, and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)

    def forward(self, x: Tensor, rope: Tensor | None, *, with_query: bool = True) -> QKV:
        dim = x.shape[-1]
        # The rows of the weight are laid out as (head, channel, {q, k, v}). Sorting them costs less
        # than splitting the activations with a stride of 3.
        first = 0 if with_query else 1
        weight = self.qkv.weight.view(dim, 3, dim)[:, first:].transpose(0, 1).reshape(-1, dim)
        bias = self.qkv.bias.view(dim, 3)[:, first:].t().reshape(-1)
        heads = F.linear(x, weight, bias).unflatten(-1, (3 - first, self.num_heads, -1)).unbind(2)

        q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        if not with_query:
            # Adds nothing; gives q_norm a gradient of zeros, so that every parameter has one.
            k_weight = k_weight + q_weight[:0].sum()
        q = _norm_rope(heads[0], q_weight, rope) if with_query else None
        return QKV(q, _norm_rope(heads[-2], k_weight, rope), heads[-1])


def _norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:  # (b n h d)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), RMS_NORM_EPS)
    return (out if rope is None else apply_rope(out, rope)).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (b n h d) -> (b n h*d)
    """softmax(q k^T / sqrt(d)) v over the tokens, heads concatenated."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # A training step of two plain GEMMs takes a third of the flash kernel's time here. Without
        # gradients the two are on a par at 781 tokens, and the flash kernel is more precise.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        out = scores.softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class Conditioning(NamedTuple):
    """Modulation input: distinct rows (b r c), and which of them each token takes, (n) or None.

    Without ``index`` there is one row, the same for all tokens. The nearest upsampling of the sync
    features repeats rows, so the modulation Linears run on the distinct ones.
    """

    rows: Tensor
    index: Tensor | None = None


class TransformerBlock(nn.Module):
    """One stream: adaLN, attention input, output projection and feed-forward.

    ``kernel_size`` None makes the projection and the feed-forward Linears, else convolutions.
    A ``pre_only`` block only supplies keys and values to the joint attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_width: int,
        *,
        kernel_size: int | None,
        pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.chunks = 2 if pre_only else 6
        self.attn = AttentionInput(dim, num_heads)
        if not pre_only:
            self.linear1 = (
                nn.Linear(dim, dim) if kernel_size is None else TokenConv(dim, dim, kernel_size)
            )
            self.ffn = SwiGLU(dim, ffn_width, kernel_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim))

    def modulation(self, c: Conditioning) -> tuple[Tensor, ...]:
        rows = self.adaLN_modulation(c.rows)
        if c.index is not None:
            rows = rows.index_select(1, c.index)
        return rows.chunk(self.chunks, dim=-1)

    def attention_input(
        self, x: Tensor, modulation: tuple[Tensor, ...], rope: Tensor | None
    ) -> QKV:
        shift, scale = modulation[:2]
        return self.attn(modulate(x, shift, scale), rope, with_query=not self.pre_only)

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate1, shift2, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.linear1(attended))
        return torch.addcmul(x, gate2, self.ffn(modulate(x, shift2, scale2)))

    def forward(self, x: Tensor, c: Conditioning, rope: Tensor | None) -> Tensor:
        """The block on its own: self-attention over its tokens."""
        modulation = self.modulation(c)
        return self.update(x, attention(*self.attention_input(x, modulation, rope)), modulation)


class JointBlock(nn.Module):
    """Audio, clip and text streams under one attention; ``pre_only`` updates the audio alone."""

    def __init__(self, dim: int, num_heads: int, ffn_width: int, *, pre_only: bool = False) -> None:
        super().__init__()
        self.latent_block = TransformerBlock(dim, num_heads, ffn_width, kernel_size=3)
        self.clip_block = TransformerBlock(
            dim, num_heads, ffn_width, kernel_size=3, pre_only=pre_only
        )
        self.text_block = TransformerBlock(
            dim, num_heads, ffn_width, kernel_size=None, pre_only=pre_only
        )

    def forward(
        self,
        latent: Tensor,
        clip: Tensor,
        text: Tensor,
        latent_c: Conditioning,
        global_c: Conditioning,
        latent_rope: Tensor,
        clip_rope: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = (self.latent_block, self.clip_block, self.text_block)
        streams = (latent, clip, text)
        modulations = [
            block.modulation(c)
            for block, c in zip(blocks, (latent_c, global_c, global_c), strict=True)
        ]
        inputs = [
            block.attention_input(x, modulation, rope)
            for block, x, modulation, rope in zip(
                blocks, streams, modulations, (latent_rope, clip_rope, None), strict=True
            )
        ]
        queries = [qkv.q for qkv in inputs if qkv.q is not None]
        attended = attention(
            torch.cat(queries, dim=1),
            torch.cat([qkv.k for qkv in inputs], dim=1),
            torch.cat([qkv.v for qkv in inputs], dim=1),
        ).split([q.shape[1] for q in queries], dim=1)
        updated = [
            block.update(x, a, modulation)
            for block, x, a, modulation in zip(blocks, streams, attended, modulations, strict=False)
        ]
        return (*updated, *streams[len(updated) :])


class FinalLayer(nn.Module):
    """adaLN on the global condition, then a convolution to the samples of each token."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.conv = TokenConv(dim, out_dim, 7)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (b n c), (b 1 c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.conv(modulate(x, shift, scale))
