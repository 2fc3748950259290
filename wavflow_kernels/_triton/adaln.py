"""Triton kernels of adaln; with GATED they serve gated_residual_adaln.

A row of channels lives in the registers of one program: sums over it are shuffles within a few
warps, and every tensor is read once. Rows of shift, scale and gate that neighbouring tokens share
come from the first-level cache, since one program takes those tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dense, dense_rows
from .launch import launch

_SIZES = ["batch_tokens", "tokens", "rows", "gate_rows", "splits", "parts", "groups"]


@triton.jit
def _row_of(index, token, rows):
    # A row out of range would be read: the reference raises there, this reads a wrong row.
    return tl.minimum(tl.maximum(tl.load(index + token), 0), rows - 1).to(tl.int64)


@triton.jit
def _normalise(x, mask, C: tl.constexpr, EPS: tl.constexpr):
    mean = tl.sum(x, 0) / C
    centred = tl.where(mask, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / C + EPS)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x,
    y,
    gate,
    gate_index,
    shift,
    scale,
    index,
    new,
    out,
    batch_tokens,
    tokens,
    gate_rows,
    rows,
    gate_batch,
    gate_row,
    shift_batch,
    shift_row,
    scale_batch,
    scale_row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    first = tl.program_id(0) * TOKENS
    for i in range(tl.minimum(TOKENS, batch_tokens - first)):
        at = first + i
        item = (at // tokens).to(tl.int64)
        token = at % tokens
        here = at.to(tl.int64) * C + columns
        row = 0
        if ROWS:
            row = _row_of(index, token, rows)
        scales = tl.load(scale + item * scale_batch + row * scale_row + columns, mask, other=0.0)
        shifts = tl.load(shift + item * shift_batch + row * shift_row + columns, mask, other=0.0)
        values = tl.load(x + here, mask, other=0.0).to(tl.float32)
        if GATED:
            gated_by = 0
            if GATE_ROWS:
                gated_by = _row_of(gate_index, token, gate_rows)
            gates = tl.load(
                gate + item * gate_batch + gated_by * gate_row + columns, mask, other=0.0
            )
            added = tl.load(y + here, mask, other=0.0).to(tl.float32)
            values += gates.to(tl.float32) * added
            tl.store(new + here, values.to(new.dtype.element_ty), mask)
        normed, _ = _normalise(values, mask, C, EPS)
        result = normed * (1.0 + scales.to(tl.float32)) + shifts.to(tl.float32)
        tl.store(out + here, result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_new,
    grad,
    x,
    y,
    gate,
    gate_index,
    scale,
    offsets,
    d_x,
    d_y,
    d_new,
    d_gate,
    d_shift,
    d_scale,
    tokens,
    rows,
    splits,
    gate_rows,
    gate_batch,
    gate_row,
    scale_batch,
    scale_row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER_GATE: tl.constexpr,
):
    # One program takes one of `splits` parts of one row's tokens, and writes its part of the sums.
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    part = tl.program_id(0)
    row = part // splits % rows
    item = (part // splits // rows).to(tl.int64)
    begin = 0
    end = tokens
    if ROWS:
        begin = tl.maximum(tl.load(offsets + row), 0)
        end = tl.minimum(tl.load(offsets + row + 1), tokens)
    row = row.to(tl.int64)
    share = tl.cdiv(end - begin, splits)
    begin += part % splits * share
    end = tl.minimum(begin + share, end)
    scales = tl.load(scale + item * scale_batch + row * scale_row + columns, mask, other=0.0)
    scales = 1.0 + scales.to(tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    if GATED:
        gate_sum = tl.zeros([BLOCK], tl.float32)
        gates = tl.zeros([BLOCK], tl.float32)
        if not GATHER_GATE:
            gates = tl.load(gate + item * gate_batch + row * gate_row + columns, mask, other=0.0)
            gates = gates.to(tl.float32)
    for token in range(begin, end):
        here = (item * tokens + token) * C + columns
        values = tl.load(x + here, mask, other=0.0).to(tl.float32)
        grads = tl.load(grad + here, mask, other=0.0).to(tl.float32)
        if GATED:
            if GATHER_GATE:
                gated_by = _row_of(gate_index, token, gate_rows)
                gates = tl.load(
                    gate + item * gate_batch + gated_by * gate_row + columns, mask, other=0.0
                ).to(tl.float32)
            added = tl.load(y + here, mask, other=0.0).to(tl.float32)
            values += gates * added
        normed, inverse = _normalise(values, mask, C, EPS)
        shift_sum += grads
        scale_sum += grads * normed
        modulated = grads * scales
        along = tl.sum(modulated * normed, 0) / C
        d = inverse * (modulated - tl.sum(modulated, 0) / C - normed * along)
        if GATED:
            d += tl.load(grad_new + here, mask, other=0.0).to(tl.float32)
            tl.store(d_y + here, (d * gates).to(d_y.dtype.element_ty), mask)
            if GATHER_GATE:
                tl.store(d_new + here, d, mask)
            else:
                gate_sum += d * added
        tl.store(d_x + here, d.to(d_x.dtype.element_ty), mask)
    at = part.to(tl.int64) * C + columns
    tl.store(d_shift + at, shift_sum.to(d_shift.dtype.element_ty), mask)
    tl.store(d_scale + at, scale_sum.to(d_scale.dtype.element_ty), mask)
    if GATED and not GATHER_GATE:
        tl.store(d_gate + at, gate_sum.to(d_gate.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(parts_in, out, parts, C: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    # (groups, parts, C) to (groups, C), in the order of the parts.
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < C
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (group * parts + part[:, None]) * C + columns
        total += tl.load(parts_in + at, (part[:, None] < parts) & mask, other=0.0)
    result = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + group * C + columns, result, mask)


@triton.jit(do_not_specialize=_SIZES)
def _gate_kernel(
    d_new,
    y,
    offsets,
    d_gate,
    tokens,
    gate_rows,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Sums of d_new * y over the tokens of each row.
    row = tl.program_id(0) % gate_rows
    item = (tl.program_id(0) // gate_rows).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < C
    begin = tl.maximum(tl.load(offsets + row), 0)
    end = tl.minimum(tl.load(offsets + row + 1), tokens)
    total = tl.zeros([COLUMNS], tl.float32)
    for token in range(begin, end):
        here = (item * tokens + token) * C + columns
        values = tl.load(d_new + here, mask, other=0.0)
        total += values * tl.load(y + here, mask, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * C + columns
    tl.store(d_gate + at, total.to(d_gate.dtype.element_ty), mask)


def _strides(table: Tensor, index: Tensor | None) -> tuple[int, int]:
    """Strides of batch and row; without an index all rows are row 0."""
    return table.stride(0), 0 if index is None else table.stride(1)


def gated_forward(
    outs: tuple[Tensor | None, Tensor],
    /,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gate_index: Tensor | None = None,
    **_: Any,
) -> None:
    """Fill (new, out); y, gate and new are None in adaln."""
    if not x.numel():
        return
    b, n, c = x.shape
    shift, scale = dense_rows(shift), dense_rows(scale)
    x, y = dense(x, y)
    gate = None if gate is None else dense_rows(gate)
    block = triton.next_power_of_2(c)
    # Tokens that share rows come together once there are programs enough to fill a GPU.
    count = 4 if b * n >= 8192 else 1
    launch(
        _forward_kernel,
        (triton.cdiv(b * n, count),),
        x,
        y,
        gate,
        gate_index,
        shift,
        scale,
        index,
        *outs,
        b * n,
        n,
        0 if gate is None else gate.shape[1],
        shift.shape[1],
        *((0, 0) if gate is None else _strides(gate, gate_index)),
        *_strides(shift, index),
        *_strides(scale, index),
        num_warps=min(max(block // 1024, 1), 8),
        C=c,
        BLOCK=block,
        TOKENS=count,
        EPS=eps,
        GATED=y is not None,
        GATE_ROWS=gate_index is not None,
        ROWS=index is not None,
    )


def _sum_parts(parts: Tensor, out: Tensor) -> None:
    """Fill out (b r c) with sums of parts (b * splits, c): those of a row are neighbours."""
    groups, c = out.shape[0] * out.shape[1], out.shape[2]
    launch(
        _sum_kernel,
        (groups, triton.cdiv(c, 64)),
        parts,
        out,
        parts.shape[0] // groups,
        C=c,
        PARTS=32,
        COLUMNS=64,
    )


def gated_backward(
    outs: Sequence[Any],
    /,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    grad_new: Tensor | None = None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gate_index: Tensor | None = None,
    gate_offsets: Tensor | None = None,
) -> None:
    """Fill (d_x, d_y, d_gate, d_shift, d_scale); in adaln all of the gate and of y are None.

    Programs follow the rows of shift and scale, or those of the gate where shift and scale have
    but one. A tensor whose rows they follow gets its gradient from one program or a few, one that
    has one row for all tokens from all programs of an item. What is left, a gate with rows of its
    own beside those of shift and scale, is summed by a second kernel.
    """
    if not x.numel():
        return
    b, n, c = x.shape
    d_x, d_y, d_gate, d_shift, d_scale = outs
    scale = dense_rows(scale)
    grad, x, grad_new, y = dense(grad, x, grad_new, y)
    gate = None if gate is None else dense_rows(gate)
    follows_gate = index is None and gate_index is not None
    own_gate = gate_index is not None and index is not None and gate_index is not index
    rows = gate.shape[1] if follows_gate and gate is not None else scale.shape[1]
    # Long rows are split: some 1024 programs if there are tokens for them, of 4 to 32 tokens.
    share = min(max(b * n // 1024, 4), 32)
    splits = max(n // (rows * share), 1)
    programs = b * rows * splits

    def sums_of(gradient: Tensor) -> Tensor:
        """Where the programs write: the gradient itself if each writes all of one row."""
        if gradient.shape[0] * gradient.shape[1] == programs:
            return gradient
        return x.new_empty(programs, c, dtype=torch.float32)

    shift_sums, scale_sums = sums_of(d_shift), sums_of(d_scale)
    gate_sums = None if d_gate is None or own_gate else sums_of(d_gate)
    d_new = x.new_empty(x.shape, dtype=torch.float32) if own_gate else None
    block = triton.next_power_of_2(c)
    launch(
        _backward_kernel,
        (programs,),
        grad_new,
        grad,
        x,
        y,
        gate,
        gate_index,
        scale,
        gate_offsets if follows_gate else offsets,
        d_x,
        d_y,
        d_new,
        gate_sums,
        shift_sums,
        scale_sums,
        n,
        rows,
        splits,
        0 if gate is None else gate.shape[1],
        *((0, 0) if gate is None else _strides(gate, gate_index)),
        *_strides(scale, index),
        num_warps=min(max(block // (256 if y is not None else 512), 1), 16),
        C=c,
        BLOCK=block,
        EPS=eps,
        GATED=y is not None,
        ROWS=follows_gate or index is not None,
        GATHER_GATE=own_gate,
    )
    for sums, gradient in ((shift_sums, d_shift), (scale_sums, d_scale), (gate_sums, d_gate)):
        if sums is not None and gradient is not None and sums is not gradient:
            _sum_parts(sums, gradient)
    if own_gate and d_gate is not None and gate is not None:
        launch(
            _gate_kernel,
            (b * gate.shape[1], triton.cdiv(c, 512)),
            d_new,
            y,
            gate_offsets,
            d_gate,
            n,
            gate.shape[1],
            C=c,
            COLUMNS=512,
        )


def forward(out: Tensor, /, **arguments: Any) -> None:
    gated_forward((None, out), **arguments)


def backward(outs: tuple[Tensor, Tensor, Tensor], /, **arguments: Any) -> None:
    d_x, d_shift, d_scale = outs
    gated_backward((d_x, None, None, d_shift, d_scale), **arguments)
