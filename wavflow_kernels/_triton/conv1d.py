"""Implicit-GEMM convolution along the tokens of a channels-last tensor, and its epilogues.

The input is seen as rows of tokens, items one after another. In memory the `width` tokens around a
row are one run of width * c numbers, so row r of the GEMM's left factor is the run that starts at
token r - width // 2: windows of neighbouring rows overlap and nothing is unfolded. Tokens outside
the row's item are masked to zero. The right factor holds, for every output channel, the run of its
weights in the same order (tap, channel).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tuned
from .._launch import dense, dense_rows
from ..ops.conv1d import key
from .launch import capability, launch

# Rows, output columns and reduction length of a tile; warps and pipeline stages of a program.
Config = dict[str, int]


@triton.jit
def tile(rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first column of this program's tile: GROUP row tiles share their columns."""
    GROUP: tl.constexpr = 16
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
):
    """The convolution at BLOCK_M rows for BLOCK_N channels of `weights`, in float32."""
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
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _finish(
    y,  # (BLOCK_M, BLOCK_N)
    out,
    bias,
    residual,
    gate,
    gate_index,
    gate_item,
    gate_row,
    first_row,
    first_column,
    rows,
    n,
    O: tl.constexpr,  # noqa: E741
    SELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the tile y after bias, SELU, gate and residual."""
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = (row < rows - first_row)[:, None] & (column < O)[None, :]
    start = first_row.to(tl.int64) * O
    at = row[:, None] * O + column[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=column < O, other=0.0).to(tl.float32)[None, :]
    if SELU:
        y = 1.0507009873554805 * tl.where(
            y > 0, y, 1.6732632423543772 * (tl.exp(tl.minimum(y, 0.0)) - 1)
        )
    if gate is not None:
        row += first_row
        gates = gate + (row // n).to(tl.int64) * gate_item
        if gate_index is not None:
            gates += tl.load(gate_index + row % n).to(tl.int64) * gate_row
        y *= tl.load(gates[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=inside)


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, first_column = tile(rows, O, BLOCK_M, BLOCK_N)
    column = first_column + tl.arange(0, BLOCK_N)
    weights = weight + within(column, O, BLOCK_N).to(tl.int64) * (TAPS * C)
    y = convolve(x, weights, first_row, rows, n, C, TAPS, BLOCK_M, BLOCK_K)
    # A quarter at a time: a whole tile of gates and residuals would not fit in registers.
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = tl.split(y.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    for half in tl.static_range(2):
        part = left if half == 0 else right
        first, second = tl.split(part.reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1))
        for quarter in tl.static_range(2):
            _finish(
                first if quarter == 0 else second,
                out,
                bias,
                residual,
                gate,
                gate_index,
                gate_item,
                gate_row,
                first_row,
                first_column + (2 * half + quarter) * QUARTER,
                rows,
                n,
                O,
                SELU,
                BLOCK_M,
                QUARTER,
            )


def _configs(*rows: tuple[int, int, int, int, int]) -> list[Config]:
    names = ("block_m", "block_n", "block_k", "warps", "stages")
    return [dict(zip(names, row, strict=True)) for row in rows]


# By capability: 8 is mma.sync (also of consumer Blackwell), 9 is wgmma, 10 is tcgen05.
PROCESSORS = {8: 108, 9: 132, 10: 148}
# Half precision, largest tile first.
DEFAULTS = {
    8: _configs(
        (128, 256, 32, 8, 3), (128, 128, 32, 4, 4), (64, 128, 32, 4, 4), (64, 64, 64, 4, 3)
    ),
    9: _configs(
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)
    ),
    # tcgen05 multiplies 128 rows at a time; 64 take as long.
    10: _configs(
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)
    ),
}
CANDIDATES = {
    8: DEFAULTS[8]
    + _configs(
        (256, 128, 32, 8, 3),
        (128, 256, 32, 8, 4),
        (128, 128, 32, 4, 3),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (64, 256, 32, 4, 4),
        (64, 256, 32, 8, 4),
        (128, 64, 32, 4, 4),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 64, 32, 4, 4),
    ),
    9: DEFAULTS[9]
    + _configs(
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 4, 3),
        (64, 256, 64, 4, 4),
        (64, 256, 64, 8, 4),
        (64, 128, 64, 4, 3),
        (64, 128, 128, 4, 3),
        (128, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
    ),
    10: DEFAULTS[10]
    + _configs(
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (128, 64, 64, 4, 3),
        (128, 64, 128, 4, 3),
        (128, 32, 64, 4, 4),
        (64, 128, 64, 8, 4),
    ),
}
# float32 multiplies without tensor cores: they truncate their sums, and TF32 its factors.
DEFAULTS_FLOAT32 = _configs((128, 64, 16, 8, 3), (64, 64, 16, 4, 3))
CANDIDATES_FLOAT32 = DEFAULTS_FLOAT32 + _configs((128, 64, 16, 8, 4), (64, 64, 32, 4, 3))
# Small, so that small calls have several tiles.
INTERPRETED = _configs((16, 32, 32, 4, 1))[0]


def _generation(x: Tensor) -> int:
    major = capability(x.device)[0]
    return 10 if major == 11 else major if major in PROCESSORS else 8


def tiles(config: Config, rows: int, width: int) -> int:
    """How many programs cover rows x width outputs."""
    return triton.cdiv(rows, config["block_m"]) * triton.cdiv(width, config["block_n"])


def configure(op: str, key: str, x: Tensor, width: int) -> Config:
    """The measured configuration, else the largest tile that gives every multiprocessor one."""
    measured = _tuned.lookup(op, x.device, key).get("config")
    if measured is not None:
        return measured
    if capability(x.device) == (0, 0):
        return INTERPRETED
    table = DEFAULTS_FLOAT32 if x.dtype == torch.float32 else DEFAULTS[_generation(x)]
    rows, wanted = x.shape[0] * x.shape[1], PROCESSORS[_generation(x)]
    return next((c for c in table if tiles(c, rows, width) >= wanted), table[-1])


def candidates(x: Tensor) -> list[Config]:
    """Configurations worth measuring for a call of conv1d or conv_swiglu."""
    return CANDIDATES_FLOAT32 if x.dtype == torch.float32 else CANDIDATES[_generation(x)]


def tap_major(weight: Tensor) -> Tensor:
    """A weight (o, c, k) as (o, k, c), contiguous from a 16-byte boundary; copied if it must be.

    Runs of k * c numbers are then loaded 16 bytes at a time.
    """
    weight = weight.movedim(2, 1).contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def options(config: Config) -> dict[str, int]:
    """The launch options and constexprs that a configuration stands for."""
    return {
        "num_warps": config["warps"],
        "num_stages": config["stages"],
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "BLOCK_K": config["block_k"],
    }


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
    (b, n, c), (o, _, taps) = x.shape, weight.shape
    if not b:
        return
    gate = None if gate is None else dense_rows(gate)
    x, bias, residual, gate_index = dense(x, bias, residual, gate_index)
    kind = " selu" if selu else "" if residual is None else " residual"
    config = configure("conv1d", key(x, weight, kind), x, o)
    launch(
        _forward,
        (tiles(config, b * n, o),),
        out,
        x,
        tap_major(weight),
        bias,
        residual,
        gate,
        gate_index,
        0 if gate is None else gate.stride(0),
        0 if gate is None else gate.stride(1),
        b * n,
        n,
        C=c,
        O=o,
        TAPS=taps,
        SELU=selu,
        **options(config),
    )
