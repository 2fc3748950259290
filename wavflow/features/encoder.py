"""What an encoder of video or text is, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wavflow.media.video import FrameStream

TEXT_LENGTH = 77


class VideoEncoder(Protocol):
    """Turns decoded frames into appearance rows and motion rows.

    `streams` says which frames it wants from `wavflow.media.video.decode`; `encode` gets them
    in that order as uint8 (t 3 s s), decoded for the same `seconds`. `keys` are the names of
    its rows in a features file. `load` and `encode` may be called from many threads.
    """

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> tuple[str, str]: ...
    @property
    def clip_dim(self) -> int: ...
    @property
    def sync_dim(self) -> int: ...
    @property
    def streams(self) -> tuple[FrameStream, ...]: ...

    def clip_rows(self, seconds: float) -> int: ...

    def sync_rows(self, seconds: float) -> int: ...

    def load(self) -> None:
        """Get the weights ready now and not at the first `encode`; InputError if that fails."""
        ...

    def facts(self) -> dict[str, Any]:
        """What features depend on beside frames: names, dtype and the weights' SHA-256.

        A fact that is not known yet, as the SHA-256 of weights before they are fetched, is left
        out.
        """
        ...

    def encode(self, frames: list[Tensor], seconds: float) -> tuple[Tensor, Tensor]:
        """Return clip features (clip_rows, clip_dim) and sync features (sync_rows, sync_dim),
        both float32 on the CPU."""
        ...

    def encode_pieces(self, pieces: Iterable[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Encodes frames that come piece by piece and are not kept, as `encode` would all together.

        All pieces but the final one are whole seconds long; the length of all is that of the
        finest stream's frames.
        """
        ...


class TextEncoder(Protocol):
    """Turns captions into token features (b, length, dim); [""] gives the empty caption.

    `key` is their name in a features file.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def length(self) -> int: ...

    def load(self) -> None:
        """See `VideoEncoder.load`."""
        ...

    def facts(self) -> dict[str, Any]:
        """See `VideoEncoder.facts`."""
        ...

    def encode(self, captions: list[str]) -> Tensor: ...  # (b 77 dim) float32 on the CPU


@dataclass(frozen=True)
class Encoders:
    """A video and a text encoder that belong together, and what `get_encoders` calls them."""

    name: str
    video: VideoEncoder
    text: TextEncoder


def check_frames(frames: Sequence[Tensor], streams: Sequence[FrameStream], seconds: float) -> None:
    """Raises ValueError unless `frames` are what `streams` give of a clip of `seconds`."""
    for stream, given in zip(streams, frames, strict=True):
        wanted = (stream.count(seconds), 3, stream.size, stream.size)
        if tuple(given.shape) != wanted or given.dtype != torch.uint8:
            raise ValueError(
                f"frames at {stream.fps} fps are {given.dtype} {tuple(given.shape)}, "
                f"wanted torch.uint8 {wanted}"
            )
