r"""Attention over all tokens or a sliding window.

:math:`o_i = \sum_j \mathrm{softmax}_j(q_i \cdot k_j / \sqrt d)\,v_j` for each head; j runs over the
keys that query i sees: all, or those of its :class:`AttentionWindow`. The op takes the window's
three numbers, a negative size for none; with one, time and memory grow with the tokens, not their
square. Queries and keys come normalised and rotated, as :func:`qkv_rope` makes them: doing so here,
while keys are read, takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _tuned, cpu
from .._attention_window import AttentionWindow, Block, blocks
from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense_rows, target, triton_launch
from .._registry import (
    ON_BOTH,
    ON_CPU,
    ON_TRITON,
    Op,
    Sample,
    Workload,
    no_double_backward,
    normals,
)

NO_WINDOW = AttentionWindow(-1, 0)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, local: int, spread: int) -> None:
    op = "rope_attention"
    for name, tensor in (("k", k), ("v", v)):
        if tensor is None:
            raise TypeError(f"{op}: {name} must be a tensor, got NoneType")
    sizes = check(op, q=(q, "b h nq d"), k=(k, "b h n d"), v=(v, "b h n d"))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dtype(op, name, tensor, *FLOATS)
        check_dtype(op, name, tensor, q.dtype)
    for name, dim in (("queries", "nq"), ("keys", "n"), ("channels", "d")):
        require(sizes[dim] > 0, f"{op}: there must be at least one of the {name}, got none")
    require(sizes["d"] % 2 == 0, f"{op}: d must be even, got {sizes['d']}")
    require(sizes["nq"] <= sizes["n"], f"{op}: q has {sizes['nq']} tokens, k only {sizes['n']}")
    require(window >= -1, f"{op}: window must be -1 (none) or more, got {window}")
    if window >= 0:
        n, room = sizes["n"], sizes["n"] - local
        require(1 <= local <= n, f"{op}: local must lie in [1, {n}], got {local}")
        require(0 <= spread <= room, f"{op}: spread must lie in [0, {room}], got {spread}")


def _blocks(q: Tensor, k: Tensor, window: int, local: int, spread: int) -> Iterator[Block]:
    """The queries in blocks, each with the keys that it sees."""
    return blocks(q.shape[2], k.shape[2], AttentionWindow(window, local, spread), q.device)


def _pick(x: Tensor, block: Block) -> Tensor:
    """The keys or values (b h n d) that a block sees."""
    return x if block.cols is None else x.index_select(2, block.cols)


def _join(parts: list[Tensor]) -> Tensor:
    """Join what blocks of queries gave, (b h rows ...) each."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The scaled products of queries and keys (b h . d), minus infinity where the mask is False."""
    wide = compute_dtype(q.dtype)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def reference(
    q: Tensor,  # b h nq d
    k: Tensor,  # b h n d
    v: Tensor,  # b h n d
    **window: int,
) -> tuple[Tensor, Tensor]:  # b nq h*d, b h nq
    wide, outs, lses = compute_dtype(q.dtype), [], []
    for block in _blocks(q, k, **window):
        scores = _scores(q[:, :, block.rows], _pick(k, block), block.mask)
        lse = scores.logsumexp(-1)
        # Weights are rounded to the inputs' dtype before the second product, as flash kernels do.
        weights = (scores - lse[..., None]).exp().to(v.dtype)
        outs.append((weights.to(wide) @ _pick(v, block).to(wide)).to(q.dtype))
        lses.append(lse)
    return _join(outs).transpose(1, 2).flatten(2), _join(lses)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
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
    window: int,
    local: int,
    spread: int,
) -> None:
    q, k, v = (dense_rows(x) for x in (q, k, v))
    C.rope_attention(
        target(q),
        DTYPE_CODE[q.dtype],
        *_heads(q),
        *_heads(k),
        *_heads(v),
        *(address(x) for x in outputs),
        [*q.shape[:3], *k.shape[2:]],
        [min(window, k.shape[2]), local, spread],
    )


def library(q: Tensor, k: Tensor, v: Tensor, **window: int) -> tuple[Tensor]:
    """Call torch's scaled_dot_product_attention, which picks among its own kernels."""
    outs = [
        F.scaled_dot_product_attention(
            q[:, :, block.rows], _pick(k, block), _pick(v, block), attn_mask=block.mask
        )
        for block in _blocks(q, k, **window)
    ]
    return (_join(outs).transpose(1, 2).flatten(2),)


def _check_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **window: int
) -> None:
    _check(q, k, v, **window)
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
    """Add a block's part to the gradient of all keys or values, in place."""
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
    **window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # as q, k, v
    wide, scale, heads = compute_dtype(q.dtype), q.shape[-1] ** -0.5, q.shape[1]
    grad, out = (x.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grad, out))
    delta = (grad * out).sum(-1, keepdim=True)
    d_q, d_k, d_v = [], *(torch.zeros_like(x, dtype=wide) for x in (k, v))
    for block in _blocks(q, k, **window):
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


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def qkv(b: int, h: int, nq: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(b, h, nq, d), normal(b, h, n, d), normal(b, h, n, d)

    every = (0, 1, 2)
    packed = normal(2, 20, 3, 2, 32).permute(2, 0, 3, 1, 4)  # q, k, v as views of one projection
    q, k, v = qkv(1, 2, 8, 24, 32)
    return [
        Sample((*qkv(2, 2, 37, 37, 32), *NO_WINDOW), every, "odd length"),
        Sample((*qkv(1, 3, 9, 70, 64), *NO_WINDOW), every, "fewer queries"),
        Sample((*qkv(1, 2, 25, 38, 128), *NO_WINDOW), every, "wide heads"),
        Sample((*qkv(2, 2, 50, 57, 32), 12, 50, 0), every, "window"),
        Sample((*qkv(1, 1, 40, 47, 32), 0, 30, 0), every, "window 0"),
        Sample((*qkv(1, 2, 57, 57, 32), 6, 40, 11), every, "window over two streams"),
        Sample((*qkv(2, 1, 300, 350, 32), 20, 300, 43), every, "window, first stream alone"),
        Sample((*packed, *NO_WINDOW), every, "strided"),
        Sample((100 * q, k, v, *NO_WINDOW), (), "one key wins"),
        # The gradients of its q and k are exactly 0: no yardstick for rounding errors.
        Sample((*qkv(2, 1, 1, 1, 32), *NO_WINDOW), (2,), "one token"),
        Sample((*qkv(1, 2, 37, 37, 22), *NO_WINDOW), every, "padded heads"),
        # So narrow, the rounding of `out` in rowsum(grad * out) outweighs all else in a gradient.
        Sample((*qkv(2, 2, 37, 37, 6), *NO_WINDOW), (), "narrow heads"),
        Sample((*qkv(0, 2, 3, 4, 32), *NO_WINDOW), (), "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for s in _samples(device, dtype, seed):
        # Where one key wins the gradients of q and k are rounding errors of those of v.
        if s.differentiable == (0, 1, 2) or not len(s.args[0]):
            out, lse = OP.reference(*s.args)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(dtype)
            samples.append(Sample((grad, *s.args[:3], out, lse, *s.args[3:]), (), s.name))
    return samples


def _workload(b: int, nq: int, n: int, window: AttentionWindow = NO_WINDOW) -> Workload:
    """A call with 14 heads of 64."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = torch.randn(3, b, 14, n, 64, device=device, dtype=dtype)
        return q[:, :, :nq], k, v, *window

    return make


def _workload_backward(forward: Workload) -> Workload:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, *window = forward(device, dtype)
        out, lse = (torch.randn_like(x) for x in _outputs(q))
        return torch.randn_like(out), q, k, v, out, lse + 10, *window

    return make


WORKLOADS = {
    "medium_16k joint": _workload(2, 781, 781),
    "medium_16k last joint": _workload(2, 640, 781),
    "medium_44k joint": _workload(2, 1905, 1905),
    "training": _workload(16, 781, 781),
    "long 8192": _workload(1, 8192, 8192),
    "long 16384": _workload(1, 16384, 16384),
    "long 16384, window 512": _workload(1, 16384, 16384, AttentionWindow(512, 16384)),
    "long 16384 joint, window 640": _workload(
        1, 18099, 18099, AttentionWindow(640, local=16384, spread=1638)
    ),
}


def pairs(nq: int, n: int, window: int, local: int, spread: int) -> int:
    """How many of nq x n pairs are seen, counting a window as full at the edges too."""
    if window < 0:
        return nq * n
    paced = local + spread
    inside = min(nq, paced)
    near = min(2 * window + 1, local)
    if spread:
        near += min(2 * window * spread // local + 1, spread)
    return inside * (near + n - paced) + (nq - inside) * n


def _flops(q: Tensor, k: Tensor, window: int, local: int, spread: int) -> int:
    b, h, nq, d = q.shape
    return 4 * b * h * d * pairs(nq, k.shape[2], window, local, spread)


def tuning_key(q: Tensor, k: Tensor, window: int) -> str:
    """What decides the speed of a call: the key of its row in the tuning tables."""
    n = _tuned.up_to_power_of_two(k.shape[2])
    return f"{str(q.dtype)[6:]} d{q.shape[3]} n{n}{'' if window < 0 else ' window'}"


def _prefer(q: Tensor, k: Tensor, window: int) -> str | None:
    # A library takes a window in pieces.
    unmeasured = "library" if window < 0 else None
    if q.device.type == "cpu":
        # With AVX2 and AVX-512 ours is 1.2 to 5 times faster, in training too; with the baseline's
        # vectors of 16 bytes they are on a par on x86-64, and other processors are not measured.
        # In half precision, where oneDNN has none, training is 3 to 6 times faster by ours there.
        by_library = cpu.current().level == "default" and cpu.product_dtype(q.dtype) == q.dtype
        return unmeasured if by_library else None
    row = _tuned.lookup("rope_attention", q.device, tuning_key(q, k, window))
    return row.get("backend", unmeasured)


BACKWARD = Op(
    name="rope_attention_backward",
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt window, "
        "SymInt local, SymInt spread) -> (Tensor, Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=lambda q, k, v: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    launch={"cpp": _launch_backward, "triton": triton_launch("rope_attention", "backward")},
    supported={"cpp": ON_CPU, "triton": ON_TRITON},
    samples=_samples_backward,
    workloads={name: _workload_backward(make) for name, make in WORKLOADS.items()},
    bytes=lambda q, k: 4 * q.nbytes + 4 * k.nbytes,
    flops=lambda q, k, window, local, spread: 5 * _flops(q, k, window, local, spread) // 2,
    tolerance="matrix",
    backward=no_double_backward("rope_attention"),
    bulk=("grad", "q", "k", "v", "out"),
    internal=True,
)


def _setup_context(
    ctx: Any, output: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, **window: int
) -> None:
    ctx.save_for_backward(q, k, v, *output)
    ctx.window = window.values()


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> dict[str, Tensor]:
    d_q, d_k, d_v = BACKWARD.torch_op(grad, *ctx.saved_tensors, *ctx.window)
    return {"q": d_q, "k": d_k, "v": d_v}


OP = Op(
    name="rope_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, SymInt window, SymInt local, SymInt spread) "
        "-> (Tensor, Tensor)"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch, "triton": triton_launch("rope_attention", "forward")},
    library=library,
    supported={"cpp": ON_CPU, "triton": ON_TRITON, "library": ON_BOTH},
    prefer=_prefer,
    samples=_samples,
    workloads=WORKLOADS,
    bytes=lambda q, k: 2 * q.nbytes + 2 * k.nbytes,
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
    window: AttentionWindow | None = None,
) -> Tensor:  # b nq h*d
    """Joint attention ``softmax(q k^T / sqrt(d)) v``, heads concatenated.

    Args:
        q: (b, h, nq, d) queries of the first nq <= n tokens, any float dtype, any strides, as
            :func:`qkv_rope` returns them: normalised and rotated.
        k, v: (b, h, n, d) keys and values, in the dtype of q.
        window: which keys each query sees, in time and memory linear in n; None: all.

    Returns:
        (b, nq, h * d) in the dtype of q. Differentiable once in q, k and v.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype.

    Source: FlashAttention-2 (arXiv 2307.08691) for the tiling and the backward.
    """
    if window is None:
        return OP(q, k, v, *NO_WINDOW)[0]
    size = window.size
    require(size >= 0, f"rope_attention: the window's size must be at least 0, got {size}")
    return OP(q, k, v, *window)[0]
