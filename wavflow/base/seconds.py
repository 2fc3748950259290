"""Seconds as exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def exact(seconds: float | Fraction) -> Fraction:
    """Seconds as they are written in decimals, or as a ratio of small numbers."""
    return Fraction(seconds).limit_denominator(1_000_000)
