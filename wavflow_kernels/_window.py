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


class Window(NamedTuple):
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


def visible(rows: Tensor, cols: Tensor, window: Window) -> Tensor:
    """(r c) bool: whether the tokens ``rows`` (r) see the tokens ``cols`` (c)."""
    size, local, spread = window
    unit, paced = max(spread, 1), local + spread

    def place(token: Tensor) -> Tensor:
        return torch.where(token < local, token * unit, (token - local) * local)

    near = (place(rows)[:, None] - place(cols)).abs() <= size * unit
    return near | (rows >= paced)[:, None] | (cols >= paced)


def blocks(nq: int, n: int, window: Window, device: torch.device) -> Iterator[Block]:
    """Blocks that cover the first nq of n tokens as queries; one of all if ``size`` is negative."""
    size, local, spread = window
    if size < 0:
        yield Block(slice(0, nq), None, None)
        return
    paced, unit = local + spread, max(spread, 1)
    rest = torch.arange(paced, n, device=device)
    for begin, end, step in ((0, local, unit), (local, paced, local)):
        for first in range(begin, min(end, nq), ROWS):
            last = min(first + ROWS, end, nq) - 1
            low, high = (first - begin) * step - size * unit, (last - begin) * step + size * unit
            near = [
                torch.arange(max(-(-low // apart), 0), min(high // apart + 1, count), device=device)
                for apart, count in ((unit, local), (local, spread))
                if count
            ]
            cols = torch.cat([*(x + at for x, at in zip(near, (0, local), strict=False)), rest])
            rows = torch.arange(first, last + 1, device=device)
            yield Block(slice(first, last + 1), cols, visible(rows, cols, window))
    for first in range(paced, nq, ROWS):
        yield Block(slice(first, min(first + ROWS, nq)), None, None)
