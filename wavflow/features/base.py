"""What an encoder of video or text is, whatever stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from wavflow.features.video import FrameStream

TEXT_LENGTH = 77


class VideoEncoder(Protocol):
    """Turns decoded frames into appearance rows and motion rows.

    `streams` says which frames it wants from `wavflow.features.video.decode`; `encode` gets them
    in that order as uint8 (t 3 s s), decoded for the same `seconds`.
    """

    name: str
    clip_dim: int
    sync_dim: int
    streams: tuple[FrameStream, ...]

    def clip_rows(self, seconds: float) -> int: ...

    def sync_rows(self, seconds: float) -> int: ...

    def encode(self, frames: list[Tensor], seconds: float) -> tuple[Tensor, Tensor]:
        """Return clip features (clip_rows, clip_dim) and sync features (sync_rows, sync_dim),
        both float32 on the CPU."""
        ...


class TextEncoder(Protocol):
    """Turns captions into token features (b, length, dim); [""] gives the empty caption."""

    name: str
    dim: int
    length: int

    def encode(self, captions: list[str]) -> Tensor: ...  # (b 77 dim) float32


@dataclass(frozen=True)
class Encoders:
    """A video and a text encoder that belong together under one name."""

    name: str
    video: VideoEncoder
    text: TextEncoder


def get_encoders(name: str = "embedded") -> Encoders:
    """Make the encoders called `name`; ValueError for a name that does not exist."""
    if name == "embedded":
        from wavflow.features.embedded import EmbeddedText, EmbeddedVideo

        return Encoders(name, EmbeddedVideo(), EmbeddedText())
    raise ValueError(f"encoders {name!r} do not exist, wanted 'embedded'")
