"""What a sound is generated from: features of all of it, or of its windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor


@dataclass(frozen=True)
class Scene:
    """Features of the windows of one sound.

    Attributes:
        text: features that all windows have alike.
        video: gives the features of the window that begins at so many seconds; None without a
            video.
        grid: seconds, of which every window's beginning is a multiple.
    """

    text: Mapping[str, Tensor]
    video: Callable[[Fraction], dict[str, Tensor]] | None = None
    grid: Fraction = Fraction(1, 25)

    def window(self, time: Fraction) -> Mapping[str, Tensor]:
        """Features of the window that begins at `time`; the same mapping wherever they are equal.

        Raises:
            InputError: the video cannot be decoded there.
        """
        return self.text if self.video is None else {**self.text, **self.video(time)}


#: Features of one sound as a features file holds them, or of the windows of a long sound.
Features = Mapping[str, Tensor] | Scene
