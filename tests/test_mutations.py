"""The tolerances must reject small wrong variants of each op; else the op tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import excess, excess_over_peer, to_float64
from torch import Tensor

from wavflow_kernels import REGISTRY
from wavflow_kernels.ops import (
    conv1d,
    conv_swiglu,
    flow_loss,
    flow_mix,
    ode_step,
    prepared_conv,
    swiglu,
    unpatchify,
)

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


def repeated_edge(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    k = weight.shape[2]
    if k == 1 or not len(x):
        return None
    wide = torch.cat([x[:, :1].expand(-1, k, -1), x, x[:, -1:].expand(-1, k, -1)], 1)
    none = (rest[0], rest[1], None, None, None)
    return conv1d.reference(wide, weight, *none)[:, k:-k] if rest[2] is None else None


def elu(x: Tensor, weight: Tensor, bias: Any, selu: bool, *rest: Any) -> Tensor:
    return F.elu(conv1d.plain(x, weight, bias)) if selu else None


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
    ("conv1d", "taps reversed"): variant(conv1d.reference, a1=lambda w: w.flip(2)),
    ("conv1d", "padding one token off"): variant(conv1d.reference, a0=lambda x: x.roll(1, 1)),
    ("conv1d", "edge repeated for zeros"): repeated_edge,
    ("conv1d", "bias dropped"): variant(conv1d.reference, a2=lambda b: None),
    ("conv1d", "next gate row"): variant(
        conv1d.reference, a6=lambda i: None if i is None else (i + 1) % 5
    ),
    ("conv1d", "ELU for SELU"): elu,
    ("conv_swiglu", "w1 and w3 swapped"): lambda x, w1, w3, keep: conv_swiglu.reference(
        x, w3, w1, False
    )[0],
    ("conv_swiglu", "sigmoid for SiLU"): lambda x, w1, w3, keep: (
        conv1d.plain(x, w1).sigmoid() * conv1d.plain(x, w3)
    ),
    ("prepared_conv", "sign of the fourth product"): variant(
        prepared_conv.reference, a1=lambda w: [*w[:3], -w[3]] if len(w) == 4 else w
    ),
    ("prepared_conv", "halves swapped"): variant(
        prepared_conv.reference, a1=lambda w: [t.roll(t.shape[0] // 2, 0) for t in w]
    ),
    ("swiglu", "a and b swapped"): lambda a, b: swiglu.reference(b, a),
    ("swiglu", "sigmoid of 1.01 a"): lambda a, b: a * (1.01 * a).sigmoid() * b,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, what", list(MUTATIONS))
def test_mutation_is_rejected(name: str, what: str, dtype: torch.dtype) -> None:
    op, wrong = REGISTRY[name], MUTATIONS[name, what]
    small_effect = what in ("scale off by 1e-5", "an epsilon in the RMS", "1 - t without clamp")
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
