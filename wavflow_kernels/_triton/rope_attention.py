"""Flash attention: online softmax over key blocks; backward by two kernels without atomics.

Every program owns BLOCK_M rows (queries, or keys in the kernel of dK and dV) and visits blocks of
BLOCK_N rows of the other axis, first those that all its rows see in full, then the edges, masked.
Logarithms are to base 2 inside, with log2(e) folded into the scale of the scores.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tuned
from .._launch import dense_rows
from ..ops.rope_attention import tuning_key
from .launch import capability, launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PRECISION = tl.constexpr("tf32x3")  # of float32 products
MAX_HEAD_DIM = 256
CLOCK = ["reach", "local", "paced", "unit", "apart", "span"]  # of a window: see _window


@triton.jit
def _load(base, stride, start, size, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
          MASK: tl.constexpr):  # fmt: skip
    """Load rows start .. start + ROWS of a (size D) matrix, 0 beyond D and, with MASK, size."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (rows * stride + cols)
    if MASK:
        return tl.load(at, mask=(start + rows < size) & (cols < D), other=0.0)
    elif COLS == D:
        return tl.load(at)
    else:
        return tl.load(at, mask=cols < D, other=0.0)


@triton.jit
def _store(base, stride, start, size, x, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    at = base + tl.cast(start, tl.int64) * stride + (rows * stride + cols)
    tl.store(at, x.to(base.dtype.element_ty), mask=(start + rows < size) & (cols < D))


@triton.jit
def _clock(token, window):
    """The place of a token on the common clock, in the type of the window's units."""
    _, local, _, unit, apart = window
    later = token >= local
    return (token - tl.where(later, local, 0)) * tl.where(later, apart, unit)


@triton.jit
def _near(low, high, size, window):
    """Tokens from the window's reach before token `low` to as much past `high`, of `size`.

    Returns begin and end of the first stream's, then of the spread one's.
    """
    reach, local, paced, unit, apart = window
    low = tl.maximum(_clock(low, window) - reach, 0)
    high = _clock(high, window) + reach
    begin = tl.minimum(tl.cdiv(low, unit), local).to(tl.int32)
    end = tl.minimum(high // unit + 1, local).to(tl.int32)
    later = tl.minimum(local + tl.cdiv(low, apart), paced).to(tl.int32)
    later_end = tl.minimum(local + high // apart + 1, paced).to(tl.int32)
    return (tl.minimum(begin, size), tl.minimum(end, size), tl.minimum(later, size),
            tl.minimum(later_end, size))  # fmt: skip


@triton.jit
def _after(done, begin, end, BLOCK: tl.constexpr):
    """The blocks, `done` or later, that hold the tokens [begin, end): first and end."""
    end_at = tl.where(begin < end, tl.maximum(tl.cdiv(end, BLOCK), done), done)
    return tl.minimum(tl.maximum(begin // BLOCK, done), end_at), end_at


@triton.jit
def _visits(first, last, size, window, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks of the other axis, of `size` rows, the rows first .. last see.

    Returns their bounds, how many are seen in full, and how many in part. With a window they are
    [near, near_end), in full from `inner` to `inner_end`, then from `spread` to `spread_end`, and
    from `rest` on.
    """
    if WINDOW:
        _, local, paced, _, _ = window
        begin, end, later, later_end = _near(first, last, size, window)
        inner, inner_end, _, _ = _near(last, first, size, window)
        # Rows of several streams visit all that there is, in part; those past the paced in full.
        mixed = (last >= paced) | ((first < local) & (last >= local))
        begin, end = tl.where(mixed, 0, begin), tl.where(mixed, size, end)
        inner = tl.where(mixed, 0, inner)
        inner_end = tl.where(mixed, tl.where(first >= paced, size, 0), inner_end)
        near, near_end = _after(0, begin, end, BLOCK)
        inner = tl.minimum(tl.maximum(tl.cdiv(inner, BLOCK), near), near_end)
        inner_end = tl.maximum(tl.minimum(inner_end // BLOCK, near_end), inner)
        spread, spread_end = _after(near_end, later, tl.where(mixed, later, later_end), BLOCK)
        rest, rest_end = _after(spread_end, tl.where(mixed, size, paced), size, BLOCK)
        whole = inner_end - inner
        part = near_end - near - whole + spread_end - spread + rest_end - rest
        return (near, inner, inner_end, near_end, spread, spread_end, rest), whole, part
    else:
        full = size // BLOCK
        return (full,), full, tl.cdiv(size, BLOCK) - full


@triton.jit
def _visit(t, bounds, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """The t-th of the blocks seen in full or, with MASK, of those seen in part."""
    if WINDOW:
        near, inner, inner_end, near_end, spread, spread_end, rest = bounds
        if MASK:
            at = near + t
            at += tl.where(at >= inner, inner_end - inner, 0)
            at += tl.where(at >= near_end, spread - near_end, 0)
            return at + tl.where(at >= spread_end, rest - spread_end, 0)
        else:
            return inner + t
    else:
        return t + bounds[0] if MASK else t


@triton.jit
def _seen(rows, cols, window):
    """Whether tokens see each other: near on the clock, or either past the paced ones."""
    distance = tl.abs(_clock(rows, window)[:, None] - _clock(cols, window)[None, :])
    return (distance <= window[0]) | (rows >= window[2])[:, None] | (cols >= window[2])[None, :]


@triton.jit
def _attend(t, bounds, q, first, state, keys, values, key_stride, value_stride, n, window,
            D: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """One step of the online softmax: state is (weighted values, sums, maxima) of the rows."""
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    acc, total, top = state
    start = _visit(t, bounds, WINDOW, MASK) * BLOCK_N
    k = _load(keys, key_stride, start, n, D, BLOCK_N, COLS, MASK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        cols = start + tl.arange(0, BLOCK_N)
        seen = (cols < n)[None, :]
        if WINDOW:
            seen = seen & _seen(first + tl.arange(0, BLOCK_M), cols, window)
        scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)
    # Rows that have seen no key yet: -inf less -inf would be NaN.
    base = tl.where(new_top == -float("inf"), 0.0, new_top) if WINDOW and MASK else new_top
    weights = tl.exp2(scores * SCALE - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    v = _load(values, value_stride, start, n, D, BLOCK_N, COLS, MASK)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["nq", "n", *CLOCK])
def _forward(q, k, v, out, lse, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, nq, n, reach, local,
             paced, unit, apart, span, HEADS: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(nq, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    item = tl.program_id(0) // blocks
    b = (item // HEADS).to(tl.int64)
    h = (item % HEADS).to(tl.int64)
    keys = k + b * k_b + h * k_h
    values = v + b * v_b + h * v_h
    queries = _load(q + b * q_b + h * q_h, q_n, first, nq, D, BLOCK_M, COLS, True)
    last = tl.minimum(first + BLOCK_M, nq) - 1
    window = (reach, local, paced, unit.to(span.dtype), apart.to(span.dtype))
    bounds, whole, part = _visits(first, last, n, window, WINDOW, BLOCK_N)
    acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for t in tl.range(whole):
        acc, total, top = _attend(
            t, bounds, queries, first, (acc, total, top), keys, values, k_n, v_n, n,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, False,
        )  # fmt: skip
    for t in tl.range(part):
        acc, total, top = _attend(
            t, bounds, queries, first, (acc, total, top), keys, values, k_n, v_n, n,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, True,
        )  # fmt: skip
    heads = out + (b * nq * HEADS + h) * D
    _store(heads, HEADS * D, first, nq, acc / total[:, None], D, BLOCK_M, COLS)
    rows = first + tl.arange(0, BLOCK_M)
    logs = (top + tl.log2(total)) * LN_2
    tl.store(lse + item.to(tl.int64) * nq + rows, logs, mask=rows < nq)


@triton.jit
def _step_dq(t, bounds, dq, q, grad, lse, delta, first, keys, values, key_stride, value_stride, n,
             window, D: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    start = _visit(t, bounds, WINDOW, MASK) * BLOCK_N
    k = _load(keys, key_stride, start, n, D, BLOCK_N, COLS, MASK)
    v = _load(values, value_stride, start, n, D, BLOCK_N, COLS, MASK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights = tl.exp2(scores * SCALE - lse[:, None])
    if MASK:
        cols = start + tl.arange(0, BLOCK_N)
        seen = (cols < n)[None, :]
        if WINDOW:
            seen = seen & _seen(first + tl.arange(0, BLOCK_M), cols, window)
        weights = tl.where(seen, weights, 0.0)
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["nq", "n", *CLOCK])
def _backward_q(grad, q, k, v, out, lse, delta, dq, g_b, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b,
                v_h, v_n, nq, n, reach, local, paced, unit, apart, span, HEADS: tl.constexpr,
                D: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                WINDOW: tl.constexpr):  # fmt: skip
    """Write dQ, and delta = rowsum(grad * out) for the other kernel."""
    blocks = tl.cdiv(nq, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b = item // HEADS
    h = item % HEADS
    heads = (b * nq * HEADS + h) * D
    outs = _load(out + heads, HEADS * D, first, nq, D, BLOCK_M, COLS, True)
    grads = _load(grad + b * g_b + h * D, g_n, first, nq, D, BLOCK_M, COLS, True)
    rows = first + tl.arange(0, BLOCK_M)
    deltas = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + item * nq + rows, deltas, mask=rows < nq)
    logs = tl.load(lse + item * nq + rows, mask=rows < nq, other=float("inf")) * LOG2_E
    queries = _load(q + b * q_b + h * q_h, q_n, first, nq, D, BLOCK_M, COLS, True)
    keys = k + b * k_b + h * k_h
    values = v + b * v_b + h * v_h
    last = tl.minimum(first + BLOCK_M, nq) - 1
    window = (reach, local, paced, unit.to(span.dtype), apart.to(span.dtype))
    bounds, whole, part = _visits(first, last, n, window, WINDOW, BLOCK_N)
    acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    for t in tl.range(whole):
        acc = _step_dq(
            t, bounds, acc, queries, grads, logs, deltas, first, keys, values, k_n, v_n, n,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, False,
        )  # fmt: skip
    for t in tl.range(part):
        acc = _step_dq(
            t, bounds, acc, queries, grads, logs, deltas, first, keys, values, k_n, v_n, n,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, True,
        )  # fmt: skip
    _store(dq + item * nq * D, D, first, nq, acc * D**-0.5, D, BLOCK_M, COLS)


@triton.jit
def _step_dkv(t, bounds, dk, dv, k, v, first, queries, grads, lse, delta, query_stride,
              grad_stride, nq, window, D: tl.constexpr, COLS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
              MASK: tl.constexpr):  # fmt: skip
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    start = _visit(t, bounds, WINDOW, MASK) * BLOCK_N
    q = _load(queries, query_stride, start, nq, D, BLOCK_N, COLS, MASK)
    rows = start + tl.arange(0, BLOCK_N)
    if MASK:  # queries that do not exist get no weight
        logs = tl.load(lse + rows, mask=rows < nq, other=float("inf")) * LOG2_E
        deltas = tl.load(delta + rows, mask=rows < nq, other=0.0)
    else:
        logs = tl.load(lse + rows) * LOG2_E
        deltas = tl.load(delta + rows)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    weights = tl.exp2(scores * SCALE - logs[None, :])
    if WINDOW and MASK:
        seen = _seen(first + tl.arange(0, BLOCK_M), rows, window)
        weights = tl.where(seen, weights, 0.0)
    grad = _load(grads, grad_stride, start, nq, D, BLOCK_N, COLS, MASK)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    d_scores = weights * (d_weights - deltas[None, :])
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["nq", "n", *CLOCK])
def _backward_kv(grad, q, k, v, lse, delta, dk, dv, g_b, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b,
                 v_h, v_n, nq, n, reach, local, paced, unit, apart, span, HEADS: tl.constexpr,
                 D: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 WINDOW: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b = item // HEADS
    h = item % HEADS
    keys = _load(k + b * k_b + h * k_h, k_n, first, n, D, BLOCK_M, COLS, True)
    values = _load(v + b * v_b + h * v_h, v_n, first, n, D, BLOCK_M, COLS, True)
    queries = q + b * q_b + h * q_h
    grads = grad + b * g_b + h * D
    lse += item * nq
    delta += item * nq
    last = tl.minimum(first + BLOCK_M, n) - 1
    window = (reach, local, paced, unit.to(span.dtype), apart.to(span.dtype))
    bounds, whole, part = _visits(first, last, nq, window, WINDOW, BLOCK_N)
    acc_k = tl.zeros((BLOCK_M, COLS), tl.float32)
    acc_v = tl.zeros((BLOCK_M, COLS), tl.float32)
    for t in tl.range(whole):
        acc_k, acc_v = _step_dkv(
            t, bounds, acc_k, acc_v, keys, values, first, queries, grads, lse, delta, q_n, g_n, nq,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, False,
        )  # fmt: skip
    for t in tl.range(part):
        acc_k, acc_v = _step_dkv(
            t, bounds, acc_k, acc_v, keys, values, first, queries, grads, lse, delta, q_n, g_n, nq,
            window, D, COLS, BLOCK_M, BLOCK_N, WINDOW, True,
        )  # fmt: skip
    _store(dk + item * n * D, D, first, n, acc_k * D**-0.5, D, BLOCK_M, COLS)
    _store(dv + item * n * D, D, first, n, acc_v, D, BLOCK_M, COLS)


Config = dict[str, int]

# Bytes of shared memory that a program may use, by compute capability; 99 KiB elsewhere.
SHARED = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
}
# {generation: {(bytes an item, columns): (block_m, block_n, num_warps, num_stages)}}: tiles that
# fit the registers. Three products stand for one of float32, and its tiles are small.
Table = dict[int, dict[tuple[int, int], tuple[int, int, int, int]]]
FORWARD: Table = {
    8: {
        (2, 32): (128, 64, 4, 4),
        (2, 64): (128, 32, 4, 3),
        (2, 128): (128, 64, 8, 2),
        (4, 32): (32, 32, 8, 2),
        (4, 64): (32, 32, 8, 2),
        (4, 128): (16, 32, 8, 1),
    },
    9: {
        (2, 32): (128, 128, 8, 3),
        (2, 64): (128, 128, 8, 3),
        (2, 128): (128, 64, 8, 3),
        (4, 32): (64, 32, 4, 2),
        (4, 64): (64, 32, 4, 2),
        (4, 128): (16, 32, 8, 1),
    },
    10: {
        (2, 32): (128, 64, 4, 4),
        (2, 64): (128, 64, 8, 2),
        (2, 128): (128, 64, 8, 3),
        (4, 32): (64, 32, 8, 2),
        (4, 64): (64, 32, 8, 2),
        (4, 128): (16, 32, 8, 1),
    },
}
BACKWARD: Table = {
    8: {
        (2, 32): (128, 64, 8, 3),
        (2, 64): (128, 32, 8, 2),
        (2, 128): (64, 64, 8, 2),
        (4, 32): (32, 16, 4, 2),
        (4, 64): (32, 32, 8, 1),
        (4, 128): (16, 32, 8, 1),
    },
    9: {
        (2, 32): (128, 64, 8, 3),
        (2, 64): (128, 64, 8, 2),
        (2, 128): (128, 32, 8, 2),
        (4, 32): (64, 32, 4, 2),
        (4, 64): (32, 32, 8, 1),
        (4, 128): (16, 32, 8, 1),
    },
    10: {
        (2, 32): (128, 64, 8, 2),
        (2, 64): (128, 64, 8, 2),
        (2, 128): (128, 64, 8, 2),
        (4, 32): (64, 32, 4, 2),
        (4, 64): (64, 32, 8, 2),
        (4, 128): (16, 32, 8, 1),
    },
}


def _columns(q: Tensor) -> int:
    """Columns of a tile: the head width, up to a power of two that the tensor cores take."""
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"rope_attention: the Triton kernels hold heads of d <= {MAX_HEAD_DIM}, "
            f"got {q.shape[3]}"
        )
    return max(16, _tuned.up_to_power_of_two(q.shape[3]))


def _make(m: int, n: int, warps: int, stages: int) -> Config:
    return {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages}


def _fits(q: Tensor, config: Config, tiles: int, extra: int) -> bool:
    """Whether the tiles fit shared memory: `tiles` of a program's own rows, and the streamed two.

    extra: bytes that are streamed with each of these rows.
    """
    row = _columns(q) * q.element_size()
    streamed = config["num_stages"] * config["block_n"] * (2 * row + extra)
    used = tiles * config["block_m"] * row + streamed
    return used <= SHARED.get(capability(q.device), 99 << 10)


def _config(op: str, table: Table, q: Tensor, key: str, tiles: int, extra: int) -> Config:
    """The measured configuration of a call, else the table's, streaming less if it must."""
    measured = _tuned.lookup(op, q.device, key).get("config")
    if measured is not None:
        return measured
    major = capability(q.device)[0]
    size = q.element_size(), max(32, _columns(q))
    # Generation 12 has the instructions and the shared memory of 8.6.
    config = _make(*table[major if major in (9, 10) else 8].get(size, (16, 16, 8, 1)))
    while config["num_stages"] > 1 and not _fits(q, config, tiles, extra):
        config["num_stages"] -= 1
    return config


def _candidates(q: Tensor, tiles: int, extra: int) -> list[Config]:
    """Configurations that fit shared memory and whose accumulators fit the registers.

    A program accumulates as many (block_m, columns) tiles as it keeps, and as many of scores.
    """
    half = q.element_size() == 2
    blocks_m, blocks_n = ((64, 128), (32, 64, 128)) if half else ((16, 32, 64), (16, 32))
    configs = []
    for config in itertools.starmap(
        _make, itertools.product(blocks_m, blocks_n, (4, 8), (2, 3) if half else (1, 2))
    ):
        accumulated = tiles * config["block_m"] * (_columns(q) + config["block_n"])
        registers = accumulated // (32 * config["num_warps"])
        if registers <= (160 if half else 48) and _fits(q, config, tiles, extra):
            configs.append(config)
    return configs


# What :func:`_fits` asks: a program's tiles, and bytes streamed with each row beside two tiles.
TILES = (1, 0)  # queries
TILES_BACKWARD = (2, 8)  # queries and gradients or keys and values; lse and delta are streamed


def candidates(q: Tensor) -> list[Config]:
    """What the tuner tries for a call of rope_attention."""
    return _candidates(q, *TILES)


def backward_candidates(q: Tensor) -> list[Config]:
    """What the tuner tries for a call of rope_attention_backward."""
    return _candidates(q, *TILES_BACKWARD)


def _constants(q: Tensor, window: int, config: Config) -> dict[str, Any]:
    return {
        "HEADS": q.shape[1],
        "D": q.shape[3],
        "COLS": _columns(q),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "WINDOW": window >= 0,
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }


def _window(window: int, local: int, spread: int) -> tuple[int, ...]:
    """A window as the kernels take it, in units of the coarsest clock with all places whole.

    Returns its reach in units, the ends of both streams, the units between two tokens of either,
    and twice the clock's length: where that exceeds 32 bits, Triton types it as 64 bits, and the
    kernels their places after it.
    """
    unit = spread // math.gcd(local, spread) if spread else 1
    length = local * unit
    return (
        min(window * unit, length),
        local,
        local + spread,
        unit,
        length // max(spread, 1),
        2 * length,
    )


def forward(
    outputs: tuple[Tensor, Tensor],
    /,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    local: int,
    spread: int,
) -> None:
    out, lse = outputs
    if not out.numel():
        return
    b, h, nq, _ = q.shape
    n = k.shape[2]
    config = _config("rope_attention", FORWARD, q, tuning_key(q, k, window), *TILES)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    launch(
        _forward,
        (triton.cdiv(nq, config["block_m"]) * b * h,),
        *(q, k, v),
        *(out, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(nq, n, *_window(window, local, spread)),
        **_constants(q, window, config),
    )


def backward(
    outputs: tuple[Tensor, Tensor, Tensor],
    /,
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
    dq, dk, dv = outputs
    if not dk.numel():
        return
    b, h, nq, _ = q.shape
    n = k.shape[2]
    key = tuning_key(q, k, window)
    config = _config("rope_attention_backward", BACKWARD, q, key, *TILES_BACKWARD)
    grad, q, k, v = dense_rows(grad), dense_rows(q), dense_rows(k), dense_rows(v)
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    strides = (*grad.stride()[:2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes, constants = (nq, n, *_window(window, local, spread)), _constants(q, window, config)
    launch(
        _backward_q,
        (triton.cdiv(nq, config["block_m"]) * b * h,),
        *(grad, q, k, v, out, lse, delta, dq, *strides, *sizes),
        **constants,
    )
    launch(
        _backward_kv,
        (triton.cdiv(n, config["block_m"]) * b * h,),
        *(grad, q, k, v, lse, delta, dk, dv, *strides, *sizes),
        **constants,
    )
    if n == 1:  # the one weight is 1 whatever q and k are; the difference above is rounding alone
        dq.zero_()
        dk.zero_()
