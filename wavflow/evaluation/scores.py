"""Scores of classifiers' logits and of paired embeddings, in float64, and their uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:  # (..., classes)
    """Logarithms of the classes' probabilities, (..., classes) float64."""
    logits = np.asarray(logits, dtype=np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def inception_score(
    logits: np.ndarray, *, splits: int = 10, seed: int = 0
) -> tuple[float, float]:  # (n classes)
    """The inception score: exp of the mean KL(p(class | sound) || p(class)).

    As in Salimans et al. 2016. Returns the mean over `splits` parts of the rows in random order,
    and the standard deviation over the parts. Between 1 and the number of classes; higher is
    better. Fewer rows a part give lower scores: compare with equal counts.

    Raises:
        ValueError: fewer rows than parts.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(
            f"an inception score of {splits} parts wants as many rows, not {len(logits)}"
        )
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = []
    for part in np.array_split(log_softmax(logits)[order], splits):
        p = np.exp(part)
        marginal = np.log(p.mean(axis=0), where=p.any(axis=0), out=np.zeros(p.shape[1]))
        scores.append(np.exp((p * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kl_softmax(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:  # (n classes) each -> (n)
    """KL(true || generated) of each pair's class distributions, in nats."""
    true = log_softmax(wanted)
    return (np.exp(true) * (true - log_softmax(found))).sum(axis=-1)


def kl_sigmoid(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:  # (n classes) each -> (n)
    """KL(true || generated) of each pair where every class is there or not by itself, in nats.

    The sum over classes of the divergences of their Bernoulli distributions.
    """
    found, wanted = (np.asarray(x, dtype=np.float64) for x in (found, wanted))
    # log sigmoid(x) = -log(1 + exp(-x)), and 1 - sigmoid(x) = sigmoid(-x).
    yes = np.logaddexp(0, -found) - np.logaddexp(0, -wanted)
    no = np.logaddexp(0, found) - np.logaddexp(0, wanted)
    p, q = np.exp(-np.logaddexp(0, -wanted)), np.exp(-np.logaddexp(0, wanted))
    return (p * yes + q * no).sum(axis=-1)


def cosine_similarity(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:  # (n d) each -> (n)
    """Cosine of the angle of each pair, -1 to 1: the CLAP and ImageBind scores' last step.

    Raises:
        ValueError: a row of zeros.
    """
    found, wanted = (np.asarray(x, dtype=np.float64) for x in (found, wanted))
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    if not lengths.all():
        raise ValueError(f"row {int(np.flatnonzero(lengths == 0)[0])} is zero, it has no direction")
    return (found * wanted).sum(axis=-1) / lengths


def offsets(logits: np.ndarray, limit: float = 2.0) -> np.ndarray:  # (crops classes) -> (crops)
    """Seconds that sound and picture are apart, by the likeliest class of a synchrony model.

    The classes stand for offsets even between -limit and limit: 21 in steps of 0.2 s for
    Synchformer. The mean of their absolute values over a set's crops is DeSync.

    Raises:
        ValueError: fewer than 2 classes.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"offsets want at least 2 classes, found {classes}")
    return np.linspace(-limit, limit, classes)[np.argmax(logits, axis=-1)]


@dataclass(frozen=True)
class Interval:
    """A statistic of a sample and its percentile bootstrap interval (Efron 1979)."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The statistic of `values` (n, ...), and its interval over `resamples` draws of its rows."""
    rng, n = np.random.default_rng(seed), len(values)
    drawn = [statistic(values[rng.integers(n, size=n)]) for _ in range(resamples)]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(statistic(values)), float(low), float(high))
