"""report.html: the demo's figures and sounds, to play without a server."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from wavflow.base.files import atomic_write, read_json
from wavflow.demo.report import (
    FIGURES,
    FILMED,
    ON_PAGE,
    TITLES,
    Clip,
    chosen,
    describe_training,
    film,
    image,
    read,
    trained_how,
)
from wavflow.demo.score import FULL, MODES, NAMES, QUICK, SERIES


def write_page(out: Path, metrics: dict[str, Any]) -> None:
    """Writes report.html: the figures, and what `draw_pictures` made, to play without a server.

    Args:
        out: the demo's folder.
        metrics: what metrics.json holds.
    """
    clips = chosen(read_json(out / "events.json"), ON_PAGE, trained_how(metrics))
    page = _PAGE.format(
        summary=_summary(metrics),
        training=_training(metrics["training"]),
        tables=_tables(metrics),
        clips="\n".join(_card(out, clip) for clip in clips),
    )
    with atomic_write(out / "report.html", "w") as file:
        file.write(page)


def _summary(metrics: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(metrics["seconds_total"]), 60)
    weights, kept = metrics["weights"], ", ".join(metrics["reused"])
    return html.escape(
        f"The network that comes with the package ({weights['file']}, "
        f"{weights['parameters'] / 1e6:.1f} M parameters, {weights['steps']} steps of training), "
        f"run on this machine: {metrics['dtype']}, {metrics['device_name']}, "
        f"{metrics['threads']} threads, seed {metrics['seed']}. The demo took {minutes} min "
        f"{seconds:02d} s up to this report" + (f"; {kept} from an earlier run." if kept else ".")
    )


def _training(training: dict[str, Any] | None) -> str:
    if training is None:
        return ""
    end = {
        QUICK: "too short a training to be judged: it is here to be heard and compared.",
        FULL: "judged as the packaged network is.",
    }[training["how"]]
    return html.escape(
        f"“{TITLES[training['how']]}” is another network of the same kind, trained from nothing "
        f"while this report was made: {describe_training(training)}; {end}"
    )


def _tables(metrics: dict[str, Any]) -> str:
    def cell(values: dict[str, float], name: str, bar: str = "") -> str:
        if name not in values:
            return "<td class=none>–</td>"
        verdict = metrics["bars"].get(f"{bar}.{name}")
        mark = "" if verdict is None else " class=" + ("yes" if verdict["passed"] else "no")
        wanted = "" if verdict is None else f"<small>{_sign(verdict['wanted'])}</small>"
        return f"<td{mark}>{values[name]:.3f}{wanted}</td>"

    def row(title: str, values: dict[str, float], bar: str = "") -> str:
        cells = "".join(cell(values, name, bar) for name in FIGURES)
        return f"<tr><th>{html.escape(title)}</th>{cells}</tr>"

    lines = [
        row(f"{NAMES[series]}, {TITLES[mode]}", metrics[series][mode], f"{series}.{mode}")
        for series in SERIES
        if series in metrics
        for mode in MODES
    ]
    lines.append(row("chance: true sounds, other clips’ events", metrics["chance"]))
    lines.append(row("ceiling: true sounds, their own events", metrics["ceiling"]))
    head = "".join(f"<th>{title}</th>" for title in FIGURES.values())
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _sign(wanted: str) -> str:
    return wanted.replace(">=", "≥").replace("<=", "≤")


def _card(out: Path, clip: Clip) -> str:
    films = "".join(
        f"<figure><video controls preload=metadata src='{_link(out, film(out, clip, sound))}'>"
        f"</video><figcaption>sound {html.escape(TITLES[sound])}</figcaption></figure>"
        for sound in FILMED
    )
    heard = []
    for sound, path in clip.sounds.items():
        wave, rate = read(out / path)
        marks = "".join(
            f"<i style='left:{100 * time * rate / len(wave):.2f}%'></i>"
            for time in clip.marks(sound)
        )
        picture = _link(out, image(out, clip, sound))
        heard.append(
            f"<div class='sound {sound}'><h3>{html.escape(TITLES[sound])}</h3>"
            f"<div class=picture><img alt='spectrogram' src='{picture}'>"
            f"{marks}<b></b></div>"
            f"<audio controls preload=metadata src='{_link(out, out / path)}'></audio></div>"
        )
    about = html.escape(f"{clip.kind}, {len(clip.events)} events, {clip.id}")
    return (
        f"<section><header><h2>“{html.escape(clip.caption)}”</h2><p>{about}</p></header>"
        f"<div class=films>{films}</div><div class=sounds>{''.join(heard)}</div></section>"
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
  box-shadow: 0 1px 3px #0001; display: grid; grid-template-columns: 200px 1fr;
  gap: .8rem 1.4rem; }}
header {{ grid-column: 1 / -1; display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; }}
h2 {{ font-size: 1.1rem; margin: 0; font-style: italic; font-weight: 600; }}
h3 {{ font-size: .85rem; margin: 0 0 .3rem; font-weight: 600; }}
.vt2a h3 {{ color: #3b6fb6; }} .v2a h3 {{ color: #1f8175; }} .t2a h3 {{ color: #b87a17; }}
.quick h3, .full h3 {{ color: #7d5aa6; }}
figure {{ margin: 0 0 .6rem; }}
figcaption {{ font-size: .78rem; color: var(--soft); }}
video {{ width: 200px; aspect-ratio: 1; border-radius: 6px; background: #000; display: block; }}
.sounds {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem; }}
.picture {{ position: relative; height: 130px; overflow: hidden; border-radius: 6px; }}
.picture img {{ width: 100%; height: 100%; display: block; }}
.picture i {{ position: absolute; top: 0; bottom: 0;
  border-left: 2px dashed #7df9ff; opacity: .85; }}
.picture b {{ position: absolute; top: 0; bottom: 0; left: 0;
  border-left: 2px solid #fff; opacity: 0; }}
audio {{ width: 100%; height: 34px; margin-top: .35rem; }}
@media (max-width: 760px) {{ section {{ grid-template-columns: 1fr; }}
  .sounds {{ grid-template-columns: 1fr; }} .films {{ display: flex; gap: .8rem; }}
  table {{ font-size: .8rem; }} th, td {{ padding: .3rem .4rem; }} }}
</style>
</head>
<body>
<h1>wavflow demo</h1>
<p>{summary}</p>
<p>{training}</p>
<p>Every clip below is unseen: its timing and its wording occur in no training clip. Dashed lines
mark the moments at which something is struck in the video; the caption alone does not tell when
these are. An onset counts when it lies within 50 ms of such a moment; the kind of
sound is judged by a classifier fitted on true training audio.</p>
{tables}
<p>Everything here can be recomputed from <a href="events.json">events.json</a> and the wavs it
names; the figures are in <a href="metrics.json">metrics.json</a>.</p>
<details open><summary>all in one picture</summary><img src="report.png" alt="spectrograms of true
and generated sounds, loss curve, figures"></details>
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
