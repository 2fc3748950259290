"""A generated sound, and what can be done with it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.media import pictures
from wavflow.media.audio import save_wav
from wavflow.media.loudness import normalize_loudness
from wavflow.media.mux import mux


@dataclass(frozen=True)
class Sound:
    """A generated sound.

    Attributes:
        audio: the wave, (t,) float32 in [-1, 1], on the CPU.
        sample_rate: samples per second (Hz).
    """

    audio: Tensor
    sample_rate: int

    @property
    def seconds(self) -> float:
        """Length of the sound, in seconds."""
        return self.audio.numel() / self.sample_rate

    def loud(self, lufs: float = -23.0) -> Sound:
        """The same sound at an integrated loudness of `lufs` (ITU-R BS.1770)."""
        return Sound(normalize_loudness(self.audio, self.sample_rate, lufs), self.sample_rate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sound as 16-bit PCM, .wav or .flac by the suffix of `path`."""
        save_wav(path, self.audio, self.sample_rate)

    def save_video(self, video: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Writes a copy of `video` with this sound, as ``wavflow.media.mux.mux`` does."""
        mux(video, self.audio, self.sample_rate, path)

    def spectrogram(self, path: str | os.PathLike[str], width: float = 2.7) -> None:
        """Writes a PNG of the spectrogram, on a mel axis, `width` inches wide without its scales.

        Raises:
            InputError: matplotlib is not installed.
        """
        if not pictures.can_draw():
            raise InputError(f"spectrograms need matplotlib ({pictures.INSTALL})")
        column = ("", self.sample_rate, {"": self.audio})
        pictures.save(pictures.draw_spectrograms([column], width), path)
