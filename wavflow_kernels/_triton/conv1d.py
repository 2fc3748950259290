"""Implicit-GEMM convolution along the tokens of a channels-last tensor, and its epilogues.

The input is seen as rows of tokens, items one after another. In memory the `width` tokens around a
row are one run of width * c numbers, so row r of the GEMM's left factor is the run that starts at
token r - width // 2: windows of neighbouring rows overlap and nothing is unfolded. Tokens outside
the row's item are masked to zero. The right factor holds, for every output channel, the run of its
weights in the same order (tap, channel).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tuned
from .launch import capability, launch

# Rows, output columns and reduction length of a tile; row tiles that share columns in L2.
Config = dict[str, int]


@triton.jit
def tile(rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first column of this program's tile: GROUP row tiles share their columns."""
    GROUP: tl.constexpr = 8
    tiles_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def within(column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns past the end repeat the last one; they are computed and not stored."""
    return column if WIDTH % BLOCK == 0 else tl.minimum(column, WIDTH - 1)


@triton.jit
def convolve(
    x,  # (rows, C)
    weights,  # (BLOCK_N) pointers to runs of TAPS * C
    first_row,
    rows,
    n,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32: the convolution at BLOCK_M rows for the channels of `weights`."""
    PAD: tl.constexpr = TAPS // 2
    row = first_row + tl.arange(0, BLOCK_M)
    # A row past the end gets a token that no tap brings into [0, n).
    token = tl.where(row < rows, row % n, -TAPS) - PAD
    # Only the way to the tile takes 64 bits: offsets inside stay in 32-bit registers.
    windows = x + (first_row - PAD).to(tl.int64) * C + tl.arange(0, BLOCK_M) * C
    total = tl.zeros((BLOCK_M, weights.shape[0]), tl.float32)
    for step in range(tl.cdiv(TAPS * C, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a_pointers = windows[:, None] + k[None, :]
        b_pointers = weights[None, :] + k[:, None]
        if C % BLOCK_K == 0:
            at = token + step * BLOCK_K // C
            a = tl.load(a_pointers, mask=((at >= 0) & (at < n))[:, None], other=0.0)
            b = tl.load(b_pointers)
        else:
            at = token[:, None] + (k // C)[None, :]
            inside = k < TAPS * C
            a = tl.load(a_pointers, mask=(at >= 0) & (at < n) & inside[None, :], other=0.0)
            b = tl.load(b_pointers, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["rows", "n"])
def _forward(
    out,
    x,
    weight,
    bias,
    residual,
    gate,
    gate_index,
    gate_item,
    gate_row,
    rows,
    n,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    TAPS: tl.constexpr,
    SELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, first_column = tile(rows, O, BLOCK_M, BLOCK_N)
    column = first_column + tl.arange(0, BLOCK_N)
    weights = weight + within(column, O, BLOCK_N).to(tl.int64) * (TAPS * C)
    y = convolve(x, weights, first_row, rows, n, C, TAPS, BLOCK_M, BLOCK_K, PRECISION)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & (column < O)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=column < O, other=0.0).to(tl.float32)[None, :]
    if SELU:
        y = 1.0507009873554805 * tl.where(
            y > 0, y, 1.6732632423543772 * (tl.exp(tl.minimum(y, 0.0)) - 1)
        )
    at = row.to(tl.int64)[:, None] * O + column[None, :]
    if gate is not None:
        gates = gate + (row // n).to(tl.int64) * gate_item
        if gate_index is not None:
            gates += tl.load(gate_index + row % n).to(tl.int64) * gate_row
        y *= tl.load(gates[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    return {"block_m": block_m, "block_n": block_n, "block_k": block_k} | {
        "warps": warps,
        "stages": stages,
    }


# {(capability, bytes of an element): configurations, largest tile first}. Two operand tiles of
# every stage fit in shared memory, and the float32 tile in registers without spills.
CONFIGS = {
    (8, 2): [
        _config(128, 256, 32, 8, 3),
        _config(128, 128, 32, 4, 4),
        _config(64, 128, 32, 4, 4),
        _config(64, 64, 64, 4, 3),
    ],
    (9, 2): [
        _config(128, 256, 64, 8, 3),
        _config(128, 128, 64, 8, 4),
        _config(64, 128, 64, 4, 4),
        _config(64, 64, 64, 4, 4),
    ],
    (10, 2): [
        _config(128, 256, 64, 8, 3),
        _config(128, 128, 64, 8, 4),
        _config(64, 128, 64, 4, 4),
        _config(64, 64, 64, 4, 4),
    ],
    (8, 4): [_config(64, 64, 32, 4, 3)],
    (9, 4): [_config(64, 64, 32, 4, 3)],
    (10, 4): [_config(64, 64, 32, 4, 3)],
}
INTERPRETED = _config(16, 32, 32, 4, 1)  # small, so that small calls have several tiles
PROCESSORS = {8: 108, 9: 132, 10: 148}


def tiles(config: Config, rows: int, width: int) -> int:
    """How many programs cover rows x width outputs."""
    return triton.cdiv(rows, config["block_m"]) * triton.cdiv(width, config["block_n"])


def configure(op: str, key: str, x: Tensor, rows: int, width: int) -> Config:
    """The measured configuration, else the largest tiles that give every multiprocessor one."""
    measured = _tuned.lookup(op, x.device, key).get("config")
    if measured is not None:
        return measured
    major = min(capability(x.device)[0], 10)
    if major == 0:
        return INTERPRETED
    table = CONFIGS[major, x.element_size()]
    return next((c for c in table if tiles(c, rows, width) >= PROCESSORS[major]), table[-1])


def tap_major(weight: Tensor) -> Tensor:
    """(o, c, k) or (o, c) as (o, k, c) contiguous: no copy where memory is in that order already.

    The runs along c are then read 16 bytes at a time.
    """
    return weight.movedim(-1, 1).contiguous() if weight.dim() == 3 else weight.contiguous()


def options(config: Config, x: Tensor) -> dict[str, Any]:
    """The launch options and constexprs that all of these kernels share."""
    return {
        "num_warps": config["warps"],
        "num_stages": config["stages"],
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "BLOCK_K": config["block_k"],
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee",
    }


def key(x: Tensor, weight: Tensor) -> str:
    """What decides the speed of a call: the key of its row in the tuning tables."""
    (b, n, c), (o, taps) = x.shape, (weight.shape[0], weight.shape[2])
    return f"{str(x.dtype)[6:]} c{c} o{o} k{taps} rows{_tuned.up_to_power_of_two(b * n)}"


def forward(
    out: Tensor,  # b n o
    x: Tensor,  # b n c
    weight: Tensor,  # o c k
    bias: Tensor | None,  # o
    selu: bool,
    residual: Tensor | None,  # b n o
    gate: Tensor | None,  # b r o
    gate_index: Tensor | None,  # n
) -> None:
    b, n, c = x.shape
    o, rows = weight.shape[0], b * n
    if not rows:
        return
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    config = configure("conv1d", key(x, weight), x, rows, o)
    launch(
        _forward,
        (tiles(config, rows, o),),
        out,
        x.contiguous(),
        tap_major(weight),
        bias,
        None if residual is None else residual.contiguous(),
        gate,
        gate_index,
        0 if gate is None else gate.stride(0),
        0 if gate is None else gate.stride(1),
        rows,
        n,
        C=c,
        O=o,
        TAPS=weight.shape[2],
        SELU=selu,
        **options(config, x),
    )
