"""Rows that many tokens share: which row each token reads, gathers of rows and sums over them.

The row that a token reads never decreases along the tokens. A row's tokens are thus one range, and
a sum over them needs no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check, check_dtype, require
from ._launch import address


class TokenRows(NamedTuple):
    """Which row of a table each token reads; made by :func:`token_rows`.

    Token n reads row ``index[n]``; the tokens of row r are ``offsets[r]`` to ``offsets[r + 1]``.
    """

    index: Tensor  # type: ignore[assignment]  # n, int32; hides tuple.index
    offsets: Tensor  # rows + 1, int32

    @classmethod
    def of_sorted(cls, index: Tensor, rows: int) -> TokenRows:
        """The rows of an index (n) that is known to fit: nothing is checked or waited for."""
        index = index.to(torch.int32).contiguous()
        edges = torch.arange(rows + 1, device=index.device, dtype=torch.int32)
        return cls(index, torch.searchsorted(index, edges, out_int32=True))


def token_rows(index: Tensor, rows: int) -> TokenRows:
    """Check a map from tokens to rows once, for any number of calls.

    Args:
        index: (n,) row of each token: an integer tensor that never decreases, in [0, rows).
        rows: how many rows there are; some may have no token.

    Returns:
        The rows on the device of `index`. Waits for the device once, so call it outside of
        compiled and captured code.

    Raises:
        ValueError: no tokens or rows; a value out of range or less than the one before it.
        TypeError: an index that is not an integer tensor.
    """
    op = "token_rows"
    check(op, index=(index, "n"))
    check_dtype(op, "index", index, torch.int32, torch.int64)
    require(rows > 0, f"{op}: rows must be positive, got {rows}")
    require(index.shape[0] > 0, f"{op}: index must hold at least one token, got none")
    before = torch.cat((index[:1], index[:-1]))
    wrong = (index < 0) | (index >= rows) | (index < before)
    at = torch.where(wrong.any(), wrong.int().argmax(), -1)
    position, found, previous = torch.stack((at.to(index.dtype), index[at], before[at])).tolist()
    if position >= 0:
        require(
            0 <= found < rows,
            f"{op}: index[{position}] is {found}, wanted a row in [0, {rows})",
        )
        raise ValueError(
            f"{op}: index must not decrease, got {found} at {position} after {previous}"
        )
    return TokenRows.of_sorted(index, rows)


NO_ROWS = (None, None)  # index and offsets where all tokens share one row


def check_rows(
    op: str, name: str, table: Tensor, index: Tensor | None, offsets: Tensor | None
) -> None:
    """Check the rows that tokens read `table` (b r c) by; `name` is the argument's."""
    require(
        (index is None) == (offsets is None), f"{op}: {name} needs both its index and its offsets"
    )
    rows = table.shape[1]
    if index is None or offsets is None:
        require(rows == 1, f"{op}: without {name} there must be one row for all tokens, got {rows}")
        return
    check_dtype(op, f"{name}.index", index, torch.int32)
    check_dtype(op, f"{name}.offsets", offsets, torch.int32)
    require(rows > 0, f"{op}: there must be at least one row, got none")
    require(
        offsets.shape[0] == rows + 1,
        f"{op}: {name}.offsets must have {rows + 1} elements for {rows} rows, "
        f"got {offsets.shape[0]}",
    )


def gather_rows(table: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows that the tokens read, as `dtype`: (b n c), or (b 1 c) without an index."""
    table = table.to(dtype)
    return table if index is None else table.index_select(1, index)


def segment_sums(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """The sums of values (b n c) over the tokens of each row: (b rows c)."""
    if index is None:
        return values.sum(1, keepdim=True)
    return values.new_zeros(values.shape[0], rows, values.shape[2]).index_add(1, index, values)


def row_tensor(table: Tensor) -> tuple[int, int, int]:
    """A (b r c) table as ``RowTensor`` of csrc/adaln.h: address, strides of batch and row."""
    return table.data_ptr(), table.stride(0), table.stride(1)


def row_map(index: Tensor | None, offsets: Tensor | None, rows: int) -> tuple[int, int, int]:
    """The rows of the tokens as ``TokenRows`` of csrc/adaln.h."""
    return address(index), address(offsets), rows


def sample_rows(device: torch.device, index: list[int], rows: int) -> TokenRows:
    """Rows of a sample or workload, on any device."""
    made = token_rows(torch.tensor(index), rows)
    return TokenRows(*(t.to(device) for t in made))


def upsampled_rows(device: torch.device, tokens: int, rows: int) -> TokenRows:
    """Rows by nearest upsampling along time: token n reads floor((n + 1/2) rows / tokens)."""
    return sample_rows(device, [(2 * i + 1) * rows // (2 * tokens) for i in range(tokens)], rows)
