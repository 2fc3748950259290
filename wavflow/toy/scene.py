"""A toy clip as it is drawn by chance: what is struck, when, how it looks and sounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wavflow.toy.words import describe

KINDS = ("bell", "drum", "steam", "bird")

FPS = 25

#: Impacts are never closer than this, nor nearer to the clip's ends, in frames.
GAP, LEAD, TAIL = 7, 3, 7


@dataclass(frozen=True)
class Scene:
    """What happens in one clip, before it is drawn, sounded and described."""

    id: str
    split: str
    kind: str
    impacts: tuple[int, ...]  # frames
    strength: float  # 0 soft .. 1 hard
    pitch: float  # 0 low and big, 0.5 between, 1 high and small
    caption: str
    video_exist: bool
    text_exist: bool
    entropy: tuple[int, ...]

    @property
    def times(self) -> list[float]:
        """When the impacts are, in seconds."""
        return [impact / FPS for impact in self.impacts]

    def rng(self, purpose: int) -> np.random.Generator:
        """A generator of random numbers for one purpose: the sound is 1, the picture 2."""
        return np.random.default_rng([*self.entropy, purpose])


def is_heldout_schedule(impacts: tuple[int, ...]) -> bool:
    """Whether a schedule is for held-out clips: no clip of the training has such a timing."""
    return sum(impacts) % 7 == 3


def _schedule(rng: np.random.Generator, frames: int, heldout: bool) -> tuple[int, ...]:
    last = frames - TAIL
    most = max(1, round(1.5 * frames / FPS))
    while True:
        count = int(rng.integers(1, most + 1))
        slack = last - LEAD - (count - 1) * GAP
        if slack < 0:
            continue
        offsets = np.sort(rng.integers(0, slack + 1, count))
        impacts = tuple(int(LEAD + o + i * GAP) for i, o in enumerate(offsets))
        if is_heldout_schedule(impacts) == heldout:
            return impacts


def make_scene(seed: int, split: str, index: int, seconds: float) -> Scene:
    """The scene of one clip: a function of its arguments alone. `split` is "train" or "heldout".

    Kinds take turns. Of the training clips every third is text-only and every tenth video-only.
    """
    heldout = split == "heldout"
    entropy = (seed, int(heldout), index)
    rng = np.random.default_rng([*entropy, 0])
    kind = KINDS[index % len(KINDS)]
    impacts = _schedule(rng, round(seconds * FPS), heldout)
    strength, pitch = float(rng.random()), float(rng.integers(3)) / 2
    turn = index // len(KINDS)  # so that every kind has its share of each sort of row
    text_only = not heldout and turn % 3 == 1
    video_only = not heldout and turn % 30 in (3, 12, 20)
    caption = describe(rng, kind, len(impacts), strength, pitch, heldout)
    return Scene(
        id=f"{split}_{index:05d}",
        split=split,
        kind=kind,
        impacts=impacts,
        strength=strength,
        pitch=pitch,
        caption="" if video_only else caption,
        video_exist=not text_only,
        text_exist=not video_only,
        entropy=entropy,
    )
