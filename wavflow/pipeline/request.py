"""What is asked of a sampler: a sound, and how sounds are made; the rules between the options."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from threading import Event
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.config.schema import Config
from wavflow.flow.solvers import BEST
from wavflow.sampling.batched import Budget, Monitor
from wavflow.sampling.plan import Plan, Step

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]


class PlanOptions(TypedDict, total=False):
    """Keyword arguments that make a plan; see `Settings`."""

    solver: str | None
    steps: int | None
    times: str | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float


class Options(PlanOptions, total=False):
    """Keyword arguments for one sound; see `Settings`."""

    window: float | None
    overlap: float | None
    batch_size: int
    memory: int | None
    on_step: Callable[[Step], None] | None
    cancel: Event | None


class RowOptions(Options, total=False):
    """Keyword arguments for rows of sounds; see `Settings`."""

    trim: bool
    progress: Callable[[int, int], None] | None


#: Seeds are what the noise's counter holds.
MAX_SEED = 2**63 - 1
NOTHING = "nothing to generate: give a caption, a video or both"


def check_seed(seed: int, what: str = "seed") -> None:
    """Refuses what is no seed, naming it as `what`.

    Raises:
        InputError: not a whole number from 0 to 2^63 - 1.
    """
    if not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"{what} is {seed!r:.40}; wanted a whole number from 0 to 2^63 - 1")


def check_loudness(loudness: float | None) -> None:
    """Refuses what is no loudness.

    Raises:
        InputError: not a number up to 0.
    """
    if loudness is not None and not -math.inf < loudness <= 0:
        raise InputError(f"loudness is {loudness}; wanted LUFS, a number up to 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How sounds are generated. What is None is filled in from the configuration.

    Without a solver it is the best one measured, with its steps, times and guidance interval
    (`wavflow.flow.solvers.BEST`). A named one takes the configuration's steps, even times and
    guidance throughout, as the public system does. The guidance is the configuration's.

    Attributes:
        solver, steps, times, guidance, guidance_interval, guidance_rescale: as in
            `wavflow.sampling.plan.Plan`.
        window: seconds of the windows that a longer sound is made of, by default as trained; 0
            makes any sound at once.
        overlap: seconds that neighbouring windows have in common, by default a fifth of one.
        batch_size: sounds, or windows, at a time, at most; fewer where memory demands it.
        memory: bytes that generation may add to what is in use; by default 0.8 of what is free.
            Nothing runs that is expected to need more.
        trim: whether sounds are cut to the asked duration; else whole tokens are kept; rows of
            sounds alone.
        progress: called with (rows done, rows in all); rows of sounds alone.
        on_step: called with a `wavflow.sampling.plan.Step` after every step.
        cancel: once it is set, the next step is not taken, and `Cancelled` is raised.

    Raises:
        InputError: a batch size below 1.
    """

    solver: str | None = None
    steps: int | None = None
    times: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    window: float | None = None
    overlap: float | None = None
    batch_size: int = 8
    memory: int | None = None
    trim: bool = True
    progress: Callable[[int, int], None] | None = None
    on_step: Callable[[Step], None] | None = None
    cancel: Event | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; wanted at least 1")
        for name in ("window", "overlap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; wanted seconds, 0 or more")

    def options(self) -> RowOptions:
        """The same as keyword arguments."""
        given: Any = {each.name: getattr(self, each.name) for each in fields(self)}
        return given

    def plan(self, config: Config) -> Plan:
        """The plan, with what is not given filled in.

        Raises:
            InputError: an option out of range.
        """
        named = self.solver is not None
        steps, times, between = self.steps, self.times, self.guidance_interval
        if steps is None:
            steps = config.sampling.num_steps if named else BEST.steps
        if times is None:
            times = "even" if named else BEST.times
        if between is None:
            between = (0.0, 1.0) if named else BEST.guidance_interval
        interval: Any = tuple(between)  # of two, or `Plan` raises
        return Plan(
            solver=BEST.solver if self.solver is None else self.solver,
            steps=steps,
            times=times,
            guidance=config.inference.cfg if self.guidance is None else self.guidance,
            guidance_interval=interval,
            guidance_rescale=self.guidance_rescale,
        )

    @property
    def budget(self) -> Budget:
        """How much is generated at a time."""
        return Budget(self.batch_size, self.memory)

    @property
    def monitor(self) -> Monitor:
        """Who is told of the steps."""
        return Monitor(self.on_step, self.cancel)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sound that is asked for.

    Attributes:
        caption: what is heard.
        video: what is seen.
        negative_caption: what guidance leads away from.
        seconds: its length, by default as trained, or the recording's.
        seed: what its noise depends on.
        recording: a sound that is kept: a file, or (t,) samples at the model's rate.
        gap: seconds from and to which the recording is not kept.
        loop: whether its end leads into its beginning.
        stream: whether it is handed over in parts.
    """

    caption: str | None = None
    video: PathLike | None = None
    negative_caption: str | None = None
    seconds: float | None = None
    seed: int = 0
    recording: PathLike | Tensor | None = None
    gap: tuple[float, float] | None = None
    loop: bool = False
    stream: bool = False

    def check(self) -> None:
        """Checks the rules between the options.

        Raises:
            InputError: nothing to generate from, options that do not go together, a value out of
                range; it names them.
        """
        kept = self.recording is not None
        special = {"stream": self.stream, "recording": kept, "loop": self.loop}
        asked = [name for name, is_asked in special.items() if is_asked]
        if len(asked) > 1:
            raise InputError(f"{' and '.join(asked)} do not go together")
        if self.loop and (self.caption is None or self.video is not None):
            raise InputError("loop wants a caption, and no video")
        if self.gap is not None:
            if not kept:
                raise InputError("gap wants a recording: what it is a gap of")
            low, high = self.gap
            if not 0 <= low < high < math.inf:
                raise InputError(f"gap is {low:g} to {high:g} s; wanted two times in order")
        if self.video is None and not kept and not (self.caption or "").strip():
            raise InputError(NOTHING)
        check_seed(self.seed)
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError(f"seconds is {self.seconds}; wanted a number above 0")
