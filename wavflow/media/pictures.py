"""The look of pictures, and how sound is drawn: needs matplotlib (``wavflow[demo]``)."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wavflow.base.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, RULE = "#1f2430", "#6b7280", "#e5e7eb"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}
INSTALL = "pip install 'wavflow[demo]'"

RANGE = 70.0  # dB that a spectrogram shows
BANDS = 128


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Writes a PNG, atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=dpi, format="png")


def mel(hertz: float) -> float:
    """Mels of a frequency in Hz: linear below about 1 kHz, logarithmic above (O'Shaughnessy)."""
    return 2595 * math.log10(1 + hertz / 700)


def mel_level(wave: Tensor, rate: int) -> Tensor:  # (bands, frames)
    """Power in dB of `wave` (t,), in bands evenly spaced in mel from 0 Hz to half of `rate`.

    Frames of 50 ms every 10 ms. A band is the mean of its triangle's bins, so that noise of even
    power is even in the picture too.
    """
    size = max(rate // 20, 16)
    window = torch.hann_window(size, dtype=torch.float64)
    spectrum = torch.stft(
        wave.detach().double().cpu(),
        size,
        max(rate // 100, 1),
        window=window,
        pad_mode="constant",
        return_complex=True,
    )
    power = (spectrum.abs() / window.sum()).square()
    top = mel(rate / 2)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.arange(len(power), dtype=torch.float64) * rate / size
    width = rate / size  # bands narrower than a bin take the nearest two
    low = torch.minimum(edges[:-2], edges[1:-1] - width)[:, None]
    high = torch.maximum(edges[2:], edges[1:-1] + width)[:, None]
    middle = edges[1:-1, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
    triangles = triangles.clamp(min=0)
    return 10 * torch.log10(triangles @ power / triangles.sum(1, keepdim=True) + 1e-12)


def draw_spectrograms(
    columns: Sequence[tuple[str, int, dict[str, Tensor]]], width: float = 2.7
) -> Figure:
    """Draws spectrograms on a mel axis: one column a clip, one row a kind of sound.

    Args:
        columns: (title, rate in Hz, {name of the row: wave (t,)}) of every clip; one of them has
            all rows. Levels are in dB below the loudest point of a clip's first row.
        width: width of a column, in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = max((list(waves) for _, _, waves in columns), key=len)
    with rc_context(STYLE):
        size = (width * len(columns) + 1.6, 1.9 * len(names) + 0.7)
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(names), len(columns), squeeze=False)
        for place, (title, rate, waves) in enumerate(columns):
            levels = {name: mel_level(wave, rate) for name, wave in waves.items()}
            loudest = float(next(iter(levels.values())).max())
            for row, name in enumerate(names):
                axes = grid[row, place]
                if name not in levels:
                    axes.set_axis_off()
                    continue
                seconds = len(waves[name]) / rate
                image = axes.imshow(
                    (levels[name] - loudest).numpy(),
                    origin="lower",
                    aspect="auto",
                    cmap="magma",
                    vmin=-RANGE,
                    vmax=0,
                    extent=(0, seconds, 0, mel(rate / 2)),
                )
                _mel_axis(axes, rate)
                axes.tick_params(length=2, labelleft=place == 0, labelbottom=row == len(names) - 1)
                axes.spines[:].set_visible(False)
                if place == 0:
                    axes.set_ylabel(f"{name}\nHz")
            grid[0, place].set_title(_short(title), loc="left", fontsize=9)
            grid[-1, place].set_xlabel("seconds")
        bar = figure.colorbar(image, ax=grid, aspect=30, pad=0.01, label="dB")
        bar.outline.set_visible(False)
    return figure


def _mel_axis(axes: Axes, rate: int) -> None:
    ticks = [hertz for hertz in (0, 250, 500, 1000, 2000, 4000, 8000, 16000) if hertz <= rate / 2]
    axes.set_yticks([mel(hertz) for hertz in ticks], [f"{hertz}" for hertz in ticks])


def _short(text: str, most: int = 32) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
