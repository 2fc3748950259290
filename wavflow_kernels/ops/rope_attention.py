r"""Attention over all tokens or a sliding window, with RMSNorm and RoPE inside on request.

:math:`o_i = \sum_j \mathrm{softmax}_j(q_i \cdot k_j / \sqrt d)\,v_j` for each head; j runs over the
keys that query i sees: all, or those of its :class:`Window`. The op takes the window's three
numbers, a negative size for none; with one, time and memory grow with the tokens, not their square.

With norm weights given, q and k are first normalised and rotated per head as in
:func:`qkv_rope`, without ever being written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _tuned, cpu
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
from .._window import Block, Window, blocks

NO_WINDOW = Window(-1, 0)
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
    spread: int,
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
    for name, given in (("q_weight", q_weight), ("k_weight", k_weight), ("rope", rope)):
        check_dtype(op, name, given, compute_dtype(q.dtype))
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
    if window >= 0:
        n, room = sizes["n"], sizes["n"] - local
        require(1 <= local <= n, f"{op}: local must lie in [1, {n}], got {local}")
        require(0 <= spread <= room, f"{op}: spread must lie in [0, {room}], got {spread}")


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


def _pick(x: Tensor, block: Block) -> Tensor:
    """The keys or values (b h n d) that a block sees."""
    return x if block.cols is None else x.index_select(2, block.cols)


def _join(parts: list[Tensor]) -> Tensor:
    """What blocks of queries gave, (b h rows ...) each."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled products of queries and keys (b h . d), minus infinity where the mask is False."""
    wide = compute_dtype(q.dtype)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def reference(
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    q_weight: Tensor | None,  # d
    k_weight: Tensor | None,  # d
    rope: Tensor | None,  # n d
    window: int,
    local: int,
    spread: int,
) -> tuple[Tensor, Tensor]:  # b nq h*d, b h nq
    # Normalised queries and keys are rounded to the dtype of the matrix product.
    q_in = norm_rope(q, q_weight, rope).to(q.dtype)
    k_in = norm_rope(k, k_weight, rope).to(k.dtype)
    wide, outs, lses = compute_dtype(q.dtype), [], []
    for block in blocks(q.shape[-2], k.shape[-2], Window(window, local, spread), q.device):
        scores = _scores(q_in[:, :, block.rows], _pick(k_in, block), block.mask)
        lse = scores.logsumexp(-1)
        # Weights are rounded to the inputs' dtype before the second product, as flash kernels do.
        weights = (scores - lse[..., None]).exp().to(v.dtype)
        outs.append((weights.to(wide) @ _pick(v, block).to(wide)).to(q.dtype))
        lses.append(lse)
    return _join(outs).transpose(1, 2).flatten(2), _join(lses)


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
    spread: int,
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
        [min(window, k.shape[2]), local, spread],
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
    spread: int,
) -> tuple[Tensor]:
    """torch's scaled_dot_product_attention, which picks among its own kernels."""
    q_in = norm_rope(q, q_weight, rope).to(v.dtype)
    k_in = norm_rope(k, k_weight, rope).to(v.dtype)
    outs = [
        F.scaled_dot_product_attention(
            q_in[:, :, block.rows], _pick(k_in, block), _pick(v, block), attn_mask=block.mask
        )
        for block in blocks(q.shape[-2], k.shape[-2], Window(window, local, spread), q.device)
    ]
    return (_join(outs).transpose(1, 2).flatten(2),)


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
    spread: int,
) -> None:
    _check(q, k, v, None, None, None, window, local, spread)
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
    spread: int,
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
        [min(window, k.shape[2]), local, spread],
    )


def _add(total: Tensor, block: Block, part: Tensor) -> None:
    """Adds a block's part to the gradient of all keys or values, in place."""
    if block.cols is None:
        total.add_(part)
    else:
        total.index_add_(2, block.cols, part)


def _reference_backward(
    grad: Tensor,  # b nq h*d
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    out: Tensor,  # b nq h*d
    lse: Tensor,  # b h nq
    window: int,
    local: int,
    spread: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, scale, heads = compute_dtype(q.dtype), q.shape[-1] ** -0.5, q.shape[1]
    grad, out = (x.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grad, out))
    delta = (grad * out).sum(-1, keepdim=True)
    d_q, d_k, d_v = [], *(torch.zeros_like(x, dtype=wide) for x in (k, v))
    for block in blocks(q.shape[-2], k.shape[-2], Window(window, local, spread), q.device):
        rows, keys = block.rows, _pick(k, block)
        weights = (_scores(q[:, :, rows], keys, block.mask) - lse[:, :, rows, None]).exp()
        d_weights = grad[:, :, rows] @ _pick(v, block).to(wide).transpose(-2, -1)
        d_scores = weights * (d_weights - delta[:, :, rows]) * scale
        # Factors of a product are rounded to the inputs' dtype, as flash kernels do.
        weights, d_scores = (x.to(q.dtype).to(wide) for x in (weights, d_scores))
        d_q.append(d_scores @ keys.to(wide))
        _add(d_k, block, d_scores.transpose(-2, -1) @ q[:, :, rows].to(wide))
        _add(d_v, block, weights.transpose(-2, -1) @ grad[:, :, rows])
    return _join(d_q).to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype)


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
        Sample((*arguments(2, 2, 37, 37, 32), -1, 0, 0), plain, "odd length"),
        Sample((*arguments(1, 3, 9, 70, 64), -1, 0, 0), plain, "fewer queries"),
        Sample(
            (*arguments(1, 2, 33, 33, 32, norm=True, rope=True), -1, 0, 0), fused, "norm and RoPE"
        ),
        Sample((*arguments(1, 2, 25, 38, 128, norm=True), -1, 0, 0), fused, "norm alone"),
        Sample((*arguments(2, 2, 50, 57, 32), 12, 50, 0), plain, "window"),
        Sample((*arguments(1, 1, 40, 47, 32, norm=True, rope=True), 0, 30, 0), fused, "window 0"),
        Sample((*arguments(1, 2, 57, 57, 32), 6, 40, 11), plain, "window over two streams"),
        Sample((*arguments(2, 1, 300, 350, 32), 20, 300, 43), plain, "window, first stream alone"),
        Sample((*packed, *weights, None, -1, 0, 0), fused, "strided"),
        Sample((*large, -1, 0, 0), (), "one key wins"),
        # The gradients of its q and k are exactly 0: no yardstick for rounding errors.
        Sample((*arguments(2, 1, 1, 1, 32), -1, 0, 0), (2,), "one token"),
        Sample((*arguments(1, 2, 37, 37, 22), -1, 0, 0), plain, "padded heads"),
        # So narrow, the rounding of `out` in rowsum(grad * out) outweighs all else in a gradient.
        Sample((*arguments(2, 2, 37, 37, 6), -1, 0, 0), (), "narrow heads"),
        Sample((*arguments(0, 2, 3, 4, 32), -1, 0, 0), (), "empty batch"),
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
    b: int, nq: int, n: int, *, norm: bool = False, window: Window | None = None
) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    """A call with 14 heads of 64; with norm, q, k and v are views of one projection."""
    h, d = 14, 64

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        computed = compute_dtype(dtype)
        packed = torch.randn(3, b, h, n, d, device=device, dtype=dtype)
        weights: list[Tensor | None] = [None, None]
        rope = None
        if norm:
            packed = torch.randn(b, n, 3, h, d, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
            weights = [torch.ones(d, device=device, dtype=computed) for _ in range(2)]
            rope = torch.randn(n, d, device=device, dtype=computed)
        q, k, v = packed
        return (q[:, :, :nq], k, v, *weights, rope, *(window or NO_WINDOW))

    return make


def _workload_backward(
    forward: Callable[[torch.device, torch.dtype], tuple[Any, ...]],
) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, _, _, _, *window = forward(device, dtype)
        out, lse = (torch.randn_like(x) for x in _outputs(q))
        return (torch.randn_like(out), q, k, v, out, lse + 10, *window)

    return make


WORKLOADS = {
    "medium_16k joint": _workload(2, 781, 781),
    "medium_16k last joint": _workload(2, 640, 781),
    "medium_16k fused, norm and RoPE": _workload(2, 640, 640, norm=True),
    "medium_44k joint": _workload(2, 1905, 1905),
    "training": _workload(16, 781, 781),
    "long 8192": _workload(1, 8192, 8192),
    "long 16384": _workload(1, 16384, 16384),
    "long 16384, window 512": _workload(1, 16384, 16384, window=Window(512, 16384)),
    "long 16384 joint, window 640": _workload(
        1, 18099, 18099, window=Window(640, local=16384, spread=1638)
    ),
}


def pairs(nq: int, n: int, window: int, local: int, spread: int) -> int:
    """Pairs of nq queries and n keys that are seen, counting a window as full at the edges too."""
    if window < 0:
        return nq * n
    paced = local + spread
    inside = min(nq, paced)
    near = min(2 * window + 1, local)
    if spread:
        near += min(2 * window * spread // local + 1, spread)
    return inside * (near + n - paced) + (nq - inside) * n


def _flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    b, h, nq, d = q.shape
    return 4 * b * h * d * pairs(nq, k.shape[2], *rest[-3:])


def tuning_key(q: Tensor, k: Tensor, q_weight: Tensor | None, window: int) -> str:
    """What decides the speed of a call: the key of its row in the tuning tables."""
    n = _tuned.up_to_power_of_two(k.shape[2])
    kind = "" if q_weight is None else " norm"
    return f"{str(q.dtype)[6:]} d{q.shape[3]} n{n}{kind}{'' if window < 0 else ' window'}"


def _prefer(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    # A library takes a window in pieces.
    unmeasured = "library" if rest[3] < 0 else None
    if q.device.type == "cpu":
        # With AVX2 and AVX-512 ours is 1.2 to 5 times faster, in training too; with the baseline's
        # vectors of 16 bytes they are on a par on x86-64, and other processors are not measured.
        # In half precision, where oneDNN has none, training is 3 to 6 times faster by ours there.
        by_library = cpu.current().level == "default" and cpu.product_dtype(q.dtype) == q.dtype
        return unmeasured if by_library else None
    row = _tuned.lookup("rope_attention", q.device, tuning_key(q, k, rest[0], rest[3]))
    return row.get("backend", unmeasured)


BACKWARD = Op(
    name="rope_attention_backward",
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt window, "
        "SymInt local, SymInt spread) -> (Tensor, Tensor, Tensor)"
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
    q, k, v, q_weight, k_weight, rope, *ctx.window = inputs
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
        *ctx.window,
    )
    d_q, d_q_weight = norm_rope_backward(d_q, q, q_weight, rope)
    d_k, d_k_weight = norm_rope_backward(d_k, k, k_weight, rope)
    return d_q, d_k, d_v, d_q_weight, d_k_weight, None, None, None, None


OP = Op(
    name="rope_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? rope, "
        "SymInt window, SymInt local, SymInt spread) -> (Tensor, Tensor)"
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
    window: Window | None = None,
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
        window: which keys each query sees, in time and memory linear in n; None: all.

    Returns:
        (b, nq, h * d) in the dtype of q. Differentiable once in q, k, v and the weights.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype.

    Source: FlashAttention-2 (arXiv 2307.08691) for the tiling and the backward.
    """
    if window is None:
        return OP(q, k, v, q_weight, k_weight, rope, *NO_WINDOW)[0]
    size = window.size
    require(size >= 0, f"rope_attention: the window's size must be at least 0, got {size}")
    return OP(q, k, v, q_weight, k_weight, rope, *window)[0]
