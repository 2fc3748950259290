r"""Attention over all tokens or a sliding window, with RMSNorm and RoPE inside on request.

:math:`o_i = \sum_j \mathrm{softmax}_j(q_i \cdot k_j / \sqrt d)\,v_j` for each head; j runs over the
keys that query i sees. With a window, token i of the first `local` ones sees those of them with
:math:`|i - j| \le` window, and every later token; later tokens see and are seen by all.

With norm weights given, q and k are first normalised and rotated per head as in
:func:`qkv_rope`, without ever being written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _tuned
from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._registry import (
    DTYPE_CODE,
    ON_CPU,
    ON_TRITON,
    Op,
    Sample,
    address,
    dense_rows,
    no_double_backward,
    target,
    triton_launch,
)

RMS_NORM_EPS = torch.finfo(torch.float32).eps


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    window: int,
    local: int,
) -> None:
    op = "rope_attention"
    for name, tensor in (("k", k), ("v", v)):
        if tensor is None:
            raise TypeError(f"{op}: {name} must be a tensor, got NoneType")
    sizes = check(
        op,
        q=(q, "b h nq d"),
        k=(k, "b h n d"),
        v=(v, "b h n d"),
        q_weight=(q_weight, "d"),
        k_weight=(k_weight, "d"),
        rope=(rope, "n d"),
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dtype(op, name, tensor, *FLOATS)
        check_dtype(op, name, tensor, q.dtype)
    for name, tensor in (("q_weight", q_weight), ("k_weight", k_weight), ("rope", rope)):
        check_dtype(op, name, tensor, compute_dtype(q.dtype))
    require(
        (q_weight is None) == (k_weight is None),
        f"{op}: q_weight and k_weight must be given together",
    )
    require(
        rope is None or q_weight is not None, f"{op}: rope needs the norm weights, got rope alone"
    )
    for name, dim in (("queries", "nq"), ("keys", "n"), ("channels", "d")):
        require(sizes[dim] > 0, f"{op}: there must be at least one of the {name}, got none")
    require(sizes["d"] % 2 == 0, f"{op}: d must be even, got {sizes['d']}")
    require(sizes["nq"] <= sizes["n"], f"{op}: q has {sizes['nq']} tokens, k only {sizes['n']}")
    require(window >= -1, f"{op}: window must be -1 (none) or more, got {window}")
    require(0 <= local <= sizes["n"], f"{op}: local must lie in [0, {sizes['n']}], got {local}")


def norm_rope(x: Tensor, weight: Tensor | None, rope: Tensor | None) -> Tensor:
    """RMSNorm over the last axis and rotation of the pairs (2i, 2i+1): x (b h n d), rope (n' d)."""
    if weight is None:
        return x
    x = x.to(weight.dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_NORM_EPS) * weight
    if rope is None:
        return x
    cos, sin = rope[: x.shape[-2]].unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def visible(nq: int, n: int, window: int, local: int, device: torch.device) -> Tensor | None:
    """(nq n) bool: which keys each query sees; None: all."""
    if window < 0:
        return None
    i = torch.arange(nq, device=device)[:, None]
    j = torch.arange(n, device=device)
    return ((i - j).abs() <= window) | (i >= local) | (j >= local)


def reference(
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    q_weight: Tensor | None,  # d
    k_weight: Tensor | None,  # d
    rope: Tensor | None,  # n d
    window: int,
    local: int,
) -> tuple[Tensor, Tensor]:  # b nq h*d, b h nq
    scale = q.shape[-1] ** -0.5
    mask = visible(q.shape[-2], k.shape[-2], window, local, q.device)
    wide = compute_dtype(q.dtype)
    # Normalised queries and keys are rounded to the dtype of the matrix product.
    q_in = norm_rope(q, q_weight, rope).to(q.dtype)
    k_in = norm_rope(k, k_weight, rope).to(k.dtype)
    scores = (q_in.to(wide) @ k_in.to(wide).transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    # Weights are rounded to the inputs' dtype before the second product, as flash kernels do.
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    out = (weights.to(wide) @ v.to(wide)).to(q.dtype)
    return out.transpose(1, 2).flatten(2), lse


def _outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h * d), q.new_empty(b, h, n, dtype=compute_dtype(q.dtype))


def _heads(x: Tensor) -> tuple[int, list[int]]:
    """Address and strides of x (b h n d), whose channels lie side by side."""
    return x.data_ptr(), list(x.stride()[:3])


def _launch(
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    window: int,
    local: int,
) -> None:
    q, k, v = (dense_rows(x) for x in (q, k, v))
    small = [None if x is None else x.contiguous() for x in (q_weight, k_weight, rope)]
    C.rope_attention(
        target(q),
        DTYPE_CODE[q.dtype],
        *_heads(q),
        *_heads(k),
        *_heads(v),
        *(address(x) for x in (*small, *outputs)),
        [*q.shape[:3], *k.shape[2:]],
        window,
        local,
    )


def library(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    window: int,
    local: int,
) -> tuple[Tensor]:
    """torch's scaled_dot_product_attention, which picks among its own kernels."""
    mask = visible(q.shape[-2], k.shape[-2], window, local, q.device)
    q_in = norm_rope(q, q_weight, rope).to(v.dtype)
    k_in = norm_rope(k, k_weight, rope).to(v.dtype)
    out = F.scaled_dot_product_attention(q_in, k_in, v, attn_mask=mask)
    return (out.transpose(1, 2).flatten(2),)


# The backward, of queries and keys as they enter the matrix product.


def _check_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    local: int,
) -> None:
    _check(q, k, v, None, None, None, window, local)
    op, (_, h, _, d) = "rope_attention_backward", q.shape
    check(
        op,
        q=(q, "b h nq d"),
        grad=(grad, f"b nq {h * d}"),
        out=(out, f"b nq {h * d}"),
        lse=(lse, "b h nq"),
    )
    check_dtype(op, "grad", grad, q.dtype)
    check_dtype(op, "out", out, q.dtype)
    check_dtype(op, "lse", lse, compute_dtype(q.dtype))


def _outputs_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _launch_backward(
    outputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    local: int,
) -> None:
    grad, q, k, v, out = (dense_rows(x) for x in (grad, q, k, v, out))
    grad, out = (x.unflatten(-1, (q.shape[1], -1)).transpose(1, 2) for x in (grad, out))
    lse = lse.contiguous()
    C.rope_attention_backward(
        target(q),
        DTYPE_CODE[q.dtype],
        *_heads(grad),
        *_heads(q),
        *_heads(k),
        *_heads(v),
        *_heads(out),
        *(address(x) for x in (lse, *outputs)),
        [*q.shape[:3], *k.shape[2:]],
        window,
        local,
    )


def _reference_backward(
    grad: Tensor,  # b nq h*d
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    out: Tensor,  # b nq h*d
    lse: Tensor,  # b h nq
    window: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, scale, heads = compute_dtype(q.dtype), q.shape[-1] ** -0.5, q.shape[1]
    mask = visible(q.shape[-2], k.shape[-2], window, local, q.device)
    grad, out = (x.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grad, out))
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - lse[..., None]).exp()
    d_weights = grad @ v.to(wide).transpose(-2, -1)
    d_scores = weights * (d_weights - (grad * out).sum(-1, keepdim=True)) * scale
    # Factors of a product are rounded to the inputs' dtype, as flash kernels do.
    weights, d_scores = (x.to(q.dtype).to(wide) for x in (weights, d_scores))
    d_q = d_scores @ k.to(wide)
    d_k = d_scores.transpose(-2, -1) @ q.to(wide)
    d_v = weights.transpose(-2, -1) @ grad
    return d_q.to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype)


def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`norm_rope` in x and weight, from that of its result (all b h n d)."""
    if weight is None:
        return grad, None
    grad, wide = grad.to(weight.dtype), x.to(weight.dtype)
    if rope is not None:
        cos, sin = rope[: x.shape[-2]].unflatten(-1, (-1, 2)).unbind(-1)
        even, odd = grad.unflatten(-1, (-1, 2)).unbind(-1)
        grad = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
    normed = wide * inverse
    d_weight = (grad * normed).sum((0, 1, 2))
    grad = grad * weight
    d_x = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), d_weight


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    computed = compute_dtype(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def arguments(
        b: int, h: int, nq: int, n: int, d: int, *, norm: bool = False, rope: bool = False
    ) -> tuple[Any, ...]:
        weights = [1 + 0.1 * normal(d, dtype=computed) for _ in range(2)] if norm else [None] * 2
        angle = torch.arange(n)[:, None] * 0.7 ** torch.arange(d // 2)
        table = torch.stack((angle.cos(), angle.sin()), -1).flatten(1).to(device, computed)
        return (
            normal(b, h, nq, d),
            normal(b, h, n, d),
            normal(b, h, n, d),
            *weights,
            table if rope else None,
        )

    plain, fused = (0, 1, 2), (0, 1, 2, 3, 4)
    packed = normal(2, 20, 3, 2, 32).permute(2, 0, 3, 1, 4)  # q, k, v as views of one projection
    weights = [1 + 0.1 * normal(32, dtype=computed) for _ in range(2)]
    large = list(arguments(1, 2, 8, 24, 32))
    large[0] = large[0] * 100
    return [
        Sample((*arguments(2, 2, 37, 37, 32), -1, 0), plain, "odd length"),
        Sample((*arguments(1, 3, 9, 70, 64), -1, 0), plain, "fewer queries"),
        Sample((*arguments(1, 2, 33, 33, 32, norm=True, rope=True), -1, 0), fused, "norm and RoPE"),
        Sample((*arguments(1, 2, 25, 38, 128, norm=True), -1, 0), fused, "norm alone"),
        Sample((*arguments(2, 2, 50, 57, 32), 12, 50), plain, "window"),
        Sample((*arguments(1, 1, 40, 47, 32, norm=True, rope=True), 0, 30), fused, "window 0"),
        Sample((*packed, *weights, None, -1, 0), fused, "strided"),
        Sample((*large, -1, 0), (), "one key wins"),
        # The gradients of its q and k are exactly 0: no yardstick for rounding errors.
        Sample((*arguments(2, 1, 1, 1, 32), -1, 0), (2,), "one token"),
        Sample((*arguments(1, 2, 37, 37, 22), -1, 0), plain, "padded heads"),
        # So narrow, the rounding of `out` in rowsum(grad * out) outweighs all else in a gradient.
        Sample((*arguments(2, 2, 37, 37, 6), -1, 0), (), "narrow heads"),
        Sample((*arguments(0, 2, 3, 4, 32), -1, 0), (), "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for s in _samples(device, dtype, seed):
        # Where one key wins the gradients of q and k are rounding errors of those of v.
        if s.args[3] is None and (s.differentiable == (0, 1, 2) or not len(s.args[0])):
            out, lse = reference(*s.args)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(dtype)
            samples.append(Sample((grad, *s.args[:3], out, lse, *s.args[6:]), (), s.name))
    return samples


def _workload(
    b: int, nq: int, n: int, *, norm: bool = False, window: int = -1
) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    """A call with 14 heads of 64; with norm, q, k and v are views of one projection."""
    h, d = 14, 64

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        computed = compute_dtype(dtype)
        packed = torch.randn(3, b, h, n, d, device=device, dtype=dtype)
        weights, rope = [None, None], None
        if norm:
            packed = torch.randn(b, n, 3, h, d, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
            weights = [torch.ones(d, device=device, dtype=computed) for _ in range(2)]
            rope = torch.randn(n, d, device=device, dtype=computed)
        q, k, v = packed
        return (q[:, :, :nq], k, v, *weights, rope, window, n if window >= 0 else 0)

    return make


def _workload_backward(
    forward: Callable[[torch.device, torch.dtype], tuple[Any, ...]],
) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, _, _, _, window, local = forward(device, dtype)
        out, lse = (torch.randn_like(x) for x in _outputs(q))
        return (torch.randn_like(out), q, k, v, out, lse + 10, window, local)

    return make


WORKLOADS = {
    "medium_16k joint": _workload(2, 781, 781),
    "medium_16k last joint": _workload(2, 640, 781),
    "medium_16k fused, norm and RoPE": _workload(2, 640, 640, norm=True),
    "medium_44k joint": _workload(2, 1905, 1905),
    "training": _workload(16, 781, 781),
    "long 8192": _workload(1, 8192, 8192),
    "long 16384": _workload(1, 16384, 16384),
    "long 16384, window 512": _workload(1, 16384, 16384, window=512),
}


def _pairs(nq: int, n: int, window: int, local: int) -> int:
    """Query-key pairs that are seen, counting a window as full at the edges too."""
    if window < 0:
        return nq * n
    inside = min(nq, local)
    return inside * min(2 * window + 1 + n - local, n) + (nq - inside) * n


def _flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    b, h, nq, d = q.shape
    return 4 * b * h * d * _pairs(nq, k.shape[2], *rest[-2:])


def tuning_key(q: Tensor, k: Tensor, q_weight: Tensor | None, window: int) -> str:
    """What decides the speed of a call: the key of its row in the tuning tables."""
    n = _tuned.up_to_power_of_two(k.shape[2])
    kind = "" if q_weight is None else " norm"
    return f"{str(q.dtype)[6:]} d{q.shape[3]} n{n}{kind}{'' if window < 0 else ' window'}"


def _prefer(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    if q.device.type == "cpu":
        # With AVX2 and AVX-512 ours is 1.2 to 5 times faster, in training too; with the baseline's
        # vectors of 16 bytes they are on a par on x86-64, and other processors are not measured.
        return "library" if _backend.ISA == "default" else None
    row = _tuned.lookup("rope_attention", q.device, tuning_key(q, k, rest[0], rest[3]))
    return row.get("backend", "library")


BACKWARD = Op(
    name="rope_attention_backward",
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt window, "
        "SymInt local) -> (Tensor, Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward, "triton": triton_launch("rope_attention", "backward")},
    supported={"cpp": ON_CPU, "triton": ON_TRITON},
    samples=_samples_backward,
    workloads={
        name: _workload_backward(make) for name, make in WORKLOADS.items() if "norm" not in name
    },
    bytes=lambda grad, q, k, v, *_: 4 * q.nbytes + 4 * k.nbytes,
    flops=lambda grad, *args: 5 * _flops(*args) // 2,
    tolerance="matrix",
    setup_context=lambda ctx, inputs, output: None,
    backward=no_double_backward("rope_attention"),
    bulk=("grad", "q", "k", "v", "out"),
    internal=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_weight, k_weight, rope, ctx.window, ctx.local = inputs
    if ctx.needs_input_grad[5]:
        raise RuntimeError("rope_attention: no gradient with respect to rope")
    ctx.save_for_backward(q, k, v, q_weight, k_weight, rope, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, q_weight, k_weight, rope, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = BACKWARD.torch_op(
        grad,
        norm_rope(q, q_weight, rope).to(q.dtype),
        norm_rope(k, k_weight, rope).to(k.dtype),
        v,
        out,
        lse,
        ctx.window,
        ctx.local,
    )
    d_q, d_q_weight = norm_rope_backward(d_q, q, q_weight, rope)
    d_k, d_k_weight = norm_rope_backward(d_k, k, k_weight, rope)
    return d_q, d_k, d_v, d_q_weight, d_k_weight, None, None, None


OP = Op(
    name="rope_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? rope, "
        "SymInt window, SymInt local) -> (Tensor, Tensor)"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch, "triton": triton_launch("rope_attention", "forward")},
    library=library,
    supported={
        "cpp": ON_CPU,
        "triton": ON_TRITON,
        "library": {"cpu": frozenset(FLOATS), "cuda": frozenset(FLOATS)},
    },
    prefer=_prefer,
    samples=_samples,
    workloads=WORKLOADS,
    bytes=lambda q, k, v, *_: 2 * q.nbytes + 2 * k.nbytes,
    flops=_flops,
    tolerance="matrix",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("q", "k", "v"),
    bulk=("q", "k", "v"),
)


def rope_attention(
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    *,
    q_weight: Tensor | None = None,  # d
    k_weight: Tensor | None = None,  # d
    rope: Tensor | None = None,  # n d
    window: int | None = None,
    local: int | None = None,
) -> Tensor:  # b nq h*d
    """Joint attention ``softmax(q k^T / sqrt(d)) v``, heads concatenated.

    Args:
        q: (b, h, nq, d) queries of the first nq <= n tokens, any float dtype, any strides.
        k, v: (b, h, n, d) keys and values.
        q_weight, k_weight: (d,) float32 (float64 for float64) weights of the RMSNorm that queries
            and keys go through first; None: they come normalised and rotated, as
            :func:`qkv_rope` returns them.
        rope: (n, d) float32 rotations of the tokens as :func:`rope_table` makes them; needs the
            weights. None: no rotation.
        window: tokens that a local token sees on either side; None: all.
        local: how many tokens, from the first, the window holds for; None: all n. The rest
            (clip and text) see and are seen by all.

    Returns:
        (b, nq, h * d) in the dtype of q. Differentiable once in q, k, v and the weights.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype.

    Source: FlashAttention-2 (arXiv 2307.08691) for the tiling and the backward.
    """
    require(
        window is None or window >= 0, f"rope_attention: window must be at least 0, got {window}"
    )
    if local is None:
        local = k.shape[2] if isinstance(k, Tensor) and k.dim() == 4 else 0
    return OP(q, k, v, q_weight, k_weight, rope, -1 if window is None else window, local)[0]
