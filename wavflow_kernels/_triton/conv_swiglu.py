"""Two convolutions of one input and the gate between them, in one pass.

The columns of the two results alternate in a tile: 2i is a_i and 2i + 1 is b_i. One matrix product
then yields both, and a thread holds a pair in neighbouring registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.conv1d import key
from .conv1d import candidates as candidates  # of the same kernel
from .conv1d import configure, convolve, options, tap_major, tile, tiles, within
from .launch import launch


@triton.jit(do_not_specialize=["rows", "n"])
def _forward(
    out,
    a_out,
    b_out,
    x,
    w1,
    w3,
    rows,
    n,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TAPS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, first_column = tile(rows, 2 * I, BLOCK_M, BLOCK_N)
    column = first_column + tl.arange(0, BLOCK_N)
    run = within(column // 2, I, BLOCK_N // 2).to(tl.int64) * (TAPS * C)
    # Both are aligned to 16 bytes, and so is the way from one to the other. Choosing by tl.where
    # would hide that from the compiler, and every load would be one element wide.
    step: tl.constexpr = 128 // w1.dtype.element_ty.primitive_bitwidth
    to_w3 = (w3.to(tl.int64) - w1.to(tl.int64)) // 16 * step
    weights = w1 + run + column % 2 * to_w3
    both = convolve(x, weights, first_row, rows, n, C, TAPS, BLOCK_M, BLOCK_K)
    a, b = tl.split(both.reshape(BLOCK_M, BLOCK_N // 2, 2))
    row = tl.arange(0, BLOCK_M)
    column = first_column // 2 + tl.arange(0, BLOCK_N // 2)
    inside = (row < rows - first_row)[:, None] & (column < I)[None, :]
    start = first_row.to(tl.int64) * I
    at = row[:, None] * I + column[None, :]
    tl.store(out + start + at, (a / (1 + tl.exp(-a)) * b).to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(a_out + start + at, a.to(a_out.dtype.element_ty), mask=inside)
        tl.store(b_out + start + at, b.to(b_out.dtype.element_ty), mask=inside)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor],  # b n i each; the last two are empty unless kept
    x: Tensor,  # b n c
    w1: Tensor,  # i c k
    w3: Tensor,  # i c k
    keep: bool,
) -> None:
    (b, n, c), (i, _, taps) = x.shape, w1.shape
    if not b:
        return
    config = configure("conv_swiglu", key(x, w1, " keep" if keep else ""), x, 2 * i)
    launch(
        _forward,
        (tiles(config, b * n, 2 * i),),
        *outputs,
        x.contiguous(),
        tap_major(w1),
        tap_major(w3),
        b * n,
        n,
        C=c,
        I=i,
        TAPS=taps,
        KEEP=keep,
        **options(config),
    )
