"""What the demo shows: report.png, and the pictures and videos of its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavflow.base.files import atomic_write, read_json
from wavflow.demo.score import CONTROLS, FULL, MODES, QUICK, SHIPPED, WANTED
from wavflow.media.audio import load_audio
from wavflow.media.mux import mux

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What is heard of a clip, in order, and how it is called: the true sound, the packaged network's
#: by what it was given, and that of a network trained in the demo, from video and caption.
TITLES = {
    "true": "true sound",
    "vt2a": "from video and caption",
    "v2a": "from the video alone",
    "t2a": "from the caption alone",
    QUICK: "trained here, briefly",
    FULL: "trained here",
}
#: Sounds that are also put to their videos.
FILMED = ("vt2a", "v2a")
FIGURES = {
    "onset_recall": "onset recall",
    "onset_precision": "onset precision",
    "class_accuracy": "kind of sound",
}
#: Clips per kind on the page, and in the picture.
ON_PAGE, IN_PICTURE = 3, 1

_RANGE = 60.0  # dB
_INK, _PAPER, _MARK = "#1c2430", "#ffffff", "#7df9ff"
_COLOURS = {"vt2a": "#3b6fb6", "v2a": "#2a9d8f", "t2a": "#e9a23b"}
_COLOURS |= {QUICK: "#8d6bb5", FULL: "#8d6bb5"}
_GREYS = dict(zip(CONTROLS, ("#c9d0d8", "#98a2ae"), strict=True))


@dataclass(frozen=True)
class Clip:
    """A held-out clip as it is shown.

    Attributes:
        id, kind, caption: what it is.
        events: seconds at which something is struck.
        sounds: {a key of TITLES: path}.
    """

    id: str
    kind: str
    caption: str
    events: list[float]
    sounds: dict[str, str]

    def marks(self, sound: str) -> list[float]:
        """Seconds of the impacts that a sound could follow: none where it was made without them."""
        return [] if sound == "t2a" else self.events


def chosen(entries: list[dict[str, Any]], per_kind: int, how: str | None) -> list[Clip]:
    """Clips to show, `per_kind` of each kind: the first with most events.

    Args:
        entries: events.json.
        per_kind: how many.
        how: the series of the training whose sounds are shown too, or None; clips that lack them
            are left out.
    """
    by_id: dict[str, Clip] = {}
    for entry in entries:
        sound = entry["mode"] if entry["series"] == SHIPPED else entry["series"]
        if sound not in (*MODES, how) or (sound == how and entry["mode"] != "vt2a"):
            continue
        clip = by_id.setdefault(
            entry["id"],
            Clip(
                entry["id"],
                entry["kind"],
                entry["caption"],
                entry["events"],
                {"true": entry["true"]},
            ),
        )
        clip.sounds[sound] = entry["generated"]
    shown: dict[str, list[Clip]] = {}
    for clip in by_id.values():
        if how is not None and how not in clip.sounds:
            continue
        shown.setdefault(clip.kind, []).append(clip)
    rows = []
    for group in shown.values():
        rows += sorted(group, key=lambda clip: -min(len(clip.events), 2))[:per_kind]
    return rows


def spectrogram(wave: np.ndarray, rate: int) -> np.ndarray:  # (bins, frames) in [0, 1]
    """Levels between 60 dB below the loudest point and that point, low frequencies first."""
    window, hop = max(rate // 40, 8), max(rate // 200, 1)
    spectrum = torch.stft(
        torch.as_tensor(wave, dtype=torch.float32), 2 * window, hop,
        window=torch.hann_window(2 * window), pad_mode="constant", return_complex=True,
    )  # fmt: skip
    level = 20 * torch.log10(spectrum.abs() + 1e-9)
    if level.max() < -60:
        return np.zeros(tuple(level.shape))
    return ((level - level.max()) / _RANGE + 1).clamp(0, 1).numpy()


def draw_pictures(out: Path, metrics: dict[str, Any], losses: Sequence[tuple[int, float]]) -> None:
    """Writes report.png, and for the page img/ (spectrograms) and video/ (videos with sound).

    Args:
        out: the demo's folder, with events.json and wav/.
        metrics: what metrics.json holds.
        losses: (step, loss) pairs of the training, if there was one.
    """
    from matplotlib.image import imsave

    entries = read_json(out / "events.json")
    how = trained_how(metrics)
    _draw_report(out, chosen(entries, IN_PICTURE, how), metrics, losses)
    for clip in chosen(entries, ON_PAGE, how):
        for sound, path in clip.sounds.items():
            wave, rate = read(out / path)
            lit = spectrogram(wave, rate)[::-1]
            with atomic_write(image(out, clip, sound), durable=False) as file:
                picture: Any = file
                imsave(picture, lit, cmap="magma", format="png", vmin=0, vmax=1)
            if sound in FILMED:
                target = film(out, clip, sound)
                target.parent.mkdir(parents=True, exist_ok=True)
                mux(out / "toy" / "videos" / f"{clip.id}.mp4", torch.from_numpy(wave), rate, target)


def trained_how(metrics: dict[str, Any]) -> str | None:
    """The series of the demo's training, if there was one."""
    return metrics["training"] and metrics["training"]["how"]


def describe_training(training: dict[str, Any]) -> str:
    """A training of the demo in words."""
    return (
        f"{training['steps']} steps in {training['seconds']:.0f} s on this machine, "
        f"{training['parameters'] / 1e6:.1f} M parameters"
    )


def image(out: Path, clip: Clip, sound: str) -> Path:
    """The file of the spectrogram of one sound of a clip."""
    return out / "img" / f"{clip.id}.{sound}.png"


def film(out: Path, clip: Clip, sound: str) -> Path:
    """The file of the clip's video with one of its sounds."""
    return out / "video" / f"{clip.id}.{sound}.mp4"


def read(path: Path) -> tuple[np.ndarray, int]:
    """The samples (t,) float32 of a wav file, and its rate in Hz."""
    import soundfile

    with soundfile.SoundFile(path) as file:
        rate = int(file.samplerate)
    return load_audio(path, rate).numpy(), rate


def _draw_report(
    out: Path, clips: list[Clip], metrics: dict[str, Any], losses: Sequence[tuple[int, float]]
) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style = {
        "font.size": 9,
        "axes.edgecolor": "#9aa3ad",
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": "#5b6570",
        "ytick.color": "#5b6570",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    training = metrics["training"]
    with rc_context(style):
        shown = list(clips[0].sounds)
        wide, tall = 2.9 * len(shown) + 0.6, 1.75 * len(clips) + 5.0
        left, right = 0.5 / wide, 1 - 0.15 / wide
        figure = Figure(figsize=(wide, tall), facecolor=_PAPER)
        figure.text(
            left, 1 - 0.3 / tall, "Sounds for videos and captions that no network here has met",
            fontsize=14, fontweight="bold", va="center",
        )  # fmt: skip
        grid = figure.add_gridspec(
            len(clips), len(shown), left=left, right=right, top=1 - 1.4 / tall,
            bottom=3.75 / tall, wspace=0.06, hspace=0.3,
        ).subplots(sharex=True, sharey=True, squeeze=False)  # fmt: skip
        for row, (line, clip) in enumerate(zip(grid, clips, strict=True)):
            for axes, sound in zip(line, shown, strict=True):
                _draw_spectrogram(axes, *read(out / clip.sounds[sound]), clip.marks(sound))
                if row == 0:
                    axes.annotate(
                        "from video and caption" if sound in (QUICK, FULL) else TITLES[sound],
                        (0.5, 1), (0, 20), xycoords="axes fraction", textcoords="offset points",
                        ha="center", fontsize=10.5, color=_COLOURS.get(sound, _INK),
                        fontweight="bold",
                    )  # fmt: skip
            line[0].set_title(f"“{clip.caption}”", fontsize=9.5, loc="left", style="italic")
            line[0].set_ylabel("kHz")
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
        weights = metrics["weights"]
        heads = [(1, 3, f"packaged network ({weights['file']}, {weights['steps']} steps)", _INK)]
        if training is not None:
            short = f"trained here: {training['steps']} steps, {training['seconds']:.0f} s"
            heads.append((4, 4, short, _COLOURS[QUICK]))
        for first, last, text, colour in heads:
            begin = grid[0][first].get_position().x0
            end = grid[0][last].get_position().x1
            figure.text(
                (begin + end) / 2, 1 - 0.78 / tall, text, ha="center", va="center", fontsize=10.5,
                color=colour,
            )  # fmt: skip
            figure.add_artist(
                Line2D(
                    [begin, end], [1 - 0.92 / tall] * 2, color=colour, lw=1,
                    transform=figure.transFigure,
                )
            )  # fmt: skip
        below = figure.add_gridspec(
            1, 2, left=left, right=right, top=2.95 / tall, bottom=0.62 / tall, wspace=0.09,
            width_ratios=[1, 2.4] if training else [0.001, 1],
        )  # fmt: skip
        if training is not None:
            _draw_losses(figure.add_subplot(below[0]), losses, training)
        _draw_figures(figure.add_subplot(below[1]), metrics)
        with atomic_write(out / "report.png") as file:
            figure.savefig(file, dpi=120, format="png")


def _draw_spectrogram(axes: Axes, wave: np.ndarray, rate: int, events: Sequence[float]) -> None:
    seconds = len(wave) / rate
    axes.imshow(
        spectrogram(wave, rate), origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=1,
        extent=(0, seconds, 0, rate / 2000), interpolation="bilinear",
    )  # fmt: skip
    for time in events:
        axes.axvline(time, color=_MARK, lw=0.9, ls=(0, (2, 3)), alpha=0.9)
    axes.plot(
        events, [1.0] * len(events), "v", color=_MARK, ms=7, mec=_INK, mew=0.7,
        transform=axes.get_xaxis_transform(), clip_on=False,
    )  # fmt: skip
    axes.set_xticks(np.arange(0, seconds - 0.25, 0.5))
    axes.spines[:].set_visible(False)


def _draw_losses(axes: Axes, losses: Sequence[tuple[int, float]], training: dict[str, Any]) -> None:
    steps, values = np.array(losses, dtype=float).reshape(-1, 2).T
    axes.plot(steps, values, color="#b9c4d0", lw=1)
    if len(values) > 4:
        width = min(max(len(values) // 8, 3), len(values))
        smooth = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(steps[width - 1 :], smooth, color=_COLOURS[QUICK], lw=2)
    axes.set_title(
        f"training loss: {describe_training(training)}",
        fontsize=10, loc="left", color=_COLOURS[QUICK],
    )  # fmt: skip
    if len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#e6eaee")


def _draw_figures(axes: Axes, metrics: dict[str, Any]) -> None:
    labels, at = [], 0.0
    how = trained_how(metrics)
    for name, title in FIGURES.items():
        modes = [mode for mode in MODES if name in WANTED[mode]]
        begun = at

        def bar(value: float, label: str, colour: str, wanted: float | None = None) -> None:
            nonlocal at
            axes.bar(at, value, 0.8, color=colour)
            axes.text(at, value + 0.015, f"{value:.2f}", ha="center", fontsize=8.5)
            if wanted is not None:
                axes.plot([at - 0.4, at + 0.4], [wanted] * 2, color=_INK, lw=1.6)
            labels.append((at, label, colour))
            at += 1

        for mode in modes:
            bar(metrics[SHIPPED][mode][name], mode.upper(), _COLOURS[mode], WANTED[mode][name])
        if how is not None:
            wanted = WANTED["vt2a"][name] if how == FULL else None
            bar(metrics[how]["vt2a"][name], "trained\nhere", _COLOURS[how], wanted)
        for control, colour in _GREYS.items():
            value = float(np.mean([metrics[control][mode][name] for mode in modes]))
            bar(value, control.replace("un", "un-\n").replace("shuf", "shuf-\n"), colour)
        axes.text((begun + at - 1) / 2, 1.13, title, ha="center", fontsize=10.5, fontweight="bold")
        axes.plot(
            [begun - 0.45, at - 0.55],
            [metrics["chance"][name]] * 2,
            color="#c0392b",
            lw=1.2,
            ls=":",
        )
        at += 0.8
    axes.plot([], [], color=_INK, lw=1.6, label="wanted")
    axes.plot([], [], color="#c0392b", lw=1.2, ls=":", label="chance")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, -0.29), ncols=2, frameon=False, fontsize=8.5
    )
    axes.set_xticks([x for x, _, _ in labels], [label for _, label, _ in labels], fontsize=8)
    for tick, (_, _, colour) in zip(axes.get_xticklabels(), labels, strict=True):
        tick.set_color("#5b6570" if colour in _GREYS.values() else colour)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color="#e6eaee")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, at - 1.2)
