"""Triton kernels of qkv_rope: one launch a stream, each writing at its token offset.

Streams differ in width and in whether they supply queries, so that one launch for all would carry
every stream's pointers through a selection; fused blocks have one stream anyway.

A group is 8 channels of one head of one token: 8 x parts contiguous elements, loaded as `parts`
vectors of 8 and sorted into parts inside a thread's registers by splits and joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rope_attention import RMS_NORM_EPS
from .launch import launch

_THREADS = 128
_LENGTHS = ["tokens", "offset", "nq", "n"]


@triton.jit
def _halves(x):
    """(t g m) -> the even and the odd elements, (t g m/2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _interleave(even, odd):
    """The way back from _halves."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], 2 * even.shape[2]))


@triton.jit
def _elements4(x):
    """(t g 4) -> 4 x (t g)."""
    even, odd = _halves(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _elements8(x):
    """(t g 8) -> 8 x (t g)."""
    even, odd = _halves(x)
    x0, x2, x4, x6 = _elements4(even)
    x1, x3, x5, x7 = _elements4(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _vector4(x0, x1, x2, x3):
    """4 x (t g) -> (t g 4)."""
    return _interleave(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _vector8(x0, x1, x2, x3, x4, x5, x6, x7):
    """8 x (t g) -> (t g 8)."""
    return _interleave(_vector4(x0, x2, x4, x6), _vector4(x1, x3, x5, x7))


@triton.jit
def _sort3(a, b, c):
    """Elements 0-7, 8-15, 16-23 of (channel, {q, k, v}) to q, k, v by even and odd channels."""
    a0, a1, a2, a3, a4, a5, a6, a7 = _elements8(a)
    b0, b1, b2, b3, b4, b5, b6, b7 = _elements8(b)
    c0, c1, c2, c3, c4, c5, c6, c7 = _elements8(c)
    return (
        _vector4(a0, a6, b4, c2),
        _vector4(a3, b1, b7, c5),
        _vector4(a1, a7, b5, c3),
        _vector4(a4, b2, c0, c6),
        _vector4(a2, b0, b6, c4),
        _vector4(a5, b3, c1, c7),
    )


@triton.jit
def _unsort3(q_even, q_odd, k_even, k_odd, v_even, v_odd):
    """The way back from _sort3."""
    q0, q2, q4, q6 = _elements4(q_even)
    q1, q3, q5, q7 = _elements4(q_odd)
    k0, k2, k4, k6 = _elements4(k_even)
    k1, k3, k5, k7 = _elements4(k_odd)
    v0, v2, v4, v6 = _elements4(v_even)
    v1, v3, v5, v7 = _elements4(v_odd)
    return (
        _vector8(q0, k0, v0, q1, k1, v1, q2, k2),
        _vector8(v2, q3, k3, v3, q4, k4, v4, q5),
        _vector8(k5, v5, q6, k6, v6, q7, k7, v7),
    )


@triton.jit
def _sort2(a, b):
    """Elements 0-7, 8-15 of (channel, {k, v}) to k, v by even and odd channels."""
    a0, a1, a2, a3, a4, a5, a6, a7 = _elements8(a)
    b0, b1, b2, b3, b4, b5, b6, b7 = _elements8(b)
    return (
        _vector4(a0, a4, b0, b4),
        _vector4(a2, a6, b2, b6),
        _vector4(a1, a5, b1, b5),
        _vector4(a3, a7, b3, b7),
    )


@triton.jit
def _unsort2(k_even, k_odd, v_even, v_odd):
    """The way back from _sort2."""
    k0, k2, k4, k6 = _elements4(k_even)
    k1, k3, k5, k7 = _elements4(k_odd)
    v0, v2, v4, v6 = _elements4(v_even)
    v1, v3, v5, v7 = _elements4(v_odd)
    return (
        _vector8(k0, v0, k1, v1, k2, v2, k3, v3),
        _vector8(k4, v4, k5, v5, k6, v6, k7, v7),
    )


@triton.jit
def _inverse_rms(even, odd, D: tl.constexpr, EPS: tl.constexpr):
    """(t 1 1) from a head's channels, float32."""
    squares = tl.sum(tl.sum(even * even + odd * odd, 2), 1)
    return tl.math.rsqrt(squares / D + EPS)[:, None, None]


@triton.jit
def _load_sorted(x, at, mask2, mask1, mask0, PARTS: tl.constexpr):
    """A head's parts by even and odd channels; those of k again for q where there is no q."""
    if PARTS == 3:
        a = tl.load(x + at, mask=mask0, other=0.0)
        b = tl.load(x + at + 8, mask=mask1, other=0.0)
        c = tl.load(x + at + 16, mask=mask2, other=0.0)
        q_even, q_odd, k_even, k_odd, v_even, v_odd = _sort3(a, b, c)
        return q_even, q_odd, k_even, k_odd, v_even, v_odd
    else:
        a = tl.load(x + at, mask=mask0, other=0.0)
        b = tl.load(x + at + 8, mask=mask1, other=0.0)
        k_even, k_odd, v_even, v_odd = _sort2(a, b)
        return k_even, k_odd, k_even, k_odd, v_even, v_odd


@triton.jit
def _rotated(even, odd, w_even, w_odd, cos, sin, D: tl.constexpr, EPS: tl.constexpr):
    """Norm and rotation of a head: (t g 8) float32."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    inverse = _inverse_rms(even, odd, D, EPS)
    even = even * inverse * w_even
    odd = odd * inverse * w_odd
    return _interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    x,
    q_weight,
    k_weight,
    rope,
    q,
    k,
    v,
    tokens,
    offset,
    nq,
    n,
    stride_b,
    stride_n,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Heads [PER_PROGRAM i, ...) of TOKENS tokens of one item."""
    item = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    channel = group * 8 + lane
    inside = token < tokens
    if D == 8 * GROUPS:
        whole = inside
        mask0, mask1, mask2 = inside, inside, inside
    else:
        whole = inside & (channel < D)
        first = group * (8 * PARTS) + lane
        mask0 = inside & (first < PARTS * D)
        mask1 = inside & (first + 8 < PARTS * D)
        mask2 = inside & (first + 16 < PARTS * D)
    row = item * stride_b + token.to(tl.int64) * stride_n + group * (8 * PARTS) + lane
    cos, sin = _halves(tl.load(rope + (offset + token) * D + channel, mask=whole, other=0.0))
    k_even, k_odd = _halves(tl.load(k_weight + channel, mask=channel < D, other=0.0))
    q_even, q_odd = _halves(tl.load(q_weight + channel, mask=channel < D, other=0.0))
    for i in tl.static_range(PER_PROGRAM):
        head = tl.program_id(0) * PER_PROGRAM + i
        xq_even, xq_odd, xk_even, xk_odd, v_even, v_odd = _load_sorted(
            x, row + head * (PARTS * D), mask2, mask1, mask0, PARTS
        )
        joint = item * HEADS + head
        at = (joint * n + offset + token) * D + channel
        tl.store(v + at, _interleave(v_even, v_odd), mask=whole)
        out = _rotated(xk_even, xk_odd, k_even, k_odd, cos, sin, D, EPS)
        tl.store(k + at, out.to(k.dtype.element_ty), mask=whole)
        if PARTS == 3:
            out = _rotated(xq_even, xq_odd, q_even, q_odd, cos, sin, D, EPS)
            at = (joint * nq + offset + token) * D + channel
            tl.store(q + at, out.to(q.dtype.element_ty), mask=whole)


@triton.jit
def _unrotated(grad, even, odd, w_even, w_odd, cos, sin, D: tl.constexpr, EPS: tl.constexpr):
    """Gradients of a head's channels, even and odd, and of the weight by token."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    g_even, g_odd = _halves(grad.to(tl.float32))
    inverse = _inverse_rms(even, odd, D, EPS)
    even = even * inverse
    odd = odd * inverse
    u_even = g_even * cos + g_odd * sin
    u_odd = g_odd * cos - g_even * sin
    dw_even = u_even * even
    dw_odd = u_odd * odd
    mean = tl.sum(tl.sum(dw_even * w_even + dw_odd * w_odd, 2), 1)[:, None, None] / D
    d_even = inverse * (u_even * w_even - even * mean)
    d_odd = inverse * (u_odd * w_odd - odd * mean)
    return d_even, d_odd, dw_even, dw_odd


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    x,
    q_weight,
    k_weight,
    rope,
    q,
    k,
    v,
    d_x,
    partial,
    tokens,
    offset,
    nq,
    n,
    stride_b,
    stride_n,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """As _forward; q, k, v are the outputs' gradients, partial takes (program, parts - 1, d)."""
    item = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    channel = group * 8 + lane
    first = group * (8 * PARTS) + lane
    inside = token < tokens
    if D == 8 * GROUPS:
        whole = inside
        mask0, mask1, mask2 = inside, inside, inside
    else:
        whole = inside & (channel < D)
        mask0 = inside & (first < PARTS * D)
        mask1 = inside & (first + 8 < PARTS * D)
        mask2 = inside & (first + 16 < PARTS * D)
    row = item * stride_b + token.to(tl.int64) * stride_n + first
    d_row = (item * tokens + token) * (HEADS * PARTS * D) + first
    cos, sin = _halves(tl.load(rope + (offset + token) * D + channel, mask=whole, other=0.0))
    k_even, k_odd = _halves(tl.load(k_weight + channel, mask=channel < D, other=0.0))
    q_even, q_odd = _halves(tl.load(q_weight + channel, mask=channel < D, other=0.0))
    sum_k_even = tl.zeros_like(cos)
    sum_k_odd = tl.zeros_like(cos)
    sum_q_even = tl.zeros_like(cos)
    sum_q_odd = tl.zeros_like(cos)
    for i in tl.static_range(PER_PROGRAM):
        head = tl.program_id(0) * PER_PROGRAM + i
        xq_even, xq_odd, xk_even, xk_odd, v_even, v_odd = _load_sorted(
            x, row + head * (PARTS * D), mask2, mask1, mask0, PARTS
        )
        joint = item * HEADS + head
        at = (joint * n + offset + token) * D + channel
        gv_even, gv_odd = _halves(tl.load(v + at, mask=whole, other=0.0))
        grad = tl.load(k + at, mask=whole, other=0.0)
        dk_even, dk_odd, dw_even, dw_odd = _unrotated(
            grad, xk_even, xk_odd, k_even, k_odd, cos, sin, D, EPS
        )
        sum_k_even += dw_even
        sum_k_odd += dw_odd
        out = d_x + d_row + head * (PARTS * D)
        dtype: tl.constexpr = d_x.dtype.element_ty
        if PARTS == 3:
            at = (joint * nq + offset + token) * D + channel
            grad = tl.load(q + at, mask=whole, other=0.0)
            dq_even, dq_odd, dw_even, dw_odd = _unrotated(
                grad, xq_even, xq_odd, q_even, q_odd, cos, sin, D, EPS
            )
            sum_q_even += dw_even
            sum_q_odd += dw_odd
            a, b, c = _unsort3(
                dq_even.to(dtype),
                dq_odd.to(dtype),
                dk_even.to(dtype),
                dk_odd.to(dtype),
                gv_even,
                gv_odd,
            )
            tl.store(out, a, mask=mask0)
            tl.store(out + 8, b, mask=mask1)
            tl.store(out + 16, c, mask=mask2)
        else:
            a, b = _unsort2(dk_even.to(dtype), dk_odd.to(dtype), gv_even, gv_odd)
            tl.store(out, a, mask=mask0)
            tl.store(out + 8, b, mask=mask1)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    sums = partial + (program + tl.program_id(0)) * ((PARTS - 1) * D) + channel
    if PARTS == 3:
        total = tl.sum(_interleave(sum_q_even, sum_q_odd), 0)
        tl.store(sums, total[None, :, :], mask=channel < D)
    total = tl.sum(_interleave(sum_k_even, sum_k_odd), 0)
    tl.store(sums + (PARTS - 2) * D, total[None, :, :], mask=channel < D)


def _each_stream(
    qkv: Sequence[Tensor], q_weight: Sequence[Tensor], rope: Tensor, heads: int
) -> Any:
    """(index, x, token offset, grid, constexprs) of each stream; x with contiguous rows."""
    d = rope.shape[1]
    groups = triton.next_power_of_2(triton.cdiv(d, 8))
    tokens = max(_THREADS // groups, 1)  # a thread holds a group
    per_program = 2 if heads % 2 == 0 else 1  # heads that share a load of rope
    offset = 0
    for i, x in enumerate(qkv):
        b, n, width = x.shape
        constants = {
            "HEADS": heads,
            "D": d,
            "PARTS": width // (heads * d),
            "EPS": RMS_NORM_EPS,
            "TOKENS": tokens,
            "GROUPS": groups,
            "PER_PROGRAM": per_program,
        }
        grid = (heads // per_program, triton.cdiv(n, tokens), b)
        yield i, x if x.stride(2) == 1 else x.contiguous(), offset, grid, constants
        offset += n


def forward(
    out: tuple[Tensor, Tensor, Tensor],
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    rope: Tensor,
    heads: int,
) -> None:
    q, k, v = out
    rope = rope.contiguous()
    if not len(qkv[0]):
        return
    for i, x, offset, grid, constants in _each_stream(qkv, q_weight, rope, heads):
        launch(
            _forward,
            grid,
            x,
            q_weight[i].contiguous(),
            k_weight[i].contiguous(),
            rope,
            q,
            k,
            v,
            x.shape[1],
            offset,
            q.shape[2],
            k.shape[2],
            x.stride(0),
            x.stride(1),
            **constants,
            num_warps=_THREADS // 32,
        )


def backward(
    out: Sequence[Tensor],
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    rope: Tensor,
    heads: int,
) -> None:
    count = len(qkv)
    d_qkv, d_q_weight, d_k_weight = out[:count], out[count : 2 * count], out[2 * count :]
    grad_q, grad_k, grad_v = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    rope = rope.contiguous()
    if not len(qkv[0]):
        for grad in (*d_q_weight, *d_k_weight):
            grad.zero_()
        return
    for i, x, offset, grid, constants in _each_stream(qkv, q_weight, rope, heads):
        programs = grid[0] * grid[1] * grid[2]
        partial = rope.new_empty(programs, constants["PARTS"] - 1, rope.shape[1])
        launch(
            _backward,
            grid,
            x,
            q_weight[i].contiguous(),
            k_weight[i].contiguous(),
            rope,
            grad_q,
            grad_k,
            grad_v,
            d_qkv[i],
            partial,
            x.shape[1],
            offset,
            grad_q.shape[2],
            grad_k.shape[2],
            x.stride(0),
            x.stride(1),
            **constants,
            num_warps=_THREADS // 32,
        )
        # torch's sum over one dimension adds in an order that the shape alone decides.
        torch.sum(partial[:, -1], 0, out=d_k_weight[i])
        if constants["PARTS"] == 3:
            torch.sum(partial[:, 0], 0, out=d_q_weight[i])
        else:
            d_q_weight[i].zero_()
