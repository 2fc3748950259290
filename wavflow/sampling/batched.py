"""From features and seeds to sounds: batches of sounds of one length, and long ones in windows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from wavflow.base.errors import Cancelled, InputError
from wavflow.base.memory import available_memory, bytes_text, keep_freed_memory
from wavflow.base.processes import World
from wavflow.config.schema import SamplingConfig
from wavflow.flow.guidance import Output, mix_guidance
from wavflow.flow.solvers import SolverError, adaptive, table_slots
from wavflow.media.sound import Sound
from wavflow.sampling.engine import Engine
from wavflow.sampling.field import Maker, Size
from wavflow.sampling.plan import Plan, Step
from wavflow.sampling.scene import Features, Scene
from wavflow.sampling.windowed import Evaluation, LongSound
from wavflow.sampling.windows import Windows

log = logging.getLogger("wavflow")

#: Share of the free memory that generation plans to use.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Budget:
    """How much is generated at a time.

    Attributes:
        batch_size: how many sounds, or windows, run together, at most.
        memory: bytes that generation may add to what is in use; None for a share of what is free.
    """

    batch_size: int = 8
    memory: int | None = None

    def bytes(self, device: torch.device) -> int:
        """How many bytes generation may add to the memory in use."""
        if self.memory is not None:
            return self.memory
        return int(MEMORY_SHARE * available_memory(device))


@dataclass(frozen=True)
class Monitor:
    """Who is told of the steps of a generation, and who ends it.

    Attributes:
        on_step: called with a `Step` after every step.
        cancel: once it is set, the next step is not taken.
    """

    on_step: Callable[[Step], None] | None = None
    cancel: Event | None = None

    def check(self, done: str) -> None:
        """Raises Cancelled, saying what was done, where `cancel` is set."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled(f"cancelled after {done}")


@dataclass(frozen=True)
class _Batch:
    """Rows of one length that are generated together."""

    rows: tuple[int, ...]
    size: Size


class Generator:
    """Follows a system's field from noise to sounds.

    Matrices run in `dtype`; the solver's state and the noise are float32. A sound's noise depends
    on its seed alone, whatever else is in the batch. Sounds that are longer than a window are made
    of windows (`wavflow.sampling.windowed`). Several processes share the windows of such a sound,
    or the tokens of one that is made at once.

    On a CPU the process keeps the memory it frees from then on (`wavflow.base.memory`).

    Args:
        maker: makes sizes, conditions and scenes of what is asked for, and has the field.
        flow: path, prediction and noise of the flow.
        dtype: dtype that the matrix products run in.
        engine: how steps run, one of `wavflow.sampling.engine.ENGINES`.
        world: processes that share every sound; by default this one alone.

    Raises:
        InputError: an unknown engine, or one that cannot run here.
    """

    def __init__(
        self,
        maker: Maker,
        flow: SamplingConfig,
        dtype: torch.dtype,
        engine: str = "auto",
        world: World | None = None,
    ) -> None:
        self.maker, self.field, self.flow = maker, maker.field, flow
        self.device = self.field.device
        self.rate = maker.size(maker.seconds).rate
        self.world = world or World(0, 1, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        try:
            self.engine = Engine(self.field, engine, dtype)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._reported: dict[float, int] = {}

    def generate(
        self,
        features: Sequence[Features],
        seeds: Sequence[int],
        plan: Plan,
        *,
        seconds: Sequence[float] | None = None,
        window: float | None = None,
        overlap: float | None = None,
        budget: Budget | None = None,
        trim: bool = True,
        progress: Callable[[int, int], None] | None = None,
        monitor: Monitor | None = None,
    ) -> Iterator[tuple[int, Sound]]:
        """Checks everything there is to check, then yields (row, sound) batch by batch.

        Args:
            features: what each sound is generated from.
            seeds: what each sound's noise depends on, one per row.
            plan: how sounds are generated.
            seconds: length of each sound, by default as trained.
            window: seconds of the windows that a longer sound is made of, by default as trained; 0
                makes any sound at once.
            overlap: seconds that neighbouring windows have in common, by default a fifth of one.
            budget: how much is generated at a time.
            trim: whether sounds are cut to the asked duration; else whole tokens are kept.
            progress: called with (rows done, rows in all).
            monitor: who is told of the steps.

        Raises:
            InputError: features that do not fit, a sound too long for the memory.
            Cancelled: `monitor.cancel` was set.
        """
        budget, monitor = budget or Budget(), monitor or Monitor()
        seconds = [self.maker.seconds] * len(features) if seconds is None else seconds
        sizes = {length: self.maker.size(length) for length in dict.fromkeys(seconds)}
        spans = [self.window(length, window) for length in seconds]
        at_once: dict[float, list[int]] = {}
        for row, given in enumerate(features):
            if not isinstance(given, Scene):
                self.maker.check(row, given, sizes[seconds[row]])
            if spans[row] is None:
                at_once.setdefault(seconds[row], []).append(row)
        batches = [
            _Batch(tuple(rows[at : at + count]), sizes[length])
            for length, rows in at_once.items()
            for count in [self.fitting(sizes[length], plan, len(rows), budget)]
            for at in range(0, len(rows), count)
        ]
        long = {
            row: self.long(
                features[row], seconds[row], seeds[row], plan, span, overlap=overlap, budget=budget
            )
            for row, span in enumerate(spans)
            if span is not None
        }

        def run() -> Iterator[tuple[int, Sound]]:
            done = 0
            for batch in batches:
                rows: list[Mapping[str, Tensor]] = []
                for row in batch.rows:
                    given = features[row]
                    assert not isinstance(given, Scene)  # a scene is made of windows
                    rows.append(given)
                states = self._solve(batch, rows, [seeds[row] for row in batch.rows], plan, monitor)
                sounds = self.sounds(states, batch.size.samples if trim else None)
                done += len(sounds)
                if progress is not None:
                    progress(done, len(features))
                yield from zip(batch.rows, sounds, strict=True)
            for row, sound in long.items():
                states = torch.cat(list(self.parts(row, sound, None, monitor)))[None]
                (made,) = self.sounds(states, sizes[seconds[row]].samples if trim else None)
                done += 1
                if progress is not None:
                    progress(done, len(features))
                yield row, made

        return run()

    def window(self, seconds: float, window: float | None) -> float | None:
        """Seconds of the windows that make a sound of `seconds`; None where it is made at once.

        Raises:
            InputError: a negative window.
        """
        window = self.maker.seconds if window is None else window
        if window < 0:
            raise InputError(f"window is {window:g}; wanted seconds, or 0 for none")
        return window if 0 < window < seconds else None

    def fitting(self, size: Size, plan: Plan, wanted: int, budget: Budget) -> int:
        """How many sounds of a size, up to `wanted`, are generated at a time.

        Raises:
            InputError: not even one fits into the memory.
        """
        memory = budget.bytes(self.device)
        wanted = min(wanted, budget.batch_size)
        one, length = self.field.bytes(size, plan.guided), size.seconds
        if one > memory:
            raise InputError(
                f"a clip of {length:g} s needs about {bytes_text(one)}, and generation may use "
                f"{bytes_text(memory)}: ask for fewer seconds"
            )
        count = min(wanted, memory // one)
        if self._reported.get(length) != count:
            self._reported[length] = count
            log.info(
                "clips of %g s, %d at a time: about %s of %s",
                length,
                count,
                bytes_text(count * one),
                bytes_text(memory),
            )
        return count

    @torch.inference_mode()
    def _solve(
        self,
        batch: _Batch,
        features: Sequence[Mapping[str, Tensor]],
        seeds: Sequence[int],
        plan: Plan,
        monitor: Monitor,
    ) -> Tensor:  # (b n d) float32
        self.field.among(self.world.rank, self.world.size)
        noise = self.field.start(
            torch.tensor(seeds, dtype=torch.int64, device=self.device), 0, batch.size.tokens
        )
        times: list[float] = []

        def after(total: int | None, t: float, weight: float, x: Tensor, pred: Output) -> None:
            times.append(t)
            if monitor.on_step is not None:

                def preview() -> list[Sound]:
                    guided = mix_guidance(pred, weight)
                    clean = guided if self.field.prediction == "x" else x + (1 - t) * guided
                    return self.sounds(clean, batch.size.samples)

                monitor.on_step(Step(batch.rows, len(times), total, t, preview))
            monitor.check(f"{len(times)} steps")

        monitor.check("0 steps")
        with self.engine.cast():
            conditions = self.field.conditions(features, batch.size)
            empty = self.field.empty(features, batch.size) if plan.guided else None
        if plan.solver == "adaptive":

            def predict(t: Tensor, x: Tensor) -> Tensor:
                weight = plan.weight(float(t))
                pred = self.engine.predict(
                    float(t), x, conditions, empty, weight, plan.guidance_rescale
                )
                after(None, float(t), weight, x, pred)
                return mix_guidance(pred, weight)

            end = 1.0 - self.flow.min_sigma
            try:
                return adaptive(predict, noise, 0.0, end, prediction=self.field.prediction)
            except SolverError as error:
                raise InputError(f"solver adaptive: {error}") from None
        table = plan.table(self.flow)
        rows = table[:, :2].tolist()
        return self.engine.solve(
            noise,
            table,
            conditions,
            empty,
            rescale=plan.guidance_rescale,
            after=lambda row, x, pred: after(len(rows), rows[row][0], rows[row][1], x, pred),
        )

    def long(
        self,
        features: Features,
        seconds: float,
        seed: int,
        plan: Plan,
        window: float,
        *,
        overlap: float | None = None,
        budget: Budget | None = None,
        loop: bool = False,
        whole: bool = True,
    ) -> LongSound:
        """Describes how a sound is made of windows, of one window if it is no longer than that.

        Args:
            features, seconds, seed, plan, overlap, budget: as in `generate`.
            window: seconds of a window.
            loop: whether the sound's end leads into its beginning.
            whole: whether all of it will be in memory at once.

        Raises:
            InputError: an adaptive solver, an overlap that leaves no step, too little memory.
        """
        budget = budget or Budget()
        if plan.solver == "adaptive":
            raise InputError(
                f"solver is 'adaptive', and {seconds:g} s are made of windows; wanted a solver of "
                "fixed steps, or window 0"
            )
        size, table = self.maker.size(window), plan.table(self.flow)
        memory = budget.bytes(self.device)
        # The state, the sums of its predictions and the sound itself.
        needed = 4 * int(seconds * size.rate) * (2 * table_slots(table) + 4)
        if whole and needed > memory:
            raise InputError(
                f"{seconds:g} s take about {bytes_text(needed)} at once, and generation may use "
                f"{bytes_text(memory)}: ask for fewer seconds, or stream them"
            )
        scene = features if isinstance(features, Scene) else self.maker.scene(features, size)
        windows = Windows.cover(seconds, size, overlap=overlap, grid=scene.grid, loop=loop)
        return LongSound(
            engine=self.engine,
            windows=windows,
            size=size,
            samples=self.maker.size(seconds).samples,
            seed=seed,
            table=table,
            rescale=plan.guidance_rescale,
            guided=plan.guided,
            scene=scene,
            batch=self.fitting(size, plan, len(windows), budget),
            world=self.world,
        )

    def parts(
        self, row: int, sound: LongSound, group: int | None, monitor: Monitor
    ) -> Iterator[Tensor]:  # (n d) float32
        """The tokens of a long sound from its beginning on, part by part (`LongSound.parts`).

        Args:
            row: its number, which `monitor` is told.
            sound: how it is made.
            group: windows that go through the evaluations together; None for all.
            monitor: who is told of the steps.

        Raises:
            Cancelled: `monitor.cancel` was set.
        """
        done = 0

        def check() -> None:
            monitor.check(f"{done} of {sound.evaluations} evaluations")

        def after(evaluation: Evaluation) -> None:
            nonlocal done
            done += evaluation.windows
            if monitor.on_step is not None:

                def preview() -> list[Sound]:
                    return self.sounds(evaluation.clean[None])

                monitor.on_step(Step((row,), done, sound.evaluations, evaluation.t, preview))
            check()

        check()
        return sound.parts(group, after)

    def sounds(self, states: Tensor, samples: int | None = None, gain: float = 1.0) -> list[Sound]:
        """The sounds of clean states (b n d), cut to `samples`, or whole tokens where it is None.

        gain: how many times as loud as the sounds the states are.
        """
        waves = self.field.waves(states, samples, gain)
        return [Sound(wave.clone(), self.rate) for wave in waves]
