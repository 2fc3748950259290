"""What the demo shows: report.png, and the pictures and videos of its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavflow.audio import load_audio
from wavflow.demo.score import CONTROLS, MODES, WANTED
from wavflow.demo.sounds import FILMED, put_to_video
from wavflow.files import atomic_write, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "true": "true sound",
    "vt2a": "from video and caption",
    "v2a": "from the video alone",
    "t2a": "from the caption alone",
}
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


def chosen(clips: list[dict[str, Any]], per_kind: int) -> list[dict[str, dict[str, Any]]]:
    """Clips to show, `per_kind` of each kind, as {mode: entry}: the first with most events."""
    by_id: dict[str, dict[str, dict[str, Any]]] = {}
    for clip in clips:
        if clip["control"] is None:
            by_id.setdefault(clip["id"], {})[clip["mode"]] = clip
    shown: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for modes in by_id.values():
        shown.setdefault(next(iter(modes.values()))["kind"], []).append(modes)
    rows = []
    for group in shown.values():
        group = sorted(group, key=lambda modes: -min(len(modes["vt2a"]["events"]), 2))
        rows += group[:per_kind]
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
        metrics: what metrics.json holds; the figures and `train_steps` are drawn.
        losses: (step, loss) pairs of the training.
    """
    from matplotlib.image import imsave

    clips = read_json(out / "events.json")
    _draw_report(out, chosen(clips, IN_PICTURE), metrics, losses)
    for modes in chosen(clips, ON_PAGE):
        for mode, path in sounds(modes).items():
            wave, rate = read(out / path)
            with atomic_write(image(out, modes, mode), durable=False) as file:
                picture: Any = file
                imsave(
                    picture,
                    spectrogram(wave, rate)[::-1],
                    cmap="magma",
                    format="png",
                    vmin=0,
                    vmax=1,
                )
            video = out / "toy" / "videos" / f"{modes['vt2a']['id']}.mp4"
            if mode in FILMED:
                put_to_video(video, torch.from_numpy(wave), rate, film(out, modes, mode))


def sounds(modes: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is heard of a clip, {"true" or mode: path}."""
    return {"true": modes["vt2a"]["true"]} | {mode: modes[mode]["generated"] for mode in MODES}


def image(out: Path, modes: dict[str, dict[str, Any]], mode: str) -> Path:
    """The spectrogram of one sound of a clip."""
    return out / "img" / f"{modes['vt2a']['id']}.{mode}.png"


def film(out: Path, modes: dict[str, dict[str, Any]], mode: str) -> Path:
    """The clip's video with the sound of one mode."""
    return out / "video" / f"{modes['vt2a']['id']}.{mode}.mp4"


def read(path: Path) -> tuple[np.ndarray, int]:
    """Samples (t,) float32 and rate of a wav."""
    import soundfile

    with soundfile.SoundFile(path) as file:
        rate = int(file.samplerate)
    return load_audio(path, rate).numpy(), rate


def _draw_report(
    out: Path,
    rows: list[dict[str, dict[str, Any]]],
    metrics: dict[str, Any],
    losses: Sequence[tuple[int, float]],
) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

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
    with rc_context(style):
        tall = 1.75 * len(rows) + 4.6
        figure = Figure(figsize=(13, tall), facecolor=_PAPER)
        figure.text(
            0.035, 1 - 0.3 / tall, "Sounds for videos and captions the model has never met",
            fontsize=14, fontweight="bold", va="center",
        )  # fmt: skip
        grid = figure.add_gridspec(
            len(rows), 4, left=0.035, right=0.99, top=1 - 1.0 / tall, bottom=3.75 / tall,
            wspace=0.06, hspace=0.3,
        ).subplots(sharex=True, sharey=True, squeeze=False)  # fmt: skip
        for row, (line, modes) in enumerate(zip(grid, rows, strict=True)):
            for axes, (mode, path) in zip(line, sounds(modes).items(), strict=True):
                events = [] if mode == "t2a" else modes[mode if mode in modes else "vt2a"]["events"]
                _draw_spectrogram(axes, *read(out / path), events)
                if row == 0:
                    axes.annotate(
                        TITLES[mode], (0.5, 1), (0, 20), xycoords="axes fraction",
                        textcoords="offset points", ha="center", fontsize=10.5,
                        color=_COLOURS.get(mode, _INK), fontweight="bold",
                    )  # fmt: skip
            line[0].set_title(
                f"“{modes['vt2a']['caption']}”", fontsize=9.5, loc="left", style="italic"
            )
            line[0].set_ylabel("kHz")
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
        below: Any = figure.add_gridspec(
            1, 2, left=0.035, right=0.99, top=2.95 / tall, bottom=0.62 / tall, wspace=0.09,
            width_ratios=[1, 1.9],
        ).subplots()  # fmt: skip
        left, right = below
        _draw_losses(left, losses, metrics)
        _draw_figures(right, metrics)
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


def _draw_losses(axes: Axes, losses: Sequence[tuple[int, float]], metrics: dict[str, Any]) -> None:
    steps, values = np.array(losses, dtype=float).reshape(-1, 2).T
    axes.plot(steps, values, color="#b9c4d0", lw=1)
    if len(values) > 4:
        width = min(max(len(values) // 8, 3), len(values))
        smooth = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(steps[width - 1 :], smooth, color=_COLOURS["vt2a"], lw=2)
    axes.set_title(
        f"training loss: {metrics['train_steps']} steps, {metrics['parameters'] / 1e6:.1f} M "
        f"parameters, {metrics['seconds_train']:.0f} s",
        fontsize=10, loc="left",
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
    for name, title in FIGURES.items():
        modes = [mode for mode in MODES if name in WANTED[mode]]
        begun = at
        for mode in modes:
            value = metrics[mode][name]
            axes.bar(at, value, 0.8, color=_COLOURS[mode])
            axes.text(at, value + 0.015, f"{value:.2f}", ha="center", fontsize=8.5)
            axes.plot([at - 0.4, at + 0.4], [WANTED[mode][name]] * 2, color=_INK, lw=1.6)
            labels.append((at, mode.upper(), _COLOURS[mode]))
            at += 1
        for control, colour in zip(CONTROLS, ("#c9d0d8", "#98a2ae"), strict=True):
            value = np.mean([metrics["controls"][control][mode][name] for mode in modes])
            axes.bar(at, value, 0.8, color=colour)
            axes.text(at, value + 0.015, f"{value:.2f}", ha="center", fontsize=8.5)
            labels.append(
                (at, control.replace("un", "un-\n").replace("shuf", "shuf-\n"), "#5b6570")
            )
            at += 1
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
        tick.set_color(colour)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color="#e6eaee")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, at - 1.2)
