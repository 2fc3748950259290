"""Distances between two sets of embeddings, in float64: rows are samples, columns dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: Rows that are turned to float64 at a time.
BLOCK = 1024
#: Rows of the true set whose distances give the kernel's width, at most.
_WIDTH_ROWS = 2000
_INFINITY_SIZES, _INFINITY_LEAST = 15, 0.2


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of rows; adding two sets joins them (Chan et al. 1979).

    Attributes:
        count: number of rows.
        mean: mean of the rows, (d,).
        scatter: (d, d), the sum of outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:  # (n d)
        """The moments of rows; of a large set it makes float64 copies of BLOCK rows at a time.

        Raises:
            ValueError: no rows, or another shape than (n, d).
        """
        if rows.ndim != 2 or not rows.size:
            raise ValueError(f"rows have shape {rows.shape}, wanted (n, d) with n, d > 0")
        return cls.join(cls._of_block(rows[at : at + BLOCK]) for at in range(0, len(rows), BLOCK))

    @classmethod
    def _of_block(cls, rows: np.ndarray) -> Moments:
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    @classmethod
    def join(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all rows of at least one part."""
        parts = iter(parts)
        return sum(parts, next(parts))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:  # (d d)
        """The unbiased covariance.

        Raises:
            ValueError: fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance wants at least 2 rows, found {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:  # (d rank)
        """R with R R^T = covariance, with as many columns as it has eigenvalues above rounding."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(found: Moments, wanted: Moments) -> float:
    """Distance of two Gaussians (Frechet 1957; as FID: Heusel et al. 2017, as FAD: Kilgour 2019).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). With C = R R^T the last trace is the sum of
    the singular values of R1^T R2. A matrix root of C1 C2 takes square roots of rounding errors
    where a covariance is rank-deficient, as it is with fewer rows than dimensions; this does not.

    Raises:
        ValueError: fewer than 2 rows, or different widths.
    """
    if found.mean.shape != wanted.mean.shape:
        raise ValueError(f"embeddings are {found.mean.size} and {wanted.mean.size} wide")
    cross = np.linalg.svd(found.root.T @ wanted.root, compute_uv=False)
    apart = found.mean - wanted.mean
    traces = np.trace(found.covariance) + np.trace(wanted.covariance)
    return max(float(apart @ apart + traces - 2 * cross.sum()), 0.0)


def frechet_distance_infinity(found: np.ndarray, wanted: Moments, *, seed: int = 0) -> float:
    """`frechet_distance` without the bias of a finite generated set (n d).

    The distance is nearly linear in 1 / n (Chong & Forsyth 2020; for audio Gui et al. 2023): it is
    taken for 15 random subsets of sizes even in 1 / n, from a fifth of the rows to all, and the
    line through them is followed to 1 / n = 0. It is a line where the subsets have many more rows
    than there are dimensions. The result can be below 0.

    Raises:
        ValueError: a fifth of the rows are fewer than 2.
    """
    least = int(_INFINITY_LEAST * len(found))
    if least < 2:
        raise ValueError(f"an extrapolation wants at least 10 rows, found {len(found)}")
    rng = np.random.default_rng(seed)
    sizes = np.rint(1 / np.linspace(1 / least, 1 / len(found), _INFINITY_SIZES)).astype(int)
    distances = [
        frechet_distance(Moments.of(found[rng.permutation(len(found))[:size]]), wanted)
        for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def kernel_distance(found: np.ndarray, wanted: np.ndarray) -> float:  # (n d), (m d)
    """Squared maximum mean discrepancy (Gretton et al. 2012), without bias at any set size.

    The kernel is Gaussian, as wide as the median distance between rows of the true set, as in
    KAD (Chung et al. 2025, arXiv 2502.15602). Around 0, and possibly below, for sets drawn from
    one distribution.

    Raises:
        ValueError: fewer than 2 rows, different widths, or true rows of which most are equal.
    """
    if found.shape[1:] != wanted.shape[1:]:
        raise ValueError(f"embeddings are {found.shape[1]} and {wanted.shape[1]} wide")
    n, m = len(found), len(wanted)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance wants at least 2 rows, found {n} and {m}")
    scale = -1 / (2 * _median_squared_distance(wanted))
    # A row's kernel with itself is 1: exactly, however distances are rounded.
    within = (_kernel_sum(x, x, scale, diagonal=False) for x in (found, wanted))
    same, true = (s / (k * (k - 1)) for s, k in zip(within, (n, m), strict=True))
    return float(same + true - 2 * _kernel_sum(found, wanted, scale) / (n * m))


def _median_squared_distance(rows: np.ndarray) -> float:
    rows = rows[:: -(-len(rows) // _WIDTH_ROWS)].astype(np.float64)
    squares = _squared_distances(rows, rows)
    median = float(np.median(squares[np.triu_indices(len(rows), 1)]))
    if median <= np.finfo(np.float64).eps * np.square(rows).sum(axis=1).max():
        raise ValueError("most of the true rows are equal, the kernel has no width")
    return median


def _kernel_sum(x: np.ndarray, y: np.ndarray, scale: float, *, diagonal: bool = True) -> float:
    total = 0.0
    for at in range(0, len(x), BLOCK):
        kernel = np.exp(scale * _squared_distances(x[at : at + BLOCK], y))
        if not diagonal:
            here = np.arange(len(kernel))
            kernel[here, at + here] = 0.0
        total += float(kernel.sum())
    return total


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # (n d), (m d) -> (n m)
    x, y = x.astype(np.float64), y.astype(np.float64)
    # Distances do not see an offset, but their rounding does.
    offset = y.mean(axis=0)
    x, y = x - offset, y - offset
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0.0)
