"""Captions of the toy world: varied words, and sentence patterns kept for held-out clips."""

from __future__ import annotations

import numpy as np

_NOUNS = {
    "bell": ("bell", "brass bell", "golden bell", "metal bell"),
    "drum": ("drum", "red drum", "kettle drum", "bass drum"),
    "steam": ("steam valve", "steam pipe", "boiler valve", "air valve"),
    "bird": ("bird", "green bird", "toy bird", "little bird"),
}
_VERBS = {
    "bell": ("rings", "chimes", "dings", "tolls"),
    "drum": ("booms", "thumps", "thuds", "pounds"),
    "steam": ("hisses", "puffs", "sprays", "blows steam"),
    "bird": ("chirps", "tweets", "whistles", "peeps"),
}
_NAMES = {
    "bell": ("ring", "chime", "ding", "clang"),
    "drum": ("boom", "thump", "thud", "drum beat"),
    "steam": ("hiss", "puff", "burst of steam", "blast of air"),
    "bird": ("chirp", "tweet", "whistle", "peep"),
}
_SIZES = {False: ("big", "large", "low"), True: ("small", "little", "high")}
_FORCES = {False: ("softly", "gently", "quietly"), True: ("loudly", "hard", "sharply")}
_COUNTS = {1: ("once", "one time"), 2: ("twice", "two times"), 3: ("three times", "thrice")}

TRAIN_PATTERNS = (
    "a {size} {noun} {verb} {force} {count}",
    "the {noun} {verb} {count}",
    "a mallet hits a {size} {noun} {count}",
    "{noun} struck {force}, a {name}",
    "the {name} of a {noun}",
    "someone strikes the {noun} {force} and it {verb}",
    "sound of a {size} {noun}: {name}",
    "{count} a {noun} {verb} {force}",
)
HELDOUT_PATTERNS = (
    "we hear how the {size} {noun} {verb} {count}",
    "hit {force} by a mallet, this {noun} {verb}",
    "here comes a {name} from the {size} {noun}",
    "the mallet strikes and a {noun} gives a {name} {count}",
    "a {noun} is hit {count}, what a {name}",
)


def describe(
    rng: np.random.Generator, kind: str, count: int, strength: float, pitch: float, heldout: bool
) -> str:
    """One sentence about a clip; what it says of size, force and number is true."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    pattern = pick(HELDOUT_PATTERNS if heldout else TRAIN_PATTERNS)
    size = pick(_SIZES[pitch > 0.5]) if abs(pitch - 0.5) > 0.2 else ""
    force = pick(_FORCES[strength > 0.5]) if abs(strength - 0.5) > 0.2 else ""
    times = pick(_COUNTS.get(count, ("many times",))) if rng.random() < 0.7 else ""
    sentence = pattern.format(
        size=size,
        force=force,
        count=times,
        noun=pick(_NOUNS[kind]),
        verb=pick(_VERBS[kind]),
        name=pick(_NAMES[kind]),
    )
    return " ".join(sentence.replace(" ,", ",").replace(" :", ":").split())
