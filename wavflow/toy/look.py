"""The looks of the toy world: sprites drawn from signed distances, pasted frame by frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from wavflow.toy.scene import Scene

_EPS = 1e-6


def _plane(half: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(-half, half + 1, dtype=np.float32)
    return axis[None, :], axis[:, None]  # x to the right, y down


def _disc(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    """Coverage 0..1 of an ellipse."""
    radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + _EPS)
    return np.clip(0.5 + (1 - radius) * min(rx, ry), 0, 1)


def _box(
    x: np.ndarray, y: np.ndarray, x0: float, x1: float, y0: float, y1: float, flare: float = 0.0
) -> np.ndarray:
    """Coverage of a rectangle whose sides lean outwards by `flare` pixels towards the bottom."""
    lean = flare * (y - y0) / max(y1 - y0, _EPS)
    inside = np.minimum(np.minimum(x - (x0 - lean), (x1 + lean) - x), np.minimum(y - y0, y1 - y))
    return np.clip(inside + 0.5, 0, 1)


class _Sprite:
    """A picture with coverage, square with its centre in the middle."""

    def __init__(self, half: int) -> None:
        self.half = half
        self.colour = np.zeros((2 * half + 1, 2 * half + 1, 3), np.float32)
        self.alpha = np.zeros((2 * half + 1, 2 * half + 1, 1), np.float32)

    def add(self, coverage: np.ndarray, colour: np.ndarray) -> None:
        cover = coverage[..., None].astype(np.float32)
        self.colour += cover * (colour.astype(np.float32) - self.colour)
        self.alpha = np.maximum(self.alpha, cover)

    def paste(self, frame: np.ndarray, cx: float, cy: float, glow: float = 0.0) -> None:
        """Blend into `frame` (h w 3) at whole pixels, cut at its borders; glow 1 is white."""
        left, top = round(cx) - self.half, round(cy) - self.half
        size = 2 * self.half + 1
        x0, x1 = max(0, -left), min(size, frame.shape[1] - left)
        y0, y1 = max(0, -top), min(size, frame.shape[0] - top)
        if x0 >= x1 or y0 >= y1:
            return
        colour, alpha = self.colour[y0:y1, x0:x1], self.alpha[y0:y1, x0:x1]
        if glow > 0:
            colour = colour + glow * (255.0 - colour)
        target = frame[top + y0 : top + y1, left + x0 : left + x1]
        target += alpha * (colour - target)


def _shade(rng: np.random.Generator, red: float, green: float, blue: float) -> np.ndarray:
    colour = np.array([red, green, blue]) * rng.uniform(0.85, 1.1) + rng.uniform(-15, 15, 3)
    return np.clip(colour, 0, 255)


def _target(kind: str, r: float, rng: np.random.Generator) -> _Sprite:
    """The struck object, about `r` pixels in radius."""
    half = int(1.6 * r) + 2
    sprite = _Sprite(half)
    x, y = _plane(half)
    if kind == "bell":
        body = _shade(rng, 225, 175, 40)
        sprite.add(_disc(x, y, 0, 0.9 * r, 0.22 * r, 0.22 * r), body * 0.5)  # clapper
        sprite.add(_disc(x, y, 0, -0.3 * r, 0.55 * r, 0.7 * r), body)
        sprite.add(_box(x, y, -0.55 * r, 0.55 * r, -0.3 * r, 0.8 * r, 0.4 * r), body)
        sprite.add(_box(x, y, -1.05 * r, 1.05 * r, 0.65 * r, 0.85 * r), body * 0.7)
    elif kind == "drum":
        body = _shade(rng, 190, 40, 35)
        sprite.add(_disc(x, y, 0, 0.8 * r, 1.1 * r, 0.35 * r), body * 0.8)
        sprite.add(_box(x, y, -1.1 * r, 1.1 * r, -0.5 * r, 0.8 * r), body)
        for at in (-0.75, -0.25, 0.25, 0.75):
            sprite.add(_box(x, y, (at - 0.04) * r, (at + 0.04) * r, -0.5 * r, r), body * 0.5)
        sprite.add(_disc(x, y, 0, -0.5 * r, 1.1 * r, 0.35 * r), _shade(rng, 225, 215, 195))
    elif kind == "steam":
        body = _shade(rng, 70, 110, 175)
        sprite.add(_box(x, y, -0.3 * r, 0.3 * r, -0.9 * r, 1.1 * r), body)  # pipe
        sprite.add(_box(x, y, -1.1 * r, 1.1 * r, 0.0, 0.5 * r), body * 0.8)
        sprite.add(_box(x, y, -0.65 * r, 0.65 * r, -1.0 * r, -0.7 * r), body * 0.6)
    else:
        body = _shade(rng, 60, 170, 70)
        sprite.add(_disc(x, y, 0.0, 0.25 * r, 0.95 * r, 0.75 * r), body)
        sprite.add(_disc(x, y, -0.15 * r, 0.35 * r, 0.5 * r, 0.35 * r), body * 0.65)  # wing
        sprite.add(_disc(x, y, 0.55 * r, -0.45 * r, 0.5 * r, 0.5 * r), body)
        beak = np.clip(0.35 * r - np.abs(y + 0.4 * r) - 0.45 * (x - 0.95 * r) + 0.5, 0, 1)
        sprite.add(beak * (x > 0.9 * r), _shade(rng, 235, 140, 30))
        sprite.add(_disc(x, y, 0.65 * r, -0.55 * r, 0.12 * r, 0.12 * r), np.zeros(3))
    return sprite


def _mallet(rng: np.random.Generator, side: int) -> _Sprite:
    """A ball on a stick that points away from what it hits."""
    sprite = _Sprite(16)
    x, y = _plane(16)
    stick = np.clip(1.5 - np.abs(y + 0.6 * side * x) / 1.17, 0, 1) * (side * x > 0)
    sprite.add(stick, _shade(rng, 120, 85, 50))
    sprite.add(_disc(x, y, 0, 0, 5, 5), _shade(rng, 205, 180, 165))
    return sprite


def _background(rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """A dull gradient with soft blots that drift, and grain: (frames side side 3) float32."""
    x, y = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    base = rng.uniform(35, 95, 3) + rng.uniform(-15, 15, 3)
    slope = rng.uniform(-25, 25, 2)
    still = (base + (slope[0] * x + slope[1] * y)[..., None]).astype(np.float32)
    blots = np.zeros((side, side), np.float32)
    for _ in range(5):
        fx, fy = rng.integers(1, 4, 2)
        blots += np.cos(2 * np.pi * (fx * x + fy * y + rng.random()))
    grain = rng.normal(0, 1.5, (side, side)).astype(np.float32)
    drift = rng.uniform(-0.6, 0.6, 2)
    movie = np.empty((frames, side, side, 3), np.float32)
    for j in range(frames):
        shift = (round(drift[0] * j), round(drift[1] * j))
        layer = np.roll(2.5 * blots, shift, (0, 1))
        layer += np.roll(grain, tuple(rng.integers(0, side, 2)), (0, 1))
        np.add(still, layer[..., None], out=movie[j])
    return movie


def draw(scene: Scene, frames: int, side: int) -> np.ndarray:  # (t side side 3) uint8
    """Draw a clip. Frame j shows the moment j/25 s: in an impact's frame the mallet touches."""
    rng = scene.rng(2)
    movie = _background(rng, frames, side)
    size = side / 96
    r = (19.0 - 5.0 * scene.pitch) * size * rng.uniform(0.95, 1.05)
    cx = side * rng.uniform(0.38, 0.62)
    cy = side * rng.uniform(0.52, 0.68)
    hand = 1 if rng.random() < 0.5 else -1  # the side the mallet comes from
    target, mallet = _target(scene.kind, r, rng), _mallet(rng, hand)
    touch = np.array([cx + hand * 0.62 * r, cy - 0.92 * r])
    away = np.array([hand * rng.uniform(16, 22), -rng.uniform(12, 18)]) * size
    puff = _Sprite(int(1.6 * r))
    px, py = _plane(puff.half)
    jolt = (2.0 + 2.5 * scene.strength) * size
    # A swing: back for 3 frames, then waiting, then 4 frames of acceleration up to the impact.
    approach = np.array([1.0, 0.92, 0.75, 0.45, 0.0])
    rebound = np.array([0.0, 0.35, 0.65, 0.85, 1.0])
    for j in range(frames):
        since = min((j - i for i in scene.impacts if j >= i), default=99)
        until = min((i - j for i in scene.impacts if i >= j), default=99)
        back = rebound[since] if since < 5 else 1.0
        if until < 5:
            back = min(back, approach[4 - until])
        shake = jolt * (0.6**since) * (1 if since % 2 == 0 else -1) if since < 6 else 0.0
        if since < 7 and scene.kind == "steam":
            spread = (0.5 + 0.14 * since) * r
            cloud = 0.85 * (1 - since / 7) * _disc(px, py, 0, 0, spread, spread)
            puff.alpha[..., 0], puff.colour[...] = cloud, 235.0
            puff.paste(movie[j], cx - hand * (0.5 + 0.1 * since) * r, cy - (1.2 + 0.12 * since) * r)
        lift = -1.5 * shake if scene.kind == "bird" else shake
        glow = (0.35 + 0.25 * scene.strength) * 0.45**since if since < 4 else 0.0
        target.paste(movie[j], cx - hand * 0.6 * shake, cy + lift, glow)
        sway = np.array([0.0, 1.2 * np.sin(0.35 * j + scene.pitch * 6)])
        mallet.paste(movie[j], *(touch + back * (away + sway)))
    return np.clip(movie + 0.5, 0, 255).astype(np.uint8)
