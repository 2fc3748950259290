"""What sampling asks of a system: a field to follow, and who turns requests into what it needs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wavflow.sampling.scene import Features, Scene


@dataclass(frozen=True)
class Size:
    """How long a sound is, in seconds, samples and tokens.

    Attributes:
        seconds: what was asked for.
        rate: samples per second.
        token_size: samples of a token.
    """

    seconds: float
    rate: int
    token_size: int

    @property
    def samples(self) -> int:
        """Samples of the sound."""
        return round(self.rate * self.seconds)

    @property
    def tokens(self) -> int:
        """Tokens of the sound, ceil(samples / token_size)."""
        return math.ceil(self.samples / self.token_size)

    @property
    def token_rate(self) -> Fraction:
        """Tokens per second."""
        return Fraction(self.rate, self.token_size)


class Known(NamedTuple):
    """What is known of a sound before it is generated.

    Attributes:
        tokens: (n d) float32 at t = 1, anything where unknown.
        mask: (n,) bool, True where known.
    """

    tokens: Tensor
    mask: Tensor


class Conditions(Protocol):
    """What a field is told of b sounds of one size: a frozen dataclass, some of it tensors."""

    def expand(self, batch: int) -> Any:
        """One sound's conditions repeated `batch` times, as views."""
        ...

    def cat(self, *others: Any) -> Any:
        """The sounds of all, one after the other."""
        ...


class Field(Protocol):
    """The right side of an ordinary differential equation from noise, t = 0, to sound, t = 1.

    States are (b n d) float32: n tokens of d numbers. One field serves sounds of every size.

    Attributes:
        prediction: what the network predicts: "x", the state at t = 1, or "v", the velocity.
    """

    prediction: str

    @property
    def device(self) -> torch.device:
        """Where states and conditions lie."""
        ...

    def start(self, seeds: Tensor, first: int, tokens: int) -> Tensor:
        """Tokens [first, first + tokens) of the states at t = 0, (b tokens d) float32.

        A token depends on its seed and its place alone, not on other seeds or on `first`.

        seeds: (b,) int64, one for each state.
        """
        ...

    def conditions(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> Any:
        """The conditions of sounds of one size."""
        ...

    def empty(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> Any:
        """What guidance leads these sounds away from, as conditions."""
        ...

    def predict(self, t: Tensor, x: Tensor, conditions: Any) -> Tensor:
        """The prediction (b n d) for states x (b n d) at a 0-d t."""
        ...

    def predict_pair(
        self, t: Tensor, x: Tensor, conditions: Any, empty: Any
    ) -> tuple[Tensor, Tensor]:
        """Predictions (b n d) with conditions and with empty ones, as `predict` gives them."""
        ...

    def among(self, rank: int, size: int) -> None:
        """From now on `size` processes share the tokens of every state; 1 shares nothing."""
        ...

    def key(self, conditions: Any) -> Hashable:
        """What a captured graph depends on beside the shapes of its states."""
        ...

    def bytes(self, size: Size, guided: bool) -> int:
        """An upper estimate of the memory that one sound of that size takes."""
        ...

    def waves(self, states: Tensor, samples: int | None = None, gain: float = 1.0) -> Tensor:
        """The waves (b samples) of states (b n d) at t = 1, whole tokens where `samples` is None.

        gain: how many times as loud as the sound the states are.
        """
        ...


class Maker(Protocol):
    """Turns what is asked for into what a field needs.

    Attributes:
        seconds: length of the clips that the network was trained on.
    """

    seconds: float

    @property
    def field(self) -> Field:
        """The field that leads from noise to these sounds."""
        ...

    def size(self, seconds: float) -> Size:
        """How long a sound of so many seconds is; InputError where there can be none."""
        ...

    def encode(
        self,
        caption: str | None,
        video: Path | None,
        negative_caption: str | None,
        seconds: float,
        window: float | None,
    ) -> Features:
        """The features of one sound; what is not given is absent.

        Args:
            caption, video, negative_caption: what is heard, what is seen, what guidance leads away
                from.
            seconds: length of the sound.
            window: seconds of the windows that it is made of, None where it is made at once.
        """
        ...

    def check(self, row: int, features: Mapping[str, Tensor], size: Size) -> None:
        """Raises InputError, naming the row, unless these are features of one sound of `size`."""
        ...

    def scene(self, features: Mapping[str, Tensor], window: Size) -> Scene:
        """The features of the windows of a sound, out of those of the whole sound."""
        ...

    def known(self, wave: Tensor, kept: Tensor, tokens: int) -> tuple[Known, float]:
        """What is known of a sound: its tokens of which every sample is kept; and their gain.

        Args:
            wave: (t,) samples from the sound's beginning on; fewer or more than the tokens'.
            kept: (t,) bool, which of them are known; the level is theirs alone.
            tokens: how many tokens the sound has.
        """
        ...
