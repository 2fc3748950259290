"""Triton kernels of qkv_rope: one launch a stream, each writing at its token offset.

Streams differ in width and in whether they supply queries, so that one launch for all would carry
every stream's pointers through a selection; fused blocks have one stream anyway.

A group is 8 channels of one head of one token: 8 x parts contiguous elements, loaded 16 bytes at a
time by one thread and sorted into parts by splits and joins, which only rename its registers. Loads
of another width than a thread's share of a tensor would send every split through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dense, dense_rows
from ..ops.qkv_rope import RMS_NORM_EPS
from .launch import launch

_THREADS = 128
_LENGTHS = ["tokens", "offset", "nq", "n"]


@triton.jit
def _halves(x):
    """Split (t g m) into its even and its odd elements, (t g m/2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _interleave(even, odd):
    """Undo _halves."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], 2 * even.shape[2]))


@triton.jit
def _elements4(x):
    """Split (t g 4) into 4 x (t g)."""
    even, odd = _halves(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _elements8(x):
    """Split (t g 8) into 8 x (t g)."""
    even, odd = _halves(x)
    x0, x2, x4, x6 = _elements4(even)
    x1, x3, x5, x7 = _elements4(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _vector4(x0, x1, x2, x3):
    """Join 4 x (t g) to (t g 4)."""
    return _interleave(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _vector8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Join 8 x (t g) to (t g 8)."""
    return _interleave(_vector4(x0, x2, x4, x6), _vector4(x1, x3, x5, x7))


@triton.jit
def _load8(x, row, at, inside, LIMIT: tl.constexpr, FULL: tl.constexpr):
    """Load elements at .. at + 7 of each row, 0 from LIMIT on: 8 x (t g), 16 bytes a load."""
    if x.dtype.element_ty.primitive_bitwidth == 16:
        i = at + tl.arange(0, 8)[None, None, :]
        mask = inside if FULL else inside & (i < LIMIT)
        return _elements8(tl.load(x + row + i, mask=mask, other=0.0))
    else:
        i = at + tl.arange(0, 4)[None, None, :]
        mask = inside if FULL else inside & (i < LIMIT)
        x0, x1, x2, x3 = _elements4(tl.load(x + row + i, mask=mask, other=0.0))
        mask = inside if FULL else inside & (i + 4 < LIMIT)
        x4, x5, x6, x7 = _elements4(tl.load(x + row + i + 4, mask=mask, other=0.0))
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _store8(
    x, row, at, inside, LIMIT: tl.constexpr, FULL: tl.constexpr, x0, x1, x2, x3, x4, x5, x6, x7
):
    """Store what _load8 loads, in the element type of x."""
    dtype: tl.constexpr = x.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        i = at + tl.arange(0, 8)[None, None, :]
        mask = inside if FULL else inside & (i < LIMIT)
        tl.store(x + row + i, _vector8(x0, x1, x2, x3, x4, x5, x6, x7).to(dtype), mask=mask)
    else:
        i = at + tl.arange(0, 4)[None, None, :]
        mask = inside if FULL else inside & (i < LIMIT)
        tl.store(x + row + i, _vector4(x0, x1, x2, x3).to(dtype), mask=mask)
        mask = inside if FULL else inside & (i + 4 < LIMIT)
        tl.store(x + row + i + 4, _vector4(x4, x5, x6, x7).to(dtype), mask=mask)


@triton.jit
def _load_pairs(x, row, at, inside, D: tl.constexpr, FULL: tl.constexpr):
    """Load the even and the odd channels of a group, (t g 4) each."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _load8(x, row, at, inside, D, FULL)
    return _vector4(x0, x2, x4, x6), _vector4(x1, x3, x5, x7)


@triton.jit
def _store_pairs(x, row, at, inside, D: tl.constexpr, FULL: tl.constexpr, even, odd):
    """Store what _load_pairs loads."""
    x0, x2, x4, x6 = _elements4(even)
    x1, x3, x5, x7 = _elements4(odd)
    _store8(x, row, at, inside, D, FULL, x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def _load_parts(x, row, group, inside, D: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr):
    """Load a head's q, k and v, each by even and odd channels; without queries, k twice."""
    at = group * (8 * PARTS)
    a0, a1, a2, a3, a4, a5, a6, a7 = _load8(x, row, at, inside, PARTS * D, FULL)
    b0, b1, b2, b3, b4, b5, b6, b7 = _load8(x, row, at + 8, inside, PARTS * D, FULL)
    if PARTS == 3:
        c0, c1, c2, c3, c4, c5, c6, c7 = _load8(x, row, at + 16, inside, PARTS * D, FULL)
        q_even, q_odd = _vector4(a0, a6, b4, c2), _vector4(a3, b1, b7, c5)
        k_even, k_odd = _vector4(a1, a7, b5, c3), _vector4(a4, b2, c0, c6)
        v_even, v_odd = _vector4(a2, b0, b6, c4), _vector4(a5, b3, c1, c7)
        return q_even, q_odd, k_even, k_odd, v_even, v_odd
    else:
        k_even, k_odd = _vector4(a0, a4, b0, b4), _vector4(a2, a6, b2, b6)
        v_even, v_odd = _vector4(a1, a5, b1, b5), _vector4(a3, a7, b3, b7)
        return k_even, k_odd, k_even, k_odd, v_even, v_odd


@triton.jit
def _store_parts(
    x,
    row,
    group,
    inside,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    FULL: tl.constexpr,
    q_even,
    q_odd,
    k_even,
    k_odd,
    v_even,
    v_odd,
):
    """Store what _load_parts loads."""
    at = group * (8 * PARTS)
    k0, k2, k4, k6 = _elements4(k_even)
    k1, k3, k5, k7 = _elements4(k_odd)
    v0, v2, v4, v6 = _elements4(v_even)
    v1, v3, v5, v7 = _elements4(v_odd)
    if PARTS == 3:
        q0, q2, q4, q6 = _elements4(q_even)
        q1, q3, q5, q7 = _elements4(q_odd)
        _store8(x, row, at, inside, PARTS * D, FULL, q0, k0, v0, q1, k1, v1, q2, k2)
        _store8(x, row, at + 8, inside, PARTS * D, FULL, v2, q3, k3, v3, q4, k4, v4, q5)
        _store8(x, row, at + 16, inside, PARTS * D, FULL, k5, v5, q6, k6, v6, q7, k7, v7)
    else:
        _store8(x, row, at, inside, PARTS * D, FULL, k0, v0, k1, v1, k2, v2, k3, v3)
        _store8(x, row, at + 8, inside, PARTS * D, FULL, k4, v4, k5, v5, k6, v6, k7, v7)


@triton.jit
def _sum_channels(x):
    """Sum a head's channels: (t g 4) to (t 1 1)."""
    return tl.sum(tl.sum(x, 2), 1)[:, None, None]


@triton.jit
def _rotated(even, odd, w_even, w_odd, cos, sin, D: tl.constexpr, EPS: tl.constexpr):
    """Normalise and rotate a head's channels."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    inverse = tl.math.rsqrt(_sum_channels(even * even + odd * odd) / D + EPS)
    even = even * inverse * w_even
    odd = odd * inverse * w_odd
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _unrotated(
    g_even, g_odd, even, odd, w_even, w_odd, cos, sin, D: tl.constexpr, EPS: tl.constexpr
):
    """Gradients of a head's channels, and of the weight by token."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    g_even, g_odd = g_even.to(tl.float32), g_odd.to(tl.float32)
    inverse = tl.math.rsqrt(_sum_channels(even * even + odd * odd) / D + EPS)
    even = even * inverse
    odd = odd * inverse
    u_even = g_even * cos + g_odd * sin
    u_odd = g_odd * cos - g_even * sin
    dw_even = u_even * even
    dw_odd = u_odd * odd
    mean = _sum_channels(dw_even * w_even + dw_odd * w_odd) / D
    d_even = inverse * (u_even * w_even - even * mean)
    d_odd = inverse * (u_odd * w_odd - odd * mean)
    return d_even, d_odd, dw_even, dw_odd


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
    FULL: tl.constexpr = D == 8 * GROUPS
    item = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    channel = group * 8
    inside = token < tokens
    always = group < GROUPS
    row = item * stride_b + token.to(tl.int64) * stride_n
    cos, sin = _load_pairs(rope, (offset + token) * D, channel, inside, D, FULL)
    kw_even, kw_odd = _load_pairs(k_weight, 0, channel, always, D, FULL)
    qw_even, qw_odd = _load_pairs(q_weight, 0, channel, always, D, FULL)
    for i in tl.static_range(PER_PROGRAM):
        head = tl.program_id(0) * PER_PROGRAM + i
        q_even, q_odd, k_even, k_odd, v_even, v_odd = _load_parts(
            x, row + head * (PARTS * D), group, inside, D, PARTS, FULL
        )
        at = ((item * HEADS + head) * n + offset + token) * D
        _store_pairs(v, at, channel, inside, D, FULL, v_even, v_odd)
        k_even, k_odd = _rotated(k_even, k_odd, kw_even, kw_odd, cos, sin, D, EPS)
        _store_pairs(k, at, channel, inside, D, FULL, k_even, k_odd)
        if PARTS == 3:
            at = ((item * HEADS + head) * nq + offset + token) * D
            q_even, q_odd = _rotated(q_even, q_odd, qw_even, qw_odd, cos, sin, D, EPS)
            _store_pairs(q, at, channel, inside, D, FULL, q_even, q_odd)


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
    FULL: tl.constexpr = D == 8 * GROUPS
    item = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    channel = group * 8
    inside = token < tokens
    always = group < GROUPS
    row = item * stride_b + token.to(tl.int64) * stride_n
    d_row = (item * tokens + token) * (HEADS * PARTS * D)
    cos, sin = _load_pairs(rope, (offset + token) * D, channel, inside, D, FULL)
    kw_even, kw_odd = _load_pairs(k_weight, 0, channel, always, D, FULL)
    qw_even, qw_odd = _load_pairs(q_weight, 0, channel, always, D, FULL)
    dkw_even, dkw_odd = tl.zeros_like(cos), tl.zeros_like(cos)
    dqw_even, dqw_odd = tl.zeros_like(cos), tl.zeros_like(cos)
    dtype: tl.constexpr = x.dtype.element_ty
    for i in tl.static_range(PER_PROGRAM):
        head = tl.program_id(0) * PER_PROGRAM + i
        q_even, q_odd, k_even, k_odd, _, _ = _load_parts(
            x, row + head * (PARTS * D), group, inside, D, PARTS, FULL
        )
        at = ((item * HEADS + head) * n + offset + token) * D
        gv_even, gv_odd = _load_pairs(v, at, channel, inside, D, FULL)
        g_even, g_odd = _load_pairs(k, at, channel, inside, D, FULL)
        dk_even, dk_odd, even, odd = _unrotated(
            g_even, g_odd, k_even, k_odd, kw_even, kw_odd, cos, sin, D, EPS
        )
        dkw_even += even
        dkw_odd += odd
        dq_even, dq_odd = dk_even, dk_odd
        if PARTS == 3:
            at = ((item * HEADS + head) * nq + offset + token) * D
            g_even, g_odd = _load_pairs(q, at, channel, inside, D, FULL)
            dq_even, dq_odd, even, odd = _unrotated(
                g_even, g_odd, q_even, q_odd, qw_even, qw_odd, cos, sin, D, EPS
            )
            dqw_even += even
            dqw_odd += odd
        _store_parts(
            d_x,
            d_row + head * (PARTS * D),
            group,
            inside,
            D,
            PARTS,
            FULL,
            dq_even.to(dtype),
            dq_odd.to(dtype),
            dk_even.to(dtype),
            dk_odd.to(dtype),
            gv_even,
            gv_odd,
        )
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    at = (program + tl.program_id(0)) * ((PARTS - 1) * D)
    even, odd = tl.sum(dkw_even, 0, keep_dims=True), tl.sum(dkw_odd, 0, keep_dims=True)
    _store_pairs(partial, at + (PARTS - 2) * D, channel, always, D, FULL, even, odd)
    if PARTS == 3:
        even, odd = tl.sum(dqw_even, 0, keep_dims=True), tl.sum(dqw_odd, 0, keep_dims=True)
        _store_pairs(partial, at, channel, always, D, FULL, even, odd)


def _each_stream(
    qkv: Sequence[Tensor], q_weight: Sequence[Tensor], rope: Tensor, heads: int
) -> Any:
    """What each stream's launch takes: index, x with contiguous rows, offset, grid, constexprs."""
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
        yield i, dense_rows(x), offset, grid, constants
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
    grad_q, grad_k, grad_v, rope = dense(grad_q, grad_k, grad_v, rope)
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
