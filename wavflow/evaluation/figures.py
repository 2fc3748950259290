"""Figures of a set of sounds: what a list of rows, logits or values by id says in one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wavflow.base.errors import InputError
from wavflow.evaluation import scores
from wavflow.evaluation.distances import (
    Moments,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)
from wavflow.evaluation.toy import Matches

#: Rows (k, d) by id.
Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Figure:
    """One number, and what it was computed from.

    Attributes:
        name: the measure, behind the name of what it judges by: "clap.frechet_distance".
        value: the number; None where there is none.
        better: "lower" or "higher".
        unit: "" for a pure number.
        count: number of generated sounds, or of pairs.
        low, high: the interval's ends, for figures of pairs and of single sounds.
        note: why there is no value, or what else there is to say of it.
    """

    name: str
    value: float | None
    better: str
    unit: str = ""
    count: int = 0
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How figures are computed.

    Attributes:
        splits: number of parts of an inception score.
        fad_infinity: whether Frechet distances are also extrapolated to endlessly many sounds.
        offset_limit: largest offset that a synchrony model's classes stand for, in seconds.
        resamples: number of resamples of a bootstrap interval.
        confidence: confidence of an interval, between 0 and 1.
        seed: seed of whatever is drawn.
    """

    splits: int = 10
    fad_infinity: bool = False
    offset_limit: float = 2.0
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("splits", self.splits >= 1, "1 or more"),
            ("offset_limit", self.offset_limit > 0, "more than 0 s"),
            ("resamples", self.resamples >= 1, "1 or more"),
            ("confidence", 0 < self.confidence < 1, "between 0 and 1"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}, wanted {wanted}")


@dataclass
class Collector:
    """Gathers figures, and the values of single ids behind them.

    Attributes:
        settings: how figures are computed.
        figures: the figures so far, in order.
        values: the values behind them, {id: {name: value}}.
    """

    settings: Settings
    figures: list[Figure] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    def mean(self, name: str, values: Mapping[str, float], better: str, unit: str = "") -> None:
        """Adds the mean of values by id, with its interval."""
        for id, value in values.items():
            self.values.setdefault(id, {})[name] = value
        self._interval(name, np.array(list(values.values())), np.mean, better, unit)

    def embeddings(self, name: str, found: Rows, wanted: Rows) -> None:
        """Adds distances of the sets; all windows of all sounds count.

        Raises:
            InputError: the sets are not equally wide.
        """
        _check_widths(name, found, wanted)
        got, true = (np.concatenate(list(rows.values())) for rows in (found, wanted))
        of_true = Moments.of(true)
        self._set(
            f"{name}.frechet_distance",
            lambda: frechet_distance(Moments.of(got), of_true),
            "lower",
            len(found),
        )
        if self.settings.fad_infinity:
            self._set(
                f"{name}.frechet_distance_infinity",
                lambda: frechet_distance_infinity(got, of_true, seed=self.settings.seed),
                "lower",
                len(found),
            )
        self._set(
            f"{name}.kernel_distance", lambda: kernel_distance(got, true), "lower", len(found)
        )

    def logits(self, name: str, found: Rows, wanted: Rows | None) -> None:
        """Adds the inception score with its spread, and the divergences of the pairs' classes.

        Raises:
            InputError: the sets are not equally wide, or an id has several rows.
        """
        _check_single(name, found)
        got = np.concatenate(list(found.values()))
        splits = self.settings.splits
        try:
            mean, spread = scores.inception_score(got, splits=splits, seed=self.settings.seed)
            note = f"standard deviation over {splits} parts {spread:.4g}"
        except ValueError as error:
            mean, note = None, str(error)
        self._add(Figure(f"{name}.inception_score", mean, "higher", count=len(found), note=note))
        if wanted is not None:
            self._paired(f"{name}.kl_softmax", scores.kl_softmax, found, wanted, "lower", "nats")
            self._paired(f"{name}.kl_sigmoid", scores.kl_sigmoid, found, wanted, "lower", "nats")

    def similarity(self, name: str, found: Rows, wanted: Rows) -> None:
        """Adds the mean cosine of pairs; for a sound of several windows the mean row counts.

        Raises:
            InputError: the sets are not equally wide, or a row is zero.
        """
        for side in (found, wanted):
            for id, rows in side.items():
                if not rows.mean(axis=0).any():
                    raise InputError(f"{name}: {id} is zero, wanted a direction")
        found, wanted = (
            {id: x.mean(0, keepdims=True) for id, x in r.items()} for r in (found, wanted)
        )
        self._paired(f"{name}.similarity", scores.cosine_similarity, found, wanted, "higher")

    def offsets(self, name: str, found: Rows) -> None:
        """Adds DeSync: the mean over sounds of their crops' mean absolute offset, in seconds."""
        limit = self.settings.offset_limit
        values = {
            id: float(np.abs(scores.offsets(rows, limit)).mean()) for id, rows in found.items()
        }
        self.mean(f"{name}.desync", values, "lower", "s")

    def onsets(self, name: str, counts: Sequence[Matches]) -> None:
        """Adds recall and precision over clips."""
        table = np.array([[c.matched, c.events, c.onsets] for c in counts])

        def total(rows: np.ndarray) -> Matches:
            return Matches(*rows.sum(axis=0).tolist())

        self._interval(f"{name}.onset_recall", table, lambda x: total(x).recall, "higher")
        self._interval(f"{name}.onset_precision", table, lambda x: total(x).precision, "higher")

    def _add(self, figure: Figure) -> None:
        if any(figure.name == other.name for other in self.figures):
            raise InputError(f"two figures would be called {figure.name}, wanted different names")
        self.figures.append(figure)

    def _set(self, name: str, compute: Callable[[], float], better: str, count: int) -> None:
        try:
            self._add(Figure(name, compute(), better, count=count))
        except ValueError as error:
            self._add(Figure(name, None, better, count=count, note=str(error)))

    def _paired(
        self,
        name: str,
        score: Callable[[np.ndarray, np.ndarray], np.ndarray],
        found: Rows,
        wanted: Rows,
        better: str,
        unit: str = "",
    ) -> None:
        _check_widths(name, found, wanted)
        _check_single(name, wanted)
        ids = [id for id in found if id in wanted]
        if not ids:
            self._add(Figure(name, None, better, unit, note="no id has both"))
            return
        values = score(*(np.concatenate([rows[id] for id in ids]) for rows in (found, wanted)))
        self.mean(name, dict(zip(ids, values.tolist(), strict=True)), better, unit)

    def _interval(
        self,
        name: str,
        values: np.ndarray,
        statistic: Callable[[np.ndarray], float],
        better: str,
        unit: str = "",
    ) -> None:
        if not len(values):
            self._add(Figure(name, None, better, unit, note="no sound has a value"))
            return
        s = self.settings
        found = scores.bootstrap(
            values, statistic, resamples=s.resamples, confidence=s.confidence, seed=s.seed
        )
        self._add(Figure(name, found.value, better, unit, len(values), found.low, found.high))


def _check_widths(name: str, found: Rows, wanted: Rows) -> None:
    widths = [next(iter(rows.values())).shape[1] for rows in (found, wanted) if rows]
    if len(set(widths)) > 1:
        raise InputError(f"{name}: generated rows are {widths[0]} wide, true ones {widths[1]}")


def _check_single(name: str, rows: Rows) -> None:
    for id, values in rows.items():
        if len(values) > 1:
            raise InputError(f"{name}: {id} has {len(values)} rows, wanted one")
