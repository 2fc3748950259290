"""Sounds on request, one at a time, with previews on the way; knows nothing of web pages."""

from __future__ import annotations

import logging
import math
import queue
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from wavflow.base.errors import Cancelled, InputError
from wavflow.media.sound import Sound
from wavflow.pipeline.request import PlanOptions, Request
from wavflow.pipeline.sampler import Sampler
from wavflow.sampling.plan import Plan, Step

log = logging.getLogger("wavflow")

#: Sounds shown before the last one, at most.
PREVIEWS = 5
#: Seconds between views where nothing else happens.
POLL = 0.5
#: Seeds that are drawn, and the largest that a browser keeps exact.
DRAWN_SEEDS, MAX_SEED = 2**32, 2**53 - 1
#: The shortest sound and the largest guidance weight that a form may ask for.
MIN_SECONDS, MAX_GUIDANCE = 0.1, 20.0
#: Width of a spectrogram in inches.
WIDTH = 4.6


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, at most.

    Attributes:
        seconds: length of a sound.
        upload_mb: size of a video, in MB (10^6 bytes).
        steps: steps of a solver.
        characters: length of a caption.
        waiting: how many requests wait for their turn.

    Raises:
        InputError: a limit that leaves nothing to ask for.
    """

    seconds: float = 30.0
    upload_mb: int = 256
    steps: int = 200
    characters: int = 1000
    waiting: int = 16

    def __post_init__(self) -> None:
        for name, least in (("seconds", MIN_SECONDS), ("upload_mb", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise InputError(f"the limit of {name} is {value:g}; wanted at least {least:g}")


@dataclass(frozen=True)
class Form:
    """What a page asks for. An empty caption is none; a seed is drawn where it is None."""

    caption: str
    negative_caption: str
    video: Path | None
    seconds: float
    seed: int | None
    guidance: float
    steps: int
    solver: str | None

    def check(self, limits: Limits) -> None:
        """Raises InputError, naming the field, what was found and what was wanted."""
        for name, text in (("caption", self.caption), ("negative caption", self.negative_caption)):
            if not isinstance(text, str):
                raise InputError(f"{name} is {text!r:.40}; wanted text")
            if len(text) > limits.characters:
                raise InputError(
                    f"{name} has {len(text)} characters; wanted at most {limits.characters}"
                )
        for name, value, kinds, low, high in (
            ("seconds", self.seconds, (int, float), MIN_SECONDS, limits.seconds),
            ("seed", 0 if self.seed is None else self.seed, (int,), 0, MAX_SEED),
            ("guidance", self.guidance, (int, float), 0, MAX_GUIDANCE),
            ("steps", self.steps, (int,), 1, limits.steps),
        ):
            if not isinstance(value, kinds) or not low <= value <= high:
                whole = "a whole number from " if kinds == (int,) else ""
                raise InputError(f"{name} is {value!r:.40}; wanted {whole}{low} to {high:.16g}")
        self.request().check()

    def request(self) -> Request:
        """The sound that is asked for."""
        return Request(
            caption=self.caption.strip() or None,
            video=self.video,
            negative_caption=self.negative_caption.strip() or None,
            seconds=self.seconds,
            seed=self.seed or 0,
        )

    def options(self) -> PlanOptions:
        """How it is generated."""
        return {"solver": self.solver, "steps": self.steps, "guidance": self.guidance}


@dataclass(frozen=True)
class View:
    """How far a request is.

    Attributes:
        text: one line that says so.
        share: how much of the work is done, 0 to 1.
        seed: what the noise depends on.
        sound: the latest preview, at last the result, .wav; None before the first.
        picture: its spectrogram, .png.
        video: the request's video with the result as its sound, .mp4.
    """

    text: str
    share: float
    seed: int
    sound: Path | None = None
    picture: Path | None = None
    video: Path | None = None


class Studio:
    """Serves requests with one sampler.

    Args:
        sampler: makes the sounds.
        folder: gets the files, each request's in a folder of its own; nothing is removed.
        limits: what a request may ask for.
    """

    def __init__(self, sampler: Sampler, folder: Path, limits: Limits) -> None:
        self.sampler, self.folder, self.limits = sampler, folder, limits
        # A request that is given up keeps the thread until its step is done: two never run at once.
        self._thread = ThreadPoolExecutor(1, "generate")
        self._cancels: set[Event] = set()

    def warm_up(self) -> None:
        """Generates once, so that the first request does not wait for what is loaded when used.

        Raises:
            InputError: weights of the encoders are missing, or matplotlib is not installed.
        """
        seconds = min(self.sampler.config.data.audio_duration, self.limits.seconds)
        work = self._thread.submit(self.sampler.generate, ["warming up"], seconds=seconds, steps=1)
        (sound,) = work.result()
        sound.spectrogram(self.folder / "warm.png")

    def close(self) -> None:
        """Ends the request that runs, after its step, and those that wait."""
        for cancel in tuple(self._cancels):
            cancel.set()
        self._thread.shutdown()

    def generate(self, form: Form) -> Iterator[View]:
        """Views of what a form asks for, from its beginning to its sound.

        Closing the iterator ends the work after the step that runs.

        Raises:
            InputError: the form is beyond the limits or cannot be met.
        """
        form.check(self.limits)
        seed = secrets.randbelow(DRAWN_SEEDS) if form.seed is None else form.seed
        form = replace(form, seed=seed)
        plan = self.sampler.plan(**form.options())
        folder = Path(tempfile.mkdtemp(prefix="sound-", dir=self.folder))
        view = View("starting" if form.video is None else "reading the video", 0.0, seed)
        told: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        cancel, begun = Event(), time.monotonic()
        self._cancels.add(cancel)
        try:
            work = self._thread.submit(self._sample, form, Watch(told.put), cancel)
            work.add_done_callback(lambda _: told.put(None))
            yield view
            for news in _newest(told):
                if news is not None:
                    view = replace(view, text=news.text, share=news.share)
                    if news.preview is not None:
                        view = _show(view, news.preview.loud(), folder / f"preview-{news.done}.wav")
                yield view
            sound = work.result().loud()
            view = _show(view, sound, folder / f"wavflow-{seed}.wav")
            text = f"{_describe(sound, plan)}, in {time.monotonic() - begun:.1f} s"
            view = replace(view, text=text, share=1.0)
            if form.video is not None:
                view = _add_video(view, sound, form.video)
            log.info("seed %d: %s", seed, view.text)
            yield view
        except Cancelled as error:
            yield replace(view, text=str(error))
        except InputError as error:
            raise InputError(_without_folder(error, form.video)) from None
        finally:
            cancel.set()
            self._cancels.discard(cancel)

    def _sample(self, form: Form, watch: Watch, cancel: Event) -> Sound:
        if cancel.is_set():
            raise Cancelled("cancelled before the first step")
        try:
            return self.sampler.make(form.request(), on_step=watch, cancel=cancel, **form.options())
        except Cancelled as error:
            log.info("seed %s: %s", form.seed, error)
            raise


@dataclass(frozen=True)
class News:
    """What is told of a step that is done; of some steps with a preview."""

    text: str
    share: float
    done: int
    preview: Sound | None


class Watch:
    """Tells the news of every step from the sampler's thread."""

    def __init__(self, tell: Callable[[News], None]) -> None:
        self.tell, self.previews = tell, 0

    def __call__(self, step: Step) -> None:
        # An adaptive solver does not know its steps, but how far along the path it is.
        share = step.t if step.total is None else step.done / step.total
        due = math.floor(share * (PREVIEWS + 1))
        preview = None
        if self.previews < due <= PREVIEWS:
            self.previews = due
            (preview,) = step.preview()
        of = "" if step.total is None else f" of {step.total}"
        self.tell(News(f"step {step.done}{of}", share, step.done, preview))


def _newest(told: queue.SimpleQueue[News | None]) -> Iterator[News | None]:
    """The newest news with the newest preview, or None where there are none for a while.

    Drawing takes longer than a small network's step: what is overtaken meanwhile is left out.
    """
    while True:
        try:
            news = told.get(timeout=POLL)
        except queue.Empty:
            yield None
            continue
        while news is not None and not told.empty():
            later = told.get()
            if later is not None and later.preview is None:
                later = replace(later, preview=news.preview)
            news = later
        if news is None:
            return
        yield news


def _show(view: View, sound: Sound, path: Path) -> View:
    sound.save(path)
    picture = path.with_suffix(".png")
    sound.spectrogram(picture, WIDTH)
    return replace(view, sound=path, picture=picture)


def _add_video(view: View, sound: Sound, video: Path) -> View:
    """The view with the video, or with the reason why there is none."""
    assert view.sound is not None
    path = view.sound.with_suffix(".mp4")
    try:
        sound.save_video(video, path)
    except InputError as error:
        return replace(view, text=f"{view.text}; no video: {_without_folder(error, video)}")
    return replace(view, video=path)


def _describe(sound: Sound, plan: Plan) -> str:
    steps = plan.solver if plan.solver == "adaptive" else f"{plan.steps} {plan.solver} steps"
    return f"{sound.seconds:.2f} s at {sound.sample_rate} Hz by {steps}"


def _without_folder(error: InputError, video: Path | None) -> str:
    text = str(error)
    return text if video is None else text.replace(str(video), video.name)
