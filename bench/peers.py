"""What an op is compared with besides its own reference: the best calls the libraries offer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wavflow_kernels import _panels
from wavflow_kernels._attention_window import AttentionWindow, visible
from wavflow_kernels.ops.rope_attention import pairs

Calls = dict[str, Callable[[], object]]

# Arguments that training differentiates, where that is not all that can be.
TRAINED: dict[str, tuple[int, ...]] = {
    "flow_loss": (0,),
    "flow_mix": (),
    "lift_patchify": (),
    "ode_step": (),
    "unpatchify": (),
}


def backward_flops(name: str, flops: int) -> int:
    """Arithmetic of a matrix op's forward and backward, from that of its forward."""
    # Two products a gradient each need; attention computes its scores once more.
    return flops * 7 // 2 if name == "rope_attention" else flops * 3


def reference_bytes(name: str, *args: Any) -> int:
    """What the eager reference holds at once beyond a few times the op's own traffic."""
    if not name.startswith("rope_attention"):
        return 0
    forward = name == "rope_attention"
    q, k = args[:2] if forward else args[1:3]
    scores = 4 * q.shape[0] * q.shape[1] * pairs(q.shape[2], k.shape[2], *args[-3:])  # float32
    return scores * (4 if forward else 8)


def _flow_mix(x_1: Tensor, t: Tensor, noise: Tensor | None, *_: Any) -> Calls:
    return {"randn": lambda: torch.randn_like(x_1)} if noise is None else {}


def _rope_attention(
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    window: int,
    local: int,
    spread: int,
) -> Calls:
    """Each attention kernel of torch and flash-attn.

    The mask of a window, of all pairs, is made beforehand; flash kernels of GPUs take none, and are
    left out then.
    """
    rows, cols = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    mask = visible(rows, cols, AttentionWindow(window, local, spread)) if window >= 0 else None

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)

        return call

    calls: Calls = {}
    if q.device.type == "cuda":
        calls["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        calls["efficient"] = sdpa(SDPBackend.EFFICIENT_ATTENTION)
    if mask is None or q.device.type == "cpu":
        calls["flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        if q.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
            from flash_attn import flash_attn_func

            def flash_attn() -> Tensor:
                out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
                return out.flatten(2)

            calls["flash-attn"] = flash_attn
    return calls


def _conv_swiglu(x: Tensor, w1: Tensor, w3: Tensor, *_: Any) -> Calls:
    """Convolutions as networks usually write them: channels first, and the gate after."""
    joined = torch.cat((w1, w3))

    def apart() -> Tensor:
        turned = x.transpose(1, 2)
        a, b = (F.conv1d(turned, w, padding=w.shape[2] // 2) for w in (w1, w3))
        return (F.silu(a) * b).transpose(1, 2).contiguous()

    def together() -> Tensor:
        out = F.conv1d(x.transpose(1, 2), joined, padding=joined.shape[2] // 2)
        a, b = out.chunk(2, dim=1)
        return (F.silu(a) * b).transpose(1, 2).contiguous()

    return {"conv1d": apart, "conv1d, weights joined": together}


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Calls:
    """The convolution alone, channels first: what the epilogue is added to."""

    def call() -> Tensor:
        out = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2)
        return out.transpose(1, 2).contiguous()

    return {"conv1d alone": call}


def _prepared_conv(x: Tensor, weights: list[Tensor], bias: Tensor | None, gated: bool) -> Calls:
    """The same convolution with weights that are cast and nothing else."""
    if len(weights) == 4:
        w0, w1, w2, w3 = (_dense(w, x.shape[2]) for w in weights)
        if w0.dim() == 3:
            w0, w1, w2, w3 = (w.squeeze(2) for w in (w0, w1, w2, w3))
        weight = torch.stack((w0, w1 - w2, w3), -1)
    else:
        weight = _dense(weights[0], x.shape[2])
        if weight.dim() != 3:
            weight = weight.squeeze(2) if weight.dim() == 4 else weight.unsqueeze(2)
    padding = weight.shape[2] // 2
    biases = (None, None) if bias is None else bias.chunk(2)
    pairs = tuple(zip(weight.chunk(2), biases, strict=True))

    def call() -> Tensor:
        turned = x.transpose(1, 2)
        if not gated:
            return F.conv1d(turned, weight, bias, padding=padding).transpose(1, 2).contiguous()
        a, b = (F.conv1d(turned, *pair, padding=padding) for pair in pairs)
        return (F.silu(a) * b).transpose(1, 2).contiguous()

    return {"conv1d, weights cast": call}


def _dense(weight: Tensor, channels: int) -> Tensor:
    if weight.dim() == 3:
        return _panels.unpacked(weight, channels)
    return weight.to_dense() if weight.is_mkldnn else weight


PEERS: dict[str, Callable[..., Calls]] = {
    "conv1d": _conv1d,
    "conv_swiglu": _conv_swiglu,
    "flow_mix": _flow_mix,
    "prepared_conv": _prepared_conv,
    "rope_attention": _rope_attention,
}
