"""The tolerances must reject small wrong variants of each op; else the op tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import excess, excess_over_peer
from torch import Tensor

from wavflow_kernels import REGISTRY
from wavflow_kernels.ops import flow_loss, flow_mix, ode_step, rope_attention, unpatchify

DTYPES = (torch.float32, torch.bfloat16)


def lift(rms_offset: float = 0.0, limit: float = 0.3, roll: int = 0, mean: bool = False) -> Any:
    def wrong(
        wave: Tensor, lengths: Any, d: int, n: int, rms: float, scale: float, dtype: Any
    ) -> Tensor:
        if lengths is not None:
            wave = torch.where(torch.arange(wave.shape[1]) < lengths[:, None], wave, 0.0)
        count = wave.shape[1] if lengths is None else lengths[:, None]
        x = wave - wave.mean(1, keepdim=True) if mean else wave
        level = (x.square().sum(1, keepdim=True) / count).sqrt() + rms_offset
        gain = torch.where(level > 1e-8, rms / level, 1.0)
        peak = wave.abs().amax(1, keepdim=True) * gain
        fit = (peak > 1) & (rms / peak > limit)
        y = (wave * gain / torch.where(fit, peak, 1.0)).clamp(-1, 1) * scale
        y = F.pad(y[:, : n * d], (0, max(n * d - y.shape[1], 0))).roll(roll, 1)
        return y.view(-1, n, d).to(dtype)

    return wrong


def variant(reference: Callable[..., Any], **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """The reference with some arguments changed, by position: a0, a1, ..."""

    def wrong(*args: Any) -> Any:
        args = list(args)
        for name, change in changes.items():
            args[int(name[1:])] = change(args[int(name[1:])])
        return reference(*args)

    return wrong


def swapped_guidance(state: Tensor, pred: Tensor, uncond: Any, *rest: Any) -> Tensor:
    return ode_step.reference(state, pred if uncond is None else uncond, pred, *rest)


def shifted_tail(tokens: Tensor, *rest: Any) -> Tensor:
    return unpatchify.reference(tokens, *rest).roll(1, 1)


def missing_clamp(pred: Tensor, x_1: Tensor, other: Any, t: Tensor, kind: int, s: float) -> Tensor:
    residual = (pred - x_1) / (1 - t * 0.999)[:, None, None]
    return residual.square().mean((1, 2)) if kind == 1 else None


def unbiased(pred: Tensor, x_1: Tensor, *rest: Any) -> Tensor:
    count = pred[0].numel() if len(pred) else 2
    return flow_loss.reference(pred, x_1, *rest) * count / (count - 1)


def conjugate_rotation(rope: Tensor | None) -> Tensor | None:
    """The rotation the other way."""
    if rope is None:
        return None
    return rope * torch.tensor([1.0, -1.0], dtype=rope.dtype).repeat(rope.shape[1] // 2)


def attention_epsilon(q: Tensor, k: Tensor, v: Tensor, q_weight: Any, *rest: Any) -> Any:
    """sqrt(mean(x^2) + 100 eps): the same as 10 times smaller queries and keys with eps."""
    if q_weight is None:
        return None
    return rope_attention.reference(q / 10, k / 10, v, q_weight, *rest)


def exchanged_norms(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return rope_attention.reference(q, k, v, rest[1], rest[0], *rest[2:])


MUTATIONS = {
    ("lift_patchify", "variance for RMS"): lift(mean=True),
    ("lift_patchify", "an epsilon in the RMS"): lift(rms_offset=1e-4),
    ("lift_patchify", "peak rule off"): lift(limit=10.0),
    ("lift_patchify", "padding one sample off"): lift(roll=1),
    ("unpatchify", "one sample late"): shifted_tail,
    ("unpatchify", "scale off by 1e-5"): variant(unpatchify.reference, a4=lambda s: s * (1 + 1e-5)),
    ("unpatchify", "window reversed"): variant(
        unpatchify.reference, a1=lambda w: None if w is None else w.flip(0)
    ),
    ("flow_mix", "t squared"): variant(flow_mix.reference, a1=torch.square),
    ("flow_mix", "sigma_min dropped"): variant(flow_mix.reference, a4=lambda s: 0.0),
    ("flow_mix", "next seed"): variant(
        flow_mix.reference, a3=lambda s: None if s is None else s + 1
    ),
    ("flow_loss", "1 - t without clamp"): missing_clamp,
    ("flow_loss", "n - 1 in the mean"): unbiased,
    ("flow_loss", "sigma_min dropped"): variant(flow_loss.reference, a5=lambda s: 0.0),
    ("ode_step", "guidance the wrong way round"): swapped_guidance,
    ("ode_step", "next row"): variant(ode_step.reference, a4=lambda i: i + 1),
    ("rope_attention", "scale off by 1 %"): variant(
        rope_attention.reference, a0=lambda q: q * 1.01
    ),
    ("rope_attention", "window one wider"): variant(
        rope_attention.reference, a6=lambda w: w + 1 if w >= 0 else w
    ),
    ("rope_attention", "one local token fewer"): variant(
        rope_attention.reference, a7=lambda local: max(local - 1, 0)
    ),
    ("rope_attention", "rotation the other way"): variant(
        rope_attention.reference, a5=conjugate_rotation
    ),
    ("rope_attention", "norm weights exchanged"): exchanged_norms,
    ("rope_attention", "eps x 100"): attention_epsilon,
    ("rope_attention_backward", "no rowsum(grad * out)"): variant(
        rope_attention.BACKWARD.reference, a4=torch.zeros_like
    ),
    ("rope_attention_backward", "weights off by 1 %"): variant(
        rope_attention.BACKWARD.reference, a5=lambda lse: lse + 0.01
    ),
    ("rope_attention_backward", "window one wider"): variant(
        rope_attention.BACKWARD.reference, a6=lambda w: w + 1 if w >= 0 else w
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
        args = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in sample.args
        )
        args = tuple(torch.float64 if isinstance(a, torch.dtype) else a for a in args)
        out, truth = wrong(*args), op.reference(*args)
        if out is None:
            continue
        out, truth = (x if isinstance(x, tuple) else (x,) for x in (out, truth))
        if op.tolerance == "matrix":
            peer = op.reference(*sample.args)
            peer = peer if isinstance(peer, tuple) else (peer,)
            for o, t, p in zip(out, truth, peer, strict=True):
                worst = max(worst, excess_over_peer(o.to(p.dtype), t, p))
            continue
        for o, t in zip(out, truth, strict=True):
            worst = max(worst, excess(o.to(dtype), t, op.tolerance))
    assert worst > 1, f"{name} with {what} passes: {worst:.3g} of the allowed error"
