"""Which features a clip has, and how their rows lie in time."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from fractions import Fraction

#: What a table says of a clip, in the column `<flag>_exist`.
FLAGS = ("video", "text")


@dataclass(frozen=True)
class Even:
    """Rows that follow one another in time, so many a second.

    Attributes:
        rate: rows a second.
    """

    rate: Fraction

    @property
    def rows(self) -> int:
        """Number of rows that begin together."""
        return 1

    @property
    def step(self) -> Fraction:
        """Seconds from one beginning to the next."""
        return 1 / self.rate


@dataclass(frozen=True)
class Segments:
    """Rows in segments that may overlap.

    Attributes:
        rows: number of rows of a segment; they begin together.
        step: seconds from the beginning of a segment to that of the next.
    """

    rows: int
    step: Fraction


@dataclass(frozen=True)
class Track:
    """One kind of features: rows of numbers, under one key of a features file.

    Attributes:
        key: name in a features file and in a batch.
        rows: number of rows of one clip.
        width: numbers in a row.
        flag: which of FLAGS says whether a clip has it.
        timing: how the rows lie in time; None where they have no place in it, as a caption's.
        setting: the configuration's key that says `rows`, for messages; by default `key`.
    """

    key: str
    rows: int
    width: int
    flag: str = "video"
    timing: Even | Segments | None = None
    setting: str = ""

    def __post_init__(self) -> None:
        if self.flag not in FLAGS:
            raise ValueError(f"{self.key}: flag is {self.flag!r}, wanted {' or '.join(FLAGS)}")
        if self.name in ("", "wave", "json") or "." in self.key:
            raise ValueError(f"track {self.key!r}: a pack has another use for that name")

    @property
    def name(self) -> str:
        """What the members of a pack call it: the key without `_features`."""
        return self.key.removesuffix("_features")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width) of one clip."""
        return self.rows, self.width


def flags(tracks: Iterable[Track]) -> tuple[str, ...]:
    """The flags of these tracks, each once, in the order of FLAGS."""
    used = {track.flag for track in tracks}
    return tuple(flag for flag in FLAGS if flag in used)


def present(tracks: Iterable[Track], keys: Container[str]) -> set[str]:
    """Flags of the tracks whose keys are among `keys`."""
    return {track.flag for track in tracks if track.key in keys}


def columns(tracks: Iterable[Track]) -> tuple[str, ...]:
    """Columns that a training table must have."""
    used = flags(tracks)
    features = ("features_path", *(f"{flag}_exist" for flag in used)) if used else ()
    return ("id", "audio_path", *features)
