"""What is on the page; needs Gradio (``wavflow[serve]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from wavflow.base.errors import InputError
from wavflow.flow.solvers import BEST, SOLVERS
from wavflow.pipeline.sampler import Sampler
from wavflow.serve.studio import MAX_GUIDANCE, MAX_SEED, MIN_SECONDS, Form, Studio, View

#: Seconds that files are kept, and between looks at their age.
KEPT, CHECKED = 3600, 300
#: Value of the menu's first entry: the plan that `Sampler.plan` makes when no solver is named.
DEFAULT = "default"
CAPTIONS = ["a small bell rings twice", "a drum is struck", "a dog barks"]
# Gradio's button for trimming fetches its code from another host.
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.6rem; font-weight: 700; margin: 0; }
#title p { color: var(--neutral-500); margin: 0.2rem 0 0; }
#progress p { margin: 0 0 0.4rem; min-height: 1.5em; font-variant-numeric: tabular-nums; }
#progress .bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); }
#progress .bar div { height: 100%; border-radius: 3px; background: var(--primary-500); }
button[title="Trim video to selection"] { display: none; }
"""
#: How the page as a whole looks, for its launch; the fonts are the browser's own.
LOOK = {
    "theme": gr.themes.Base(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ),
    "css": CSS,
}


def build_page(studio: Studio) -> gr.Blocks:
    """Builds the page, its one public endpoint `/generate`, and its queue.

    Args:
        studio: makes the sounds and says what may be asked for.
    """
    page = gr.Blocks(title="wavflow", analytics_enabled=False, delete_cache=(CHECKED, KEPT))
    with page:
        gr.HTML(_title(studio.sampler), elem_id="title")
        with gr.Row():
            with gr.Column(scale=4):
                asked = _asked(studio)
                with gr.Row():
                    stop = gr.Button("Cancel")
                    go = gr.Button("Generate", variant="primary")
            with gr.Column(scale=6):
                shown = _shown()
        run = go.click(
            _generate(studio),
            list(asked.values()),
            [*shown.values(), asked["seed"]],
            api_name="generate",
            # The request checks itself, and files go out as they are: Gradio would name no field
            # in its errors, and give videos to ffmpeg where it is installed.
            preprocess=False,
            postprocess=False,
            show_progress_on=shown["progress"],
            concurrency_limit=1,
        )
        stop.click(None, cancels=run)
        asked["video"].change(
            lambda video: gr.update(visible=video is not None),
            asked["video"],
            shown["video"],
            queue=False,
            api_visibility="private",
        )
        asked["solver"].change(
            lambda solver: studio.sampler.plan(solver=_solver(solver)).steps,
            asked["solver"],
            asked["steps"],
            queue=False,
            api_visibility="private",
        )
    return page.queue(max_size=studio.limits.waiting)


def _asked(studio: Studio) -> dict[str, gr.components.Component]:
    """What a request is made of, by the names and in the order of `_generate`'s arguments."""
    sampler, limits = studio.sampler, studio.limits
    plan = sampler.plan()
    caption = gr.Textbox(
        "",
        label="Caption",
        placeholder="What is heard",
        lines=2,
        max_length=limits.characters,
    )
    gr.Examples([[each] for each in CAPTIONS], caption, label="For instance")
    video = gr.Video(label="Video (optional)", sources=["upload"], include_audio=True, height=220)
    seconds = gr.Slider(
        MIN_SECONDS,
        limits.seconds,
        min(sampler.config.data.audio_duration, limits.seconds),
        step=0.1,
        label="Seconds",
    )
    with gr.Row():
        seed = gr.Number(42, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        random_seed = gr.Checkbox(True, label="Random seed", info="The one drawn is shown")
    with gr.Accordion("More settings", open=False):
        negative_caption = gr.Textbox(
            "",
            label="Negative caption",
            placeholder="What guidance leads away from",
            max_length=limits.characters,
        )
        guidance = gr.Slider(0, MAX_GUIDANCE, plan.guidance, step=0.1, label="Guidance")
        solver = gr.Dropdown(
            [(f"default ({BEST.solver}, {BEST.times} times)", DEFAULT), *SOLVERS, "adaptive"],
            value=DEFAULT,
            label="Solver",
        )
        steps = gr.Slider(1, limits.steps, plan.steps, step=1, label="Steps")
    return {
        "caption": caption,
        "video": video,
        "seconds": seconds,
        "seed": seed,
        "random_seed": random_seed,
        "negative_caption": negative_caption,
        "guidance": guidance,
        "solver": solver,
        "steps": steps,
    }


def _shown() -> dict[str, gr.components.Component]:
    """Where what `_generate` yields is shown, but for the seed."""
    return {
        "progress": gr.HTML(_progress(None), label="Progress", elem_id="progress"),
        "sound": gr.Audio(label="Sound", interactive=False, buttons=["download"]),
        "picture": gr.Image(
            label="Spectrogram",
            show_label=False,
            interactive=False,
            height=240,
            buttons=["download", "fullscreen"],
        ),
        "video": gr.Video(
            label="Video with the sound",
            interactive=False,
            visible=False,
            height=320,
            buttons=["download"],
        ),
    }


def _generate(studio: Studio) -> Callable[..., Iterator[list[Any]]]:
    def generate(
        caption: str,
        video: dict[str, Any] | None,
        seconds: float,
        seed: int,
        random_seed: bool,
        negative_caption: str,
        guidance: float,
        solver: str,
        steps: int,
    ) -> Iterator[list[Any]]:
        form = Form(
            caption=caption,
            negative_caption=negative_caption,
            video=None if video is None else Path(video["path"]),
            seconds=seconds,
            seed=None if random_seed else seed,
            guidance=guidance,
            steps=steps,
            solver=_solver(solver),
        )
        try:
            for view in studio.generate(form):
                files = [_file(path) for path in (view.sound, view.picture, view.video)]
                yield [_progress(view), *files, view.seed]
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return generate


def _solver(chosen: str) -> str | None:
    return None if chosen == DEFAULT else chosen


def _title(sampler: Sampler) -> str:
    data = sampler.config.data
    trained = f"trained on {data.audio_duration:g} s at {data.target_sample_rate} Hz"
    where = f"{sampler.device}, {str(sampler.dtype).removeprefix('torch.')}"
    name = escape(sampler.config.model.name)
    return f"<h1>wavflow</h1><p>Sound for videos and captions: {name}, {trained}; {where}</p>"


def _progress(view: View | None) -> str:
    text, share = ("ready", 0.0) if view is None else (view.text, view.share)
    bar = f'<div class="bar"><div style="width: {100 * share:.0f}%"></div></div>'
    return f"<p>{escape(text)}</p>{bar}"


def _file(path: Path | None) -> dict[str, Any] | None:
    """A file as Gradio's components hold it."""
    return None if path is None else gr.FileData(path=str(path)).model_dump()
