"""Sliding windows over streams of tokens: which keys a query sees.

Places on the common clock are compared as whole numbers, ``max(spread, 1)`` to a token of the first
stream: compiled kernels and references agree on every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Queries that a reference takes at a time.
ROWS = 256


class AttentionWindow(NamedTuple):
    """Which tokens see each other: those at most ``size`` apart on a common clock.

    The first ``local`` tokens stand at 0, 1, 2 and so on; the next ``spread`` ones evenly over the
    same time, the j-th at ``j * local / spread``. All later tokens see, and are seen by, all.
    """

    size: int
    local: int
    spread: int = 0


class Block(NamedTuple):
    """Some queries, and the keys that at least one of them sees."""

    rows: slice
    cols: Tensor | None  # None: all keys
    mask: Tensor | None  # (rows cols) bool, which query sees which key; None: each sees all


def visible(rows: Tensor, cols: Tensor, window: AttentionWindow) -> Tensor:
    """Whether the tokens ``rows`` (r) see the tokens ``cols`` (c): (r c) bool."""
    size, local, spread = window
    unit, paced = max(spread, 1), local + spread

    def place(token: Tensor) -> Tensor:
        return torch.where(token < local, token * unit, (token - local) * local)

    near = (place(rows)[:, None] - place(cols)).abs() <= size * unit
    return near | (rows >= paced)[:, None] | (cols >= paced)


def blocks(nq: int, n: int, window: AttentionWindow, device: torch.device) -> Iterator[Block]:
    """Cut the first nq of n tokens, as queries, into blocks; into one if ``size`` is negative."""
    size, local, spread = window
    if size < 0:
        yield Block(slice(0, nq), None, None)
        return
    paced = local + spread
    rest = torch.arange(paced, n, device=device)
    # First token, places on the clock between two tokens, and tokens of each stream.
    streams = ((0, max(spread, 1), local), (local, local, spread))
    reach = size * max(spread, 1)
    for begin, step, count in streams:
        end = min(begin + count, nq)
        for first in range(begin, end, ROWS):
            last = min(first + ROWS, end) - 1
            low, high = (first - begin) * step - reach, (last - begin) * step + reach
            near = [
                torch.arange(
                    at + max(-(-low // apart), 0),
                    at + min(high // apart + 1, tokens),
                    device=device,
                )
                for at, apart, tokens in streams
                if tokens
            ]
            rows, cols = torch.arange(first, last + 1, device=device), torch.cat([*near, rest])
            yield Block(slice(first, last + 1), cols, visible(rows, cols, window))
    for first in range(paced, nq, ROWS):
        yield Block(slice(first, min(first + ROWS, nq)), None, None)
