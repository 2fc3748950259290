"""WavFlow's network and training as usually written: eager torch, nothing shared or fused.

It runs on the weights of a :class:`WavflowModel`; sampling and training are compared with it. Every
token has its own modulation, guidance takes two calls, q, k and v are cut, normed, rotated and
joined by separate operations, and convolutions permute to channels-first and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavflow_kernels as wk
from wavflow.data.dataset import ClipBatch
from wavflow.flow.matching import log_normal_sample
from wavflow.flow.times import shift_time
from wavflow.layers.attention import RMS_NORM_EPS, AttentionInput
from wavflow.systems.wavflow.blocks import TransformerBlock
from wavflow.systems.wavflow.conditions import Conditions
from wavflow.systems.wavflow.config import SYNC_SEGMENT, RunConfig
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.training.ema import warmed_up_decay


def conv(layer: Any, x: Tensor) -> Tensor:
    """Apply a Linear, or a convolution over tokens with "same" padding, and its SELU."""
    if layer.weight.dim() == 2:
        return F.linear(x, layer.weight, layer.bias)
    padding = layer.weight.shape[2] // 2
    x = F.conv1d(x.transpose(1, 2), layer.weight, layer.bias, padding=padding).transpose(1, 2)
    return F.selu(x) if layer.activation else x


def feed_forward(ffn: Any, x: Tensor) -> Tensor:
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

    joint: Any
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
        assert isinstance(block, TransformerBlock)
        modulation, qkv = entered(block, x, extended, ropes[0])
        x = left(block, x, attention(*qkv), modulation)
    shift, scale = model.final_layer.adaLN_modulation(everywhere).chunk(2, dim=-1)
    return conv(model.final_layer.conv, modulated(x, shift, scale))


def conditions(model: WavflowModel, clip: Tensor, sync: Tensor, text: Tensor) -> Conditions:
    """Projected features (b n_clip clip_dim), (b n_sync sync_dim), (b n_text text_dim)."""
    segments = sync.unflatten(1, (-1, SYNC_SEGMENT)) + model.sync_pos_emb
    projected = []
    for layers, given in (
        (model.clip_input_proj, clip),
        (model.sync_input_proj, segments.flatten(1, 2)),
        (model.text_input_proj, text),
    ):
        projected.append(feed_forward(layers[-1], conv(layers[0], given)))
    clip_f, sync_rows, text_f = projected
    return Conditions(
        clip_f=clip_f,
        text_f=text_f,
        clip_f_c=model.clip_cond_proj(clip_f.mean(dim=1)),
        text_f_c=model.text_cond_proj(text_f.mean(dim=1)),
        sync_rows=sync_rows,
        sync_tokens=model.sync_tokens(),
        rope=model.rope(),
    )


def forward(
    model: WavflowModel, latent: Tensor, clip: Tensor, sync: Tensor, text: Tensor, t: Tensor
) -> Tensor:
    """The prediction (b n d) for latent (b n d) and raw features at t (b), as in training."""
    return predict(model, latent, t, conditions(model, clip, sync, text))


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


def loss(
    model: WavflowModel,
    config: RunConfig,
    batch: ClipBatch,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    forward: Callable[..., Tensor] = forward,
) -> Tensor:  # b
    """The loss by torch operations; times, noise and what is dropped are drawn if not given."""
    data, sampling = config.data, config.sampling
    device, count = batch.wave.device, len(batch.wave)
    dropped = config.training.label_drop_prob
    with wk.use_backend("reference"), torch.autocast(device.type, enabled=False):
        x_1 = wk.lift_patchify(
            batch.wave,
            batch.lengths,
            token_size=data.audio_dim,
            tokens=data.latent_seq_len,
            audio_scale=data.audio_scale,
        )
        if t is None:
            t = log_normal_sample(x_1, None, sampling.mean, sampling.scale)
            t = shift_time(t, sampling.noise_shift)
        if noise is None:
            noise = sampling.noise_scale * torch.randn_like(x_1)
        at = t[:, None, None]
        x_t = (1 - (1 - sampling.min_sigma) * at) * noise + at * x_1
    video, text = (
        (flag & (torch.rand(count, device=device) >= dropped))[:, None, None]
        for flag in (batch.present["video"], batch.present["text"])
    )
    clip, sync, caption = batch.features.values()
    pred = forward(
        model,
        x_t,
        torch.where(video, clip, model.get_empty_clip_sequence(count)),
        torch.where(video, sync, model.get_empty_sync_sequence(count)),
        torch.where(text, caption, model.get_empty_string_sequence(count)),
        t,
    )
    with wk.use_backend("reference"), torch.autocast(device.type, enabled=False):
        return wk.flow_loss(
            pred,
            x_1,
            t,
            x_t=x_t,
            x_0=noise,
            prediction=sampling.prediction_type,
            loss=config.training.loss_type,
            sigma_min=sampling.min_sigma,
        )


def training_step(
    model: WavflowModel,
    config: RunConfig,
    batch: ClipBatch,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Callable[[], None]:
    """Train on `batch`: ``torch.optim.AdamW`` as it comes, averages parameter by parameter."""
    settings = config.training
    kind = model.device.type
    network = torch.compile(forward, dynamic=False) if compiled else forward
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.peak_lr(), betas=(0.9, 0.95))
    averages = {
        decay: {name: p.detach().clone() for name, p in model.named_parameters()}
        for decay in (settings.ema_decay1, settings.ema_decay2)
    }
    age = 0

    def step() -> None:
        nonlocal age
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            value = loss(model, config, batch, forward=network).mean()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for decay, average in averages.items():
                now = warmed_up_decay(decay, age)
                for name, p in model.named_parameters():
                    average[name].mul_(now).add_(p, alpha=1 - now)
        age += 1

    return step
