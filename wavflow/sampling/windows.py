"""Where the windows of a long sound lie, and what each contributes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.seconds import exact
from wavflow.sampling.field import Size

#: Share of a window that the next one repeats, where nothing else is asked for.
OVERLAP = Fraction(1, 5)


@dataclass(frozen=True)
class Windows:
    """Windows of one length that cover a sound and overlap.

    Attributes:
        size: tokens of a window.
        tokens: how many tokens the sound has; a loop's windows go on at its beginning.
        times: seconds at which each begins, multiples of the grid of its conditions.
        starts: tokens at which each begins, nearest to the times.
        loop: whether the sound's end leads into its beginning.
    """

    size: int
    tokens: int
    times: tuple[Fraction, ...]
    starts: tuple[int, ...]
    loop: bool = False

    @classmethod
    def cover(
        cls,
        seconds: float,
        window: Size,
        *,
        overlap: float | None = None,
        grid: Fraction = Fraction(1, 25),
        loop: bool = False,
    ) -> Windows:
        """Windows as evenly spread as `grid` allows, over `seconds` or a little more.

        Args:
            seconds: length of the sound.
            window: how long one window is.
            overlap: seconds that neighbours have in common, at least; by default a fifth of a
                window.
            grid: seconds, of which every window's beginning is a multiple.
            loop: whether the sound's end leads into its beginning: it has `seconds` to the nearest
                token, and a window may reach around it.

        Raises:
            InputError: an overlap that leaves no step of the grid.
        """
        rate = window.token_rate
        length, whole = exact(window.seconds), exact(seconds)
        shared = length * OVERLAP if overlap is None else exact(overlap)
        hop = (length - shared) // grid * grid
        if not (0 <= shared and hop > 0):
            raise InputError(
                f"overlap is {float(shared):g} s; wanted 0 to {float(length - grid):g} s, less "
                f"than a window of {float(length):g} s"
            )
        size, tokens = window.tokens, math.ceil(whole * rate)
        if loop:
            tokens = max(1, round(whole * rate))
            around = math.ceil(whole / grid) * grid  # so that the last one reaches the first
            count = math.ceil(around / hop)
            times = [k * around / count // grid * grid for k in range(count)]
        elif tokens <= size:
            tokens, times = size, [Fraction(0)]
        else:
            last = math.ceil((tokens - size) / rate / grid) * grid
            gaps = math.ceil(last / hop)
            times = [k * last / gaps // grid * grid for k in range(gaps + 1)]
        starts = [round(time * rate) for time in times]
        if not loop:
            tokens = max(tokens, starts[-1] + size)
        return cls(size, tokens, tuple(times), tuple(starts), loop)

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def reach(self) -> int:
        """How many of the windows after it a window shares tokens with, at most; in a loop all."""
        if self.loop:
            return len(self)
        return max(
            bisect_left(self.starts, start + self.size) - k - 1
            for k, start in enumerate(self.starts)
        )

    def places(self, window: int) -> Iterator[tuple[slice, slice]]:
        """Which tokens of a window are which tokens of the sound, in pieces."""
        at = 0
        while at < self.size:
            start = self.starts[window] + at
            if self.loop:
                start %= self.tokens
            count = min(self.size - at, self.tokens - start)
            yield slice(at, at + count), slice(start, start + count)
            at += count

    def weight(self, window: int) -> Tensor:  # (size,) float32
        """How much each token of a window counts, up to 1: a straight cross-fade to neighbours."""
        before, after = self._shared(window - 1), self._shared(window)
        middle = torch.arange(self.size) + 0.5
        rising = middle / before if before else torch.ones_like(middle)
        falling = (self.size - middle) / after if after else torch.ones_like(middle)
        return torch.minimum(rising, falling).clamp(max=1.0)

    def _shared(self, window: int) -> int:
        """Tokens that a window has in common with the next one."""
        if not self.loop and not 0 <= window < len(self) - 1:
            return 0
        window %= len(self)
        after = window + 1
        begins = self.starts[after] if after < len(self) else self.starts[0] + self.tokens
        return max(0, self.starts[window] + self.size - begins)
