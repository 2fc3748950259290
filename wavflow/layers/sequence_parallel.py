"""One long sequence in several processes: each computes a stretch of the audio tokens.

Keys and values are gathered, convolutions get their neighbours' edge tokens; clip and text tokens,
few beside the audio's, are computed by every process. `torch.distributed`'s own context parallelism
is for its attention alone, and knows no convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Sharing:
    """Whether and among whom a network's sequences are shared; one object for all its copies.

    Attributes:
        rank, size: this process's number and how many processes there are; 1 shares nothing.
        tokens: how many tokens the sequence that is being computed has in all processes together.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.tokens = 0, 1, 0

    def __deepcopy__(self, memo: object) -> Sharing:
        return self

    def among(self, rank: int, size: int) -> None:
        """Sequences to come are shared among the default process group's `size` processes."""
        self.rank, self.size = rank, size

    def stretch(self, rank: int | None = None) -> slice:
        """The tokens of a process, by default this one."""
        rank = self.rank if rank is None else rank
        return slice(self.tokens * rank // self.size, self.tokens * (rank + 1) // self.size)

    def own(self, x: Tensor) -> Tensor:
        """This process's tokens of a new sequence x (b n ...).

        Raises:
            RuntimeError: a shared sequence while gradients are recorded.
        """
        if self.size == 1:
            return x
        if torch.is_grad_enabled():
            raise RuntimeError("a sequence that is shared among processes has no gradients")
        self.tokens = x.shape[1]
        return x[:, self.stretch()]

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All tokens along a dimension, of which x has this process's."""
        if self.size == 1:
            return x
        x = x.movedim(dim, 0)
        lengths = [s.stop - s.start for s in map(self.stretch, range(self.size))]
        mine = x.new_zeros(max(lengths), *x.shape[1:])
        mine[: len(x)] = x
        found = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather([_bytes(each) for each in found], _bytes(mine))
        parts = [each[:length] for each, length in zip(found, lengths, strict=True)]
        return torch.cat(parts).movedim(0, dim)

    def convolved(self, x: Tensor, edge: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `function` to x (b n c), this process's tokens, with its neighbours' edge tokens.

        Args:
            x: this process's tokens, (b n c).
            edge: how many tokens to each side a token sees.
            function: keeps the number of tokens.

        Raises:
            ValueError: this process has fewer tokens than an edge.
        """
        if self.size == 1 or edge == 0:
            return function(x)
        if x.shape[1] < edge:
            raise ValueError(f"a process has {x.shape[1]} tokens, wanted at least {edge}")
        neighbours = self.rank - 1, self.rank + 1
        there = [0 <= other < self.size for other in neighbours]
        before, after = (x.new_empty(len(x), edge if each else 0, x.shape[2]) for each in there)
        first, last = x[:, :edge].contiguous(), x[:, -edge:].contiguous()
        moves = []
        for other, given, wanted in zip(neighbours, (first, last), (before, after), strict=True):
            if wanted.shape[1]:
                moves.append(dist.P2POp(dist.isend, _bytes(given), other))
                moves.append(dist.P2POp(dist.irecv, _bytes(wanted), other))
        for each in dist.batch_isend_irecv(moves):
            each.wait()
        begin = before.shape[1]
        return function(torch.cat((before, x, after), dim=1))[:, begin : begin + x.shape[1]]


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's memory: what is moved needs no arithmetic, whatever its dtype."""
    return x.view(-1).view(torch.uint8)
