"""Where in a longer recording a window may begin, for its sound and its features alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

from wavflow.base.errors import InputError
from wavflow.config.schema import DataConfig
from wavflow.data.tracks import Even, Segments, Track

# Encoders round a recording's length to whole rows, each in its own way.
LENGTH_TOLERANCE = Fraction(1, 3)


@dataclass(frozen=True)
class Place:
    """Where a window begins.

    Attributes:
        sample: index of the recording's sample that it begins with.
        rows: index of the row that it begins with, by key of the features.
    """

    sample: int
    rows: dict[str, int]


class Grid:
    """The places at which a window may begin: every `step` seconds, where its features begin whole.

    With tracks in segments (`wavflow.data.tracks.Segments`), Synchformer's every 0.32 s, a window
    may begin where a segment of each does; rows of other tracks begin with the one nearest in
    time. Else it may begin where a row of every track in time does: every 1/8 s for the embedded
    encoders' 8 and 24 rows a second. Without such tracks it may begin anywhere.

    Args:
        config: rate and duration of a clip, and how recordings are cropped.
        tracks: the clip's features.

    Raises:
        InputError: `crop` is "random" and the sizes give no whole number of rows a second, or of
            segments.
    """

    def __init__(self, config: DataConfig, tracks: Iterable[Track]) -> None:
        self.config = config
        self._timing: dict[str, Even | Segments] = {}
        self._tracks: dict[str, Track] = {}
        for track in tracks:
            if track.timing is not None:
                self._tracks[track.key], self._timing[track.key] = track, track.timing
        if config.crop == "random":
            self._check_sizes()
        segments = [t for t in self._timing.values() if isinstance(t, Segments)]
        steps = [timing.step for timing in segments or self._timing.values()]
        self.step = reduce(_least_multiple, steps) if steps else Fraction(0)
        # Rows from one place to the next.
        self._strides = {
            key: self.step / timing.step * timing.rows for key, timing in self._timing.items()
        }

    def places(self, samples: int, rows: Mapping[str, int]) -> int:
        """How many places there are in a recording; at least one.

        Args:
            samples: length of its sound, in samples.
            rows: number of rows of the features that it has, by key; others limit nothing.
        """
        data = self.config
        limits = [(samples - data.samples) // (self.step * data.target_sample_rate) + 1]
        for key, stride in self._strides.items():
            if key in rows:
                # Rounding takes a row for nearest up to half a row away.
                spare = rows[key] - self._tracks[key].rows + Fraction(1, 2)
                limits.append(math.ceil(spare / stride))
        return max(min(limits), 1)

    def place(self, number: int) -> Place:
        """The place with that number, counted from 0."""
        return Place(
            sample=int(number * self.step * self.config.target_sample_rate),
            rows={key: int(number * s + Fraction(1, 2)) for key, s in self._strides.items()},
        )

    def pick(self, chance: float, samples: int, rows: Mapping[str, int]) -> Place:
        """The place that `chance`, in (0, 1), picks in a recording.

        Args:
            chance: a random number; all places are equally likely.
            samples, rows: as in `places`; without rows of tracks in time every sample is a place.
        """
        if not self._tracks.keys() & rows.keys():
            return Place(int(chance * max(samples - self.config.samples + 1, 1)), {})
        return self.place(int(chance * self.places(samples, rows)))

    def check(self, where: object, rows: Mapping[str, int]) -> None:
        """Checks that features hold the rows of one window, or all rows of one longer recording.

        Args:
            where: what they were found in, for messages.
            rows: number of rows of each, by key; tracks without a place in time are not looked at.

        Raises:
            InputError: they do neither.
        """
        found = {key: rows[key] for key in self._tracks if key in rows}
        for key, count in found.items():
            wanted = self._tracks[key].rows
            if count < wanted:
                raise InputError(
                    f"{where}: {key} has {count} rows; wanted {wanted}, or more of a longer clip"
                )
        for key, count in found.items():
            timing, wanted = self._timing[key], self._tracks[key].rows
            if isinstance(timing, Segments) and (count - wanted) % timing.rows:
                raise InputError(
                    f"{where}: {key} has {count} rows; wanted {wanted} and whole segments of "
                    f"{timing.rows} more"
                )
        longer = {
            key: (count - self._tracks[key].rows) * self._timing[key].step / self._timing[key].rows
            for key, count in found.items()
        }
        first = next(iter(longer), None)
        for key, more in longer.items():
            if first is not None and abs(more - longer[first]) > LENGTH_TOLERANCE:
                raise InputError(
                    f"{where}: {first} has {found[first]} rows, {float(longer[first]):.2f} s more "
                    f"than a window, and {key} {found[key]}, {float(more):.2f} s more; wanted the "
                    "same length"
                )

    def _check_sizes(self) -> None:
        for key, track in self._tracks.items():
            timing, name = self._timing[key], track.setting or key
            if isinstance(timing, Segments):
                if track.rows % timing.rows:
                    raise InputError(
                        f"{name} is {track.rows}; random crops of segments want whole ones, of "
                        f"{timing.rows} rows"
                    )
            elif timing.rate.denominator != 1:
                raise InputError(
                    f"{name} is {track.rows} in {self.config.audio_duration:g} s; random crops "
                    "want a whole number of rows a second"
                )


def _least_multiple(one: Fraction, two: Fraction) -> Fraction:
    """The least common multiple of two steps."""
    return Fraction(
        math.lcm(one.numerator, two.numerator), math.gcd(one.denominator, two.denominator)
    )
