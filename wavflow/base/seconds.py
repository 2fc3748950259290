"""Seconds as exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def exact(seconds: float | Fraction) -> Fraction:
    """The fraction nearest to `seconds`, with a denominator of at most a million."""
    return Fraction(seconds).limit_denominator(1_000_000)
