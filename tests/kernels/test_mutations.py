"""The tolerances must reject small wrong variants of each op; else the op tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.numerics import excess, excess_over_peer, to_float64
from torch import Tensor

from wavflow_kernels import REGISTRY
from wavflow_kernels._rows import gather_rows, segment_sums
from wavflow_kernels.ops import (
    adaln,
    conv1d,
    conv_swiglu,
    flow_loss,
    gated_residual_adaln,
    ode_step,
    qkv_rope,
    swiglu,
    unpatchify,
)

DTYPES = (torch.float32, torch.bfloat16)


def lift(rms_offset: float = 0.0, limit: float = 0.3, roll: int = 0, mean: bool = False) -> Any:
    def wrong(
        wave: Tensor,
        lengths: Any,
        levels: Any,
        d: int,
        n: int,
        rms: float,
        scale: float,
        dtype: Any,
    ) -> Tensor:
        if lengths is not None:
            wave = torch.where(torch.arange(wave.shape[1]) < lengths[:, None], wave, 0.0)
        count = wave.shape[1] if lengths is None else lengths[:, None]
        x = wave - wave.mean(1, keepdim=True) if mean else wave
        square, peak = x.square().sum(1, keepdim=True) / count, wave.abs().amax(1, keepdim=True)
        if levels is not None:
            square, peak = levels.split(1, dim=1)
        level = square.sqrt() + rms_offset
        gain = torch.where(level > 1e-8, rms / level, 1.0)
        peak = peak * gain
        fit = (peak > 1) & (rms / peak > limit)
        y = (wave * gain / torch.where(fit, peak, 1.0)).clamp(-1, 1) * scale
        y = F.pad(y[:, : n * d], (0, max(n * d - y.shape[1], 0))).roll(roll, 1)
        return y.view(-1, n, d).to(dtype)

    return wrong


def variant(name: str, **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """The op's reference with some arguments changed, by name."""
    op = REGISTRY[name]

    def wrong(*args: Any) -> Any:
        named = op.named(args)
        for argument, change in changes.items():
            named[argument] = change(named[argument])
        return op.reference(*named.values())

    return wrong


def swapped_guidance(state: Tensor, pred: Tensor, uncond: Any, *rest: Any) -> Tensor:
    return ode_step.OP.reference(state, pred if uncond is None else uncond, pred, *rest)


def shifted_tail(tokens: Tensor, *rest: Any) -> Tensor:
    return unpatchify.OP.reference(tokens, *rest).roll(1, 1)


def missing_clamp(pred: Tensor, x_1: Tensor, other: Any, t: Tensor, kind: int, s: float) -> Tensor:
    residual = (pred - x_1) / (1 - t * 0.999)[:, None, None]
    return residual.square().mean((1, 2)) if kind == 1 else None


def unbiased(pred: Tensor, x_1: Tensor, *rest: Any) -> Tensor:
    count = pred[0].numel() if len(pred) else 2
    return flow_loss.OP.reference(pred, x_1, *rest) * count / (count - 1)


def conjugate(rope: Tensor) -> Tensor:
    return rope * torch.tensor([1.0, -1.0], dtype=rope.dtype).repeat(rope.shape[1] // 2)


def large_epsilon(qkv: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """sqrt(mean(x^2) + 100 eps): the same as 10 times smaller projections with eps."""
    q, k, _ = qkv_rope.OP.reference([x / 10 for x in qkv], *args)
    return q, k, qkv_rope.OP.reference(qkv, *args)[2]


def exchanged_parts(qkv: list[Tensor], q_weight: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    heads, d = args[-1], q_weight[0].shape[0]
    wrong = []
    for x in qkv:
        parts = x.shape[2] // (heads * d)
        order = [1, 0, 2] if parts == 3 else [0, 1]
        wrong.append(x.unflatten(2, (heads, d, parts))[..., order].flatten(2))
    return qkv_rope.OP.reference(wrong, q_weight, *args)


def modulated(unbiased: bool = False, one: float = 1.0, shifted: float = 1.0) -> Any:
    """adaln with parts of it changed."""

    def wrong(x: Tensor, shift: Tensor, scale: Tensor, index: Any, _: Any, eps: float) -> Any:
        c = x.shape[-1]
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (max(c - 1, 1) if unbiased else c)
        normed = centred / (variance + eps).sqrt()
        shift, scale = (gather_rows(t, index, x.dtype) for t in (shift, scale))
        return normed * (one + scale) + shifted * shift

    return wrong


def next_row_early(index: Any) -> Any:
    """Every row starts one token early."""
    return None if index is None else torch.cat((index[1:], index[-1:]))


def norm_of_x(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Any:
    new, _ = gated_residual_adaln.OP.reference(x, y, gate, *rest)
    return new, adaln.OP.reference(x, *rest[2:])


def norm_of_rounded(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Any:
    new, _ = gated_residual_adaln.OP.reference(x, y, gate, *rest)
    return new, adaln.OP.reference(new.bfloat16().double(), *rest[2:])


def without_mean_of_gradient(grad: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> Any:
    """LayerNorm's backward that forgets that the mean depends on x."""
    d_x, *others = adaln.BACKWARD.reference(grad, x, scale, *rest)
    index, _, eps = rest
    _, inverse = adaln.layer_norm(x, eps)
    modulated = grad * (1 + gather_rows(scale, index, x.dtype))
    return d_x + inverse * modulated.mean(-1, keepdim=True), *others


def last_token_dropped(*args: Any) -> Any:
    """The shift's gradient without each item's last token."""
    *start, d_shift, d_scale = gated_residual_adaln.BACKWARD.reference(*args)
    grad, index = args[1].clone(), args[8]
    grad[:, -1] = 0
    return *start, segment_sums(grad, index, d_shift.shape[1]), d_scale


def repeated_edge(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    k = weight.shape[2]
    if k == 1 or not len(x):
        return None
    wide = torch.cat([x[:, :1].expand(-1, k, -1), x, x[:, -1:].expand(-1, k, -1)], 1)
    none = (rest[0], rest[1], None, None, None)
    return conv1d.OP.reference(wide, weight, *none)[:, k:-k] if rest[2] is None else None


def elu(x: Tensor, weight: Tensor, bias: Any, selu: bool, *rest: Any) -> Tensor:
    return F.elu(conv1d.plain(x, weight, bias)) if selu else None


MUTATIONS = {
    ("lift_patchify", "variance for RMS"): lift(mean=True),
    ("lift_patchify", "an epsilon in the RMS"): lift(rms_offset=1e-4),
    ("lift_patchify", "peak rule off"): lift(limit=10.0),
    ("lift_patchify", "padding one sample off"): lift(roll=1),
    ("lift_patchify", "levels dropped"): variant("lift_patchify", levels=lambda levels: None),
    ("unpatchify", "one sample late"): shifted_tail,
    ("unpatchify", "scale off by 1e-5"): variant(
        "unpatchify", audio_scale=lambda s: s * (1 + 1e-5)
    ),
    ("flow_mix", "t squared"): variant("flow_mix", t=torch.square),
    ("flow_mix", "sigma_min dropped"): variant("flow_mix", sigma_min=lambda s: 0.0),
    ("flow_mix", "next seed"): variant("flow_mix", seeds=lambda s: None if s is None else s + 1),
    ("flow_loss", "1 - t without clamp"): missing_clamp,
    ("flow_loss", "n - 1 in the mean"): unbiased,
    ("flow_loss", "sigma_min dropped"): variant("flow_loss", sigma_min=lambda s: 0.0),
    ("ode_step", "guidance the wrong way round"): swapped_guidance,
    ("ode_step", "next row"): variant("ode_step", index=lambda i: i + 1),
    ("qkv_rope", "eps x 100"): large_epsilon,
    ("qkv_rope", "rotation the other way"): variant("qkv_rope", rope=conjugate),
    ("qkv_rope", "rotation of the next token"): variant(
        "qkv_rope", rope=lambda rope: rope.roll(1, 0)
    ),
    ("qkv_rope", "norm weights swapped"): lambda x, q, k, *rest: qkv_rope.OP.reference(
        x, k, q, *rest
    ),
    ("qkv_rope", "weight of a stream's neighbour"): variant(
        "qkv_rope", k_weight=lambda weights: [*weights[1:], weights[0]]
    ),
    ("qkv_rope", "q and k exchanged"): exchanged_parts,
    ("adaln", "unbiased variance"): modulated(unbiased=True),
    ("adaln", "eps x 100"): variant("adaln", eps=lambda eps: eps * 100),
    ("adaln", "shift dropped"): modulated(shifted=0.0),
    ("adaln", "scale without the 1"): modulated(one=0.0),
    ("adaln", "rows one token early"): variant("adaln", index=next_row_early),
    ("adaln_backward", "mean held constant"): without_mean_of_gradient,
    ("adaln_backward", "eps x 100"): variant("adaln_backward", eps=lambda eps: eps * 100),
    ("adaln_backward", "rows one token early"): variant("adaln_backward", index=next_row_early),
    ("gated_residual_adaln", "norm of x"): norm_of_x,
    ("gated_residual_adaln", "norm of the rounded sum"): norm_of_rounded,
    ("gated_residual_adaln", "gate dropped"): variant("gated_residual_adaln", gate=torch.ones_like),
    ("gated_residual_adaln", "gate's rows one token early"): variant(
        "gated_residual_adaln", gate_index=next_row_early
    ),
    ("gated_residual_adaln", "rows one token early"): variant(
        "gated_residual_adaln", index=next_row_early
    ),
    ("gated_residual_adaln_backward", "last token dropped"): last_token_dropped,
    ("gated_residual_adaln_backward", "the sum's gradient dropped"): variant(
        "gated_residual_adaln_backward", grad_new=torch.zeros_like
    ),
    ("gated_residual_adaln_backward", "gate's rows one token early"): variant(
        "gated_residual_adaln_backward", gate_index=next_row_early
    ),
    ("conv1d", "taps reversed"): variant("conv1d", weight=lambda w: w.flip(2)),
    ("conv1d", "padding one token off"): variant("conv1d", x=lambda x: x.roll(1, 1)),
    ("conv1d", "edge repeated for zeros"): repeated_edge,
    ("conv1d", "bias dropped"): variant("conv1d", bias=lambda b: None),
    ("conv1d", "next gate row"): variant(
        "conv1d", gate_index=lambda i: None if i is None else (i + 1) % 5
    ),
    ("conv1d", "ELU for SELU"): elu,
    ("conv_swiglu", "w1 and w3 swapped"): lambda x, w1, w3, keep: conv_swiglu.OP.reference(
        x, w3, w1, False
    )[0],
    ("conv_swiglu", "sigmoid for SiLU"): lambda x, w1, w3, keep: (
        conv1d.plain(x, w1).sigmoid() * conv1d.plain(x, w3)
    ),
    ("prepared_conv", "sign of the fourth product"): variant(
        "prepared_conv", weights=lambda w: [*w[:3], -w[3]] if len(w) == 4 else w
    ),
    ("prepared_conv", "inner products swapped"): variant(
        "prepared_conv", weights=lambda w: [w[0], w[2], w[1], w[3]] if len(w) == 4 else w
    ),
    ("prepared_conv", "pairs one token off"): variant("prepared_conv", x=lambda x: x.roll(1, 1)),
    ("prepared_conv", "halves swapped"): variant(
        "prepared_conv", weights=lambda w: [t.roll(t.shape[0] // 2, 0) for t in w]
    ),
    ("swiglu", "a and b swapped"): lambda a, b: swiglu.OP.reference(b, a),
    ("swiglu", "sigmoid of 1.01 a"): lambda a, b: a * (1.01 * a).sigmoid() * b,
    ("rope_attention", "scale off by 1 %"): variant("rope_attention", q=lambda q: q * 1.01),
    ("rope_attention", "window one wider"): variant(
        "rope_attention", window=lambda w: w + 1 if w >= 0 else w
    ),
    ("rope_attention", "one local token fewer"): variant(
        "rope_attention", local=lambda local: max(local - 1, 0)
    ),
    ("rope_attention", "one spread token fewer"): variant(
        "rope_attention", spread=lambda spread: max(spread - 1, 0)
    ),
    ("rope_attention_backward", "no rowsum(grad * out)"): variant(
        "rope_attention_backward", out=torch.zeros_like
    ),
    ("rope_attention_backward", "weights off by 1 %"): variant(
        "rope_attention_backward", lse=lambda lse: lse + 0.01
    ),
    ("rope_attention_backward", "window one wider"): variant(
        "rope_attention_backward", window=lambda w: w + 1 if w >= 0 else w
    ),
    ("rope_attention_backward", "one spread token fewer"): variant(
        "rope_attention_backward", spread=lambda spread: max(spread - 1, 0)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, what", list(MUTATIONS))
def test_mutation_is_rejected(name: str, what: str, dtype: torch.dtype) -> None:
    op, wrong = REGISTRY[name], MUTATIONS[name, what]
    small_effect = what in (
        "scale off by 1e-5",
        "an epsilon in the RMS",
        "1 - t without clamp",
        "eps x 100",
    )
    if small_effect and dtype == torch.bfloat16:
        pytest.skip("below bfloat16's resolution")
    worst = 0.0
    for sample in op.samples(torch.device("cpu"), dtype, 7):
        args = to_float64(sample.args)
        out, truth = wrong(*args), op.reference(*args)
        if out is None:
            continue
        peer = op.reference(*sample.args)
        out, truth, peer = (x if isinstance(x, tuple) else (x,) for x in (out, truth, peer))
        for o, t, p in zip(out, truth, peer, strict=False):
            o = o.to(dtype)
            matrix = op.tolerance == "matrix"
            ratio = excess_over_peer(o, t, p) if matrix else excess(o, t, op.tolerance)
            worst = max(worst, ratio)
    assert worst > 1, f"{name} with {what} passes: {worst:.3g} of the allowed error"
