"""The demo's report: report.png to look at, report.html to listen to."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavflow.audio import load_audio
from wavflow.demo.score import CONTROLS, MODES, WANTED, read_json
from wavflow.demo.sounds import FILMED, put_to_video
from wavflow.files import atomic_write

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
    padded = torch.nn.functional.pad(torch.as_tensor(wave, dtype=torch.float32), (window, window))
    spectrum = torch.stft(
        padded, 2 * window, hop, 2 * window, torch.hann_window(2 * window), False,
        return_complex=True,
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
        for mode, path in _sounds(modes).items():
            wave, rate = _read(out / path)
            with atomic_write(_image(out, modes, mode), durable=False) as file:
                imsave(
                    file, spectrogram(wave, rate)[::-1], cmap="magma", format="png", vmin=0, vmax=1
                )
            video = out / "toy" / "videos" / f"{modes['vt2a']['id']}.mp4"
            if mode in FILMED:
                put_to_video(video, torch.from_numpy(wave), rate, _film(out, modes, mode))


def _sounds(modes: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {"true": modes["vt2a"]["true"]} | {mode: modes[mode]["generated"] for mode in MODES}


def _image(out: Path, modes: dict[str, dict[str, Any]], mode: str) -> Path:
    return out / "img" / f"{modes['vt2a']['id']}.{mode}.png"


def _film(out: Path, modes: dict[str, dict[str, Any]], mode: str) -> Path:
    return out / "video" / f"{modes['vt2a']['id']}.{mode}.mp4"


def _read(path: Path) -> tuple[np.ndarray, int]:
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
        figure = Figure(
            figsize=(13, 1.75 * len(rows) + 4.1), facecolor=_PAPER, layout="constrained"
        )
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.75 * len(rows) + 0.5, 3.2])
        top.suptitle(
            "Sounds for videos and captions the model has never met, and the true ones",
            fontsize=13, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        grid = top.subplots(len(rows), 4, sharex=True, sharey=True, squeeze=False)
        for line, modes in zip(grid, rows, strict=True):
            for axes, (mode, path) in zip(line, _sounds(modes).items(), strict=True):
                _draw_spectrogram(axes, *_read(out / path), modes["vt2a"]["events"])
                if line is grid[0]:
                    axes.annotate(
                        TITLES[mode], (0.5, 1), (0, 18), xycoords="axes fraction",
                        textcoords="offset points", ha="center", fontsize=10.5,
                        color=_COLOURS.get(mode, _INK), fontweight="bold",
                    )  # fmt: skip
            line[0].set_title(
                f"“{modes['vt2a']['caption']}”", fontsize=9.5, loc="left", style="italic"
            )
            line[0].set_ylabel("kHz")
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
        left, right = bottom.subplots(1, 2, width_ratios=[1, 1.9])
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
        axes.axvline(time, color=_MARK, lw=1.1, ls=(0, (3, 2)))
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
            labels.append((at, control, "#5b6570"))
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
        loc="lower right", bbox_to_anchor=(1.0, -0.34), ncols=2, frameon=False, fontsize=8.5
    )
    axes.set_xticks([x for x, _, _ in labels], [label for _, label, _ in labels], fontsize=8.5)
    for tick, (_, _, colour) in zip(axes.get_xticklabels(), labels, strict=True):
        tick.set_color(colour)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color="#e6eaee")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, at - 1.2)


def write_page(out: Path, metrics: dict[str, Any]) -> None:
    """Writes report.html: the figures, and what `draw_pictures` made, to play without a server.

    Args:
        out: the demo's folder.
        metrics: what metrics.json holds.
    """
    rows = chosen(read_json(out / "events.json"), ON_PAGE)
    page = _PAGE.format(
        summary=_summary(metrics),
        tables=_tables(metrics),
        clips="\n".join(_card(out, modes) for modes in rows),
    )
    with atomic_write(out / "report.html", "w") as file:
        file.write(page)


def _summary(metrics: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(metrics["seconds_total"]), 60)
    return html.escape(
        f"A network of {metrics['parameters'] / 1e6:.1f} M parameters, trained for "
        f"{metrics['train_steps']} steps in {metrics['seconds_train']:.0f} s "
        f"({metrics['dtype']}, {metrics['device_name']}, {metrics['threads']} threads); "
        f"the whole demo took {minutes} min {seconds:02d} s. Seed {metrics['seed']}."
    )


def _tables(metrics: dict[str, Any]) -> str:
    def cell(values: dict[str, float], name: str, bar: str = "") -> str:
        if name not in values:
            return "<td class=none>–</td>"
        verdict = metrics["bars"].get(f"{bar}.{name}")
        mark = "" if verdict is None else " class=" + ("yes" if verdict["passed"] else "no")
        wanted = "" if verdict is None else f"<small>{html.escape(verdict['wanted'])}</small>"
        return f"<td{mark}>{values[name]:.3f}{wanted}</td>"

    def row(title: str, values: dict[str, float], bar: str = "") -> str:
        cells = "".join(cell(values, name, bar) for name in FIGURES)
        return f"<tr><th>{html.escape(title)}</th>{cells}</tr>"

    lines = [row(f"{mode.upper()}, {TITLES[mode]}", metrics[mode], mode) for mode in MODES]
    for control in CONTROLS:
        lines += [
            row(f"{control} {mode.upper()}", values, f"{control}.{mode}")
            for mode, values in metrics["controls"][control].items()
        ]
    lines.append(row("chance: true sounds, other clips’ events", metrics["chance"]))
    lines.append(row("ceiling: true sounds, their own events", metrics["ceiling"]))
    head = "".join(f"<th>{title}</th>" for title in FIGURES.values())
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _card(out: Path, modes: dict[str, dict[str, Any]]) -> str:
    clip = modes["vt2a"]
    films = "".join(
        f"<figure><video controls preload=metadata src='{_link(out, _film(out, modes, mode))}'>"
        f"</video><figcaption>sound {html.escape(TITLES[mode])}</figcaption></figure>"
        for mode in FILMED
    )
    sounds = []
    for mode, path in _sounds(modes).items():
        wave, rate = _read(out / path)
        marks = "".join(
            f"<i style='left:{100 * time * rate / len(wave):.2f}%'></i>" for time in clip["events"]
        )
        sounds.append(
            f"<div class='sound {mode}'><h3>{html.escape(TITLES[mode])}</h3>"
            f"<div class=picture><img alt='spectrogram' src='{_link(out, _image(out, modes, mode))}'>"
            f"{marks}<b></b></div>"
            f"<audio controls preload=metadata src='{html.escape(path, quote=True)}'></audio></div>"
        )
    return (
        f"<section><header><h2>“{html.escape(clip['caption'])}”</h2>"
        f"<p>{html.escape(clip['kind'])}, {len(clip['events'])} events, {html.escape(clip['id'])}</p>"
        f"</header><div class=films>{films}</div><div class=sounds>{''.join(sounds)}</div></section>"
    )


def _link(out: Path, path: Path) -> str:
    return html.escape(path.relative_to(out).as_posix(), quote=True)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>wavflow demo</title>
<style>
:root {{ color-scheme: light; --ink: #1c2430; --soft: #64707d; --line: #dfe4ea; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 2rem 1.2rem 4rem; color: var(--ink);
  background: #f6f7f9; font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0 0 .3rem; font-size: 1.8rem; }}
p {{ margin: .2rem 0; color: var(--soft); max-width: 75ch; }}
a {{ color: #3b6fb6; }}
table {{ border-collapse: collapse; margin: 1.2rem 0; background: #fff; border-radius: 8px;
  overflow: hidden; box-shadow: 0 1px 3px #0001; }}
th, td {{ padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }}
th:first-child {{ text-align: left; font-weight: 500; }}
thead th {{ font-weight: 600; background: #eef1f5; }}
td small {{ color: var(--soft); margin-left: .6rem; }}
td.none {{ color: #b6bec7; }}
td.yes::before {{ content: "✓ "; color: #2a8f5a; }}
td.no {{ color: #b3261e; font-weight: 600; }}
td.no::before {{ content: "✗ "; }}
details summary {{ cursor: pointer; color: var(--soft); }}
details img {{ max-width: 100%; border-radius: 8px; margin-top: .6rem; }}
section {{ background: #fff; border-radius: 10px; padding: 1rem 1.2rem 1.2rem; margin-top: 1.2rem;
  box-shadow: 0 1px 3px #0001; display: grid; grid-template-columns: 200px 1fr; gap: .8rem 1.4rem; }}
header {{ grid-column: 1 / -1; display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; }}
h2 {{ font-size: 1.1rem; margin: 0; font-style: italic; font-weight: 600; }}
h3 {{ font-size: .85rem; margin: 0 0 .3rem; font-weight: 600; }}
.vt2a h3 {{ color: #3b6fb6; }} .v2a h3 {{ color: #1f8175; }} .t2a h3 {{ color: #b87a17; }}
figure {{ margin: 0 0 .6rem; }}
figcaption {{ font-size: .78rem; color: var(--soft); }}
video {{ width: 200px; aspect-ratio: 1; border-radius: 6px; background: #000; display: block; }}
.sounds {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem; }}
.picture {{ position: relative; height: 130px; overflow: hidden; border-radius: 6px; }}
.picture img {{ width: 100%; height: 100%; display: block; }}
.picture i {{ position: absolute; top: 0; bottom: 0; border-left: 2px dashed #7df9ff; opacity: .85; }}
.picture b {{ position: absolute; top: 0; bottom: 0; left: 0; border-left: 2px solid #fff; opacity: 0; }}
audio {{ width: 100%; height: 34px; margin-top: .35rem; }}
@media (max-width: 760px) {{ section {{ grid-template-columns: 1fr; }}
  .sounds {{ grid-template-columns: 1fr; }} .films {{ display: flex; gap: .8rem; }}
  table {{ font-size: .8rem; }} th, td {{ padding: .3rem .4rem; }} }}
</style>
</head>
<body>
<h1>wavflow demo</h1>
<p>{summary}</p>
<p>Every clip below is unseen: its timing and its wording occur in no training clip. Dashed lines
mark the moments at which something is struck in the video. An onset counts when it lies within
50 ms of such a moment; the kind of sound is judged by a classifier fitted on true training
audio.</p>
{tables}
<p>Everything here can be recomputed from <a href="events.json">events.json</a> and the wavs it
names; the figures are in <a href="metrics.json">metrics.json</a>.</p>
<details><summary>all in one picture</summary><img src="report.png" alt="spectrograms of true and
generated sounds, loss curve, figures"></details>
{clips}
<script>
for (const audio of document.querySelectorAll("audio")) {{
  const head = audio.parentElement.querySelector("b");
  const move = () => {{
    head.style.opacity = audio.paused ? 0 : 1;
    head.style.left = 100 * audio.currentTime / (audio.duration || 1) + "%";
    if (!audio.paused) requestAnimationFrame(move);
  }};
  audio.addEventListener("play", () => {{
    for (const other of document.querySelectorAll("audio, video"))
      if (other !== audio) other.pause();
    move();
  }});
  for (const name of ["pause", "ended", "seeked"]) audio.addEventListener(name, move);
  audio.parentElement.querySelector(".picture").addEventListener("click", () => audio.play());
}}
</script>
</body>
</html>
"""
