"""The tolerances must reject small wrong variants of each op; else the op tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import excess, to_float64
from torch import Tensor

from wavflow_kernels import REGISTRY
from wavflow_kernels.ops import flow_loss, flow_mix, ode_step, qkv_rope, unpatchify

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


def conjugate(rope: Tensor) -> Tensor:
    return rope * torch.tensor([1.0, -1.0], dtype=rope.dtype).repeat(rope.shape[1] // 2)


def large_epsilon(qkv: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """sqrt(mean(x^2) + 100 eps): the same as 10 times smaller projections with eps."""
    q, k, _ = qkv_rope.reference([x / 10 for x in qkv], *args)
    return q, k, qkv_rope.reference(qkv, *args)[2]


def exchanged_parts(qkv: list[Tensor], q_weight: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    heads, d = args[-1], q_weight[0].shape[0]
    wrong = []
    for x in qkv:
        parts = x.shape[2] // (heads * d)
        order = [1, 0, 2] if parts == 3 else [0, 1]
        wrong.append(x.unflatten(2, (heads, d, parts))[..., order].flatten(2))
    return qkv_rope.reference(wrong, q_weight, *args)


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
    ("qkv_rope", "eps x 100"): large_epsilon,
    ("qkv_rope", "rotation the other way"): variant(qkv_rope.reference, a3=conjugate),
    ("qkv_rope", "rotation of the next token"): variant(
        qkv_rope.reference, a3=lambda rope: rope.roll(1, 0)
    ),
    ("qkv_rope", "norm weights swapped"): lambda x, q, k, *rest: qkv_rope.reference(x, k, q, *rest),
    ("qkv_rope", "weight of a stream's neighbour"): variant(
        qkv_rope.reference, a2=lambda weights: [*weights[1:], weights[0]]
    ),
    ("qkv_rope", "q and k exchanged"): exchanged_parts,
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
        out, truth = (x if isinstance(x, tuple) else (x,) for x in (out, truth))
        for o, t in zip(out, truth, strict=True):
            worst = max(worst, excess(o.to(dtype), t, op.tolerance))
    assert worst > 1, f"{name} with {what} passes: {worst:.3g} of the allowed error"
