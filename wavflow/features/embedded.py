"""Encoders that need no weights: fixed functions of frames and of words.

They are meant for small models on simple videos. The same input gives the same features in every
process and on every machine, up to rounding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from wavflow.features.encoder import TEXT_LENGTH, check_frames
from wavflow.media.video import FrameStream

#: Number of the functions below, raised when they change: features of one revision go together.
REVISION = 1
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_GRID = 4  # pictures are summed up in 4 x 4 cells


# Features pass two gated MLPs on their way, each of which squares what is small: of features with
# unit variance a deviation of 0.006 arrives, and a short training never hears of it. With these
# gains it is 0.5.
_TEXT_GAIN, _CLIP_GAIN = 2.5, 4.0


def _hashed(text: str, dim: int) -> Tensor:  # (dim,) float32
    """A vector of length 1 whose entries are +-1/sqrt(dim), by the bits of a hash of `text`."""
    shake = hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest((dim + 7) // 8)
    bits = [(byte >> i) & 1 for byte in shake for i in range(8)][:dim]
    return (torch.tensor(bits, dtype=torch.float32) * 2 - 1) / dim**0.5


class EmbeddedText:
    """Words as hashed vectors: encode(captions) -> (b, 77, 64) float32 of one length.

    Row 0 is a start vector, rows 1.. are the words, and every row after the last word holds the
    caption's mean word (a causal text transformer's rows after the end token also know the whole
    text). A word is the sum of vectors for itself, for its first four letters and for its letter
    trigrams, so that forms of one word lie close together; a caption nobody has seen is near to
    captions that share words with it.
    """

    name = "embedded-text"
    key = "text_features"
    dim = 64
    length = TEXT_LENGTH

    def __init__(self) -> None:
        self._words: dict[str, Tensor] = {}
        self._start = _hashed("start of text", self.dim)
        self._empty = _hashed("empty text", self.dim)
        position = torch.arange(self.length, dtype=torch.float32)[:, None]
        rate = 1000.0 ** (-torch.arange(self.dim // 2, dtype=torch.float32) / (self.dim // 2))
        code = torch.cat([torch.sin(position * rate), torch.cos(position * rate)], dim=1)
        self._positions = 0.1 * code / (self.dim / 2) ** 0.5

    def _word(self, word: str) -> Tensor:
        if word not in self._words:
            marked = f"<{word}>"
            grams = sorted({marked[i : i + 3] for i in range(len(marked) - 2)})
            vector = _hashed("word " + word, self.dim) + _hashed("head " + word[:4], self.dim)
            parts = torch.stack([_hashed("gram " + gram, self.dim) for gram in grams])
            vector = vector + 0.8 * parts.sum(dim=0) / len(grams) ** 0.5
            self._words[word] = vector / vector.norm()
        return self._words[word]

    def load(self) -> None:
        """There are no weights."""

    def facts(self) -> dict[str, Any]:
        """See `VideoEncoder.facts`."""
        return {"encoder": self.name, "revision": REVISION}

    def encode(self, captions: list[str]) -> Tensor:  # (b 77 64)
        if isinstance(captions, str):
            raise TypeError("captions is a str, wanted a list of str")
        features = torch.empty(len(captions), self.length, self.dim)
        for rows, caption in zip(features, captions, strict=True):
            words = _WORD.findall(caption.lower())[: self.length - 1]
            rows[0] = self._start
            rows[1:] = self._empty
            if words:
                vectors = torch.stack([self._word(word) for word in words])
                mean = vectors.mean(dim=0)
                rows[1:] = mean / mean.norm().clamp_min(1e-6)
                rows[1 : 1 + len(words)] = vectors
        return _TEXT_GAIN * self.dim**0.5 * (features + self._positions)


def _squash(x: Tensor, gain: float) -> Tensor:
    """Compress amplitudes, keeping the sign: slope 6 `gain` at 0, logarithmic far out."""
    return 6 * torch.sign(x) * torch.log1p(gain * x.abs())


class EmbeddedVideo:
    """Features that say when things move, and what colours and edges there are.

    Sync features (8 * round(3 * seconds), 4): row r describes the time [r/24, (r+1)/24) s. The
    change from frame j-1 to frame j (25 fps) happens at j/25 s and goes into that time's row: f,
    the picture's mean absolute change and how much that has grown since the frame before. f stands
    in the row as [(1 - p) f, p f], where p in [0, 1) is the time's place inside the row: their sum
    says how much, their ratio when. What it is that moves is left to the clip features: of motion
    that also gives away the kind of thing, a network learns to ignore captions.

    Clip features (floor(8 * seconds), 64): colours and edges of one frame, randomly projected.
    """

    name = "embedded-video"
    keys = ("clip_features", "sync_features")
    clip_dim = 64
    sync_dim = 4
    streams = (FrameStream(8, 32, "squash"), FrameStream(25, 32, "squash"))

    def __init__(self) -> None:
        width = 4 * _GRID * _GRID + 13
        signs = torch.stack([_hashed(f"appearance {i}", width) for i in range(width)])
        q, r = torch.linalg.qr(signs.double())
        # With a positive diagonal of r the factors are unique, whatever LAPACK is there.
        self._project = (q * r.diagonal().sign())[:, : self.clip_dim].float()

    def clip_rows(self, seconds: float) -> int:
        return self.streams[0].count(seconds)

    def sync_rows(self, seconds: float) -> int:
        return 8 * round(3 * seconds)

    def load(self) -> None:
        """There are no weights."""

    def facts(self) -> dict[str, Any]:
        """See `VideoEncoder.facts`."""
        return {"encoder": self.name, "revision": REVISION}

    def encode(self, frames: list[Tensor], seconds: float) -> tuple[Tensor, Tensor]:
        """Encodes frames of `streams`, uint8 (t 3 32 32), to clip and sync features, float32."""
        check_frames(frames, self.streams, seconds)
        return self._features([frames], seconds)

    def encode_pieces(self, pieces: Iterable[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """See `VideoEncoder.encode_pieces`."""
        return self._features(pieces, None)

    def _features(
        self, pieces: Iterable[list[Tensor]], seconds: float | None
    ) -> tuple[Tensor, Tensor]:
        pictures, changes, last = [], [], None
        for picture, motion in pieces:
            pictures.append(self._appearance(picture))
            motion = motion if last is None else torch.cat([last, motion])
            changes.append(self._change(motion))
            last = motion[-1:].clone()
        energy = torch.cat(changes)
        if seconds is None:
            seconds = (1 + len(energy)) / self.streams[1].fps
        sync = self._motion(energy, self.sync_rows(seconds))
        return _CLIP_GAIN * (torch.cat(pictures) @ self._project), sync

    def _change(self, frames: Tensor) -> Tensor:  # (t 3 s s) -> (t-1)
        change = frames[1:].float().sub_(frames[:-1]).div_(255)
        return change.abs().mean(dim=(1, 2, 3))

    def _motion(self, energy: Tensor, rows: int) -> Tensor:  # (t-1) -> (rows 4)
        before = torch.cat([torch.zeros_like(energy[:1]), energy[:-1]])
        what = _squash(torch.stack([energy, energy - before], dim=1), 50)  # (t-1 2)
        # Exact in integers: frame j lies in row 24j // 25, at (24j % 25) / 25 of its length.
        time = 24 * torch.arange(1, 1 + len(energy))
        row, place = time // 25, (time % 25 / 25)[:, None]
        kept = row < rows
        sync = torch.zeros(rows, self.sync_dim)
        return sync.index_add_(
            0, row[kept], torch.cat([(1 - place) * what, place * what], dim=1)[kept]
        )

    def _appearance(self, frames: Tensor) -> Tensor:  # (t 3 s s) -> (t 77)
        picture = frames.float().div_(255)
        grey = picture.mean(dim=1)
        colours = adaptive_avg_pool2d(picture, _GRID)
        colours = colours - picture.mean(dim=(2, 3), keepdim=True)
        edges = torch.zeros_like(grey)
        edges[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
        edges[:, :, 1:] += (grey[:, :, 1:] - grey[:, :, :-1]).abs()
        edges = adaptive_avg_pool2d(edges, _GRID)
        # How much of the picture has each of 12 hues, by how colourful it is there.
        red, green, blue = picture.unbind(1)
        angle = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)
        colourful = picture.amax(dim=1) - picture.amin(dim=1)
        centres = torch.arange(12) * (torch.pi / 6)
        nearness = torch.cos(angle[:, None] - centres[:, None, None]).clamp_min(0) ** 8
        hues = (nearness * (colourful**2)[:, None]).mean(dim=(2, 3))
        return torch.cat(
            [
                8 * colours.flatten(1),
                20 * (edges.flatten(1) - 0.04),
                8 * (hues * 20).log1p(),
                4 * (picture.mean(dim=(1, 2, 3)) - 0.25)[:, None],
            ],
            dim=1,
        )
