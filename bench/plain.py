"""WavFlow's network as it is usually written: eager torch modules, nothing shared or fused.

It runs on the weights of a :class:`WavflowModel`; sampling speed is compared with it. Every
token has its own modulation, guidance takes two calls, q, k and v are cut, normed, rotated and
joined by separate operations, and convolutions permute to channels-first and back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavflow.model.blocks import RMS_NORM_EPS, AttentionInput, SwiGLU, TransformerBlock
from wavflow.model.networks import Conditions, WavflowModel


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """A Linear, or a convolution over tokens with "same" padding, and its SELU."""
    if layer.weight.dim() == 2:
        return F.linear(x, layer.weight, layer.bias)
    padding = layer.weight.shape[2] // 2
    x = F.conv1d(x.transpose(1, 2), layer.weight, layer.bias, padding=padding).transpose(1, 2)
    return F.selu(x) if layer.activation else x


def feed_forward(ffn: SwiGLU, x: Tensor) -> Tensor:
    return conv(ffn.w2, F.silu(conv(ffn.w1, x)) * conv(ffn.w3, x))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope.unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def heads(attn: AttentionInput, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q and k, and v: (b h n d) each."""
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.unflatten(-1, (attn.num_heads, -1, 3)).permute(4, 0, 2, 1, 3)
    norm = (attn.q_norm.weight, attn.k_norm.weight)
    q, k = (
        F.rms_norm(z, z.shape[-1:], w.to(z.dtype), RMS_NORM_EPS)
        for z, w in zip((q, k), norm, strict=True)
    )
    return rotated(q, rope), rotated(k, rope), v


def entered(
    block: TransformerBlock, x: Tensor, c: Tensor, rope: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The block's modulation, and its q, k and v."""
    modulation = block.adaLN_modulation(c).chunk(block.chunks, dim=-1)
    return modulation, heads(block.attn, modulated(x, *modulation[:2]), rope)


def left(
    block: TransformerBlock, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]
) -> Tensor:
    _, _, gate1, shift2, scale2, gate2 = modulation
    x = x + gate1 * conv(block.linear1, attended)
    return x + gate2 * feed_forward(block.ffn, modulated(x, shift2, scale2))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # b n c
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def predict(model: WavflowModel, latent: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """The prediction (b n d) for latent (b n d) at t (b)."""
    first, _, then = model.audio_input_proj
    streams = [feed_forward(then, conv(first, latent)), conditions.clip_f, conditions.text_f]
    together = (conditions.clip_f_c + conditions.text_f_c).unsqueeze(1)
    everywhere = model.t_embed(t).unsqueeze(1) + feed_forward(model.global_cond_mlp, together)
    extended = everywhere + conditions.sync_f
    lengths = [x.shape[1] for x in streams]
    ropes = conditions.rope.split(lengths)

    for joint in model.joint_blocks:
        blocks = (joint.latent_block, joint.clip_block, joint.text_block)
        cs = (extended, everywhere, everywhere)
        inside = [entered(*e) for e in zip(blocks, streams, cs, ropes, strict=True)]
        joined = (torch.cat(parts, dim=2) for parts in zip(*(h for _, h in inside), strict=True))
        attended = attention(*joined).split(lengths, dim=1)
        streams = [
            x if block.pre_only else left(block, x, a, modulation)
            for block, x, a, (modulation, _) in zip(blocks, streams, attended, inside, strict=True)
        ]
    x = streams[0]
    for block in model.fused_blocks:
        modulation, qkv = entered(block, x, extended, ropes[0])
        x = left(block, x, attention(*qkv), modulation)
    shift, scale = model.final_layer.adaLN_modulation(everywhere).chunk(2, dim=-1)
    return conv(model.final_layer.conv, modulated(x, shift, scale))


def guided(
    model: WavflowModel,
    t: Tensor,
    latent: Tensor,
    conditions: Conditions,
    empty: Conditions,
    cfg_strength: float,
) -> Tensor:
    """The guided prediction at a 0-d t, by two calls."""
    times = t.expand(len(latent))
    cond, uncond = (predict(model, latent, times, c) for c in (conditions, empty))
    return cfg_strength * cond + (1 - cfg_strength) * uncond
