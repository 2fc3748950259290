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
from typing import Any

from wavflow.base.errors import Cancelled, InputError
from wavflow.media.sound import Sound
from wavflow.pipeline.sampler import Sampler
from wavflow.sampling.plan import Plan, Step

log = logging.getLogger("wavflow")

#: Sounds shown before the last one, at most.
PREVIEWS = 5
#: Seconds between views where nothing else happens.
POLL = 0.5
#: Seeds that are drawn, and the largest that a browser keeps exact.
DRAWN_SEEDS, MAX_SEED = 2**32, 2**53 - 1
MIN_SECONDS, MAX_GUIDANCE = 0.1, 20.0
#: Inches of a spectrogram.
WIDTH = 4.6


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        seconds: of sound.
        upload_mb: of a video.
        steps: of a solver.
        characters: of a caption.
        waiting: requests that wait for their turn.
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
class Request:
    """One sound to generate. An empty caption is none; a seed is drawn where it is None."""

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
        if not self.caption.strip() and self.video is None:
            raise InputError("nothing to generate: give a caption, a video or both")


@dataclass(frozen=True)
class View:
    """How far a request is.

    Attributes:
        text: one line.
        share: of the work, 0 to 1.
        seed: of the noise.
        sound: the latest preview, at last the result, .wav; None before the first.
        picture: its spectrogram, .png.
        video: the request's with the result as its sound, .mp4.
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
        limits: of a request.
    """

    def __init__(self, sampler: Sampler, folder: Path, limits: Limits) -> None:
        self.sampler, self.folder, self.limits = sampler, folder, limits
        # A request that is given up keeps the thread until its step is done: two never run at once.
        self._thread = ThreadPoolExecutor(1, "generate")
        self._cancels: set[Event] = set()

    def warm_up(self) -> None:
        """Generates once, so that the first request does not wait for what is loaded when used.

        Raises:
            InputError: encoders whose weights are missing, matplotlib that is not installed.
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

    def generate(self, request: Request) -> Iterator[View]:
        """Views of a request, from its beginning to its sound.

        Closing the iterator ends the work after the step that runs.

        Raises:
            InputError: the request is beyond the limits or cannot be met.
        """
        request.check(self.limits)
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        request = replace(request, seed=seed)
        options: dict[str, Any] = {
            "solver": request.solver,
            "steps": request.steps,
            "guidance": request.guidance,
        }
        plan = self.sampler.plan(**options)
        folder = Path(tempfile.mkdtemp(prefix="sound-", dir=self.folder))
        view = View("starting" if request.video is None else "reading the video", 0.0, seed)
        told: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        cancel, begun = Event(), time.monotonic()
        self._cancels.add(cancel)
        try:
            work = self._thread.submit(self._sample, request, options, Watch(told.put), cancel)
            work.add_done_callback(lambda _: told.put(None))
            yield view
            for news in _newest(told):
                if news is not None:
                    view = replace(view, text=news.text, share=news.share)
                    if news.preview is not None:
                        view = _show(view, news.preview.loud(), folder / f"preview-{news.done}.wav")
                yield view
            sound = work.result().loud()
            view = _show(view, sound, folder / f"wavflow-{request.seed}.wav")
            text = f"{_describe(sound, plan)}, in {time.monotonic() - begun:.1f} s"
            view = replace(view, text=text, share=1.0)
            if request.video is not None:
                view = _add_video(view, sound, request.video)
            log.info("seed %d: %s", request.seed, view.text)
            yield view
        except Cancelled as error:
            yield replace(view, text=str(error))
        except InputError as error:
            raise InputError(_without_folder(error, request.video)) from None
        finally:
            cancel.set()
            self._cancels.discard(cancel)

    def _sample(
        self, request: Request, options: dict[str, object], watch: Watch, cancel: Event
    ) -> Sound:
        if cancel.is_set():
            raise Cancelled("cancelled before the first step")
        try:
            (sound,) = self.sampler.generate(
                [request.caption.strip() or None],
                [request.video],
                negative_captions=[request.negative_caption.strip() or None],
                seconds=request.seconds,
                seed=request.seed,
                on_step=watch,
                cancel=cancel,
                **options,
            )
        except Cancelled as error:
            log.info("seed %d: %s", request.seed, error)
            raise
        return sound


@dataclass(frozen=True)
class News:
    """Of a step that is done; some have a preview."""

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
