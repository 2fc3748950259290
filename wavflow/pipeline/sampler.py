"""From captions and videos to sound."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavflow.base import precision
from wavflow.base.errors import InputError
from wavflow.base.processes import World
from wavflow.base.state_dict import load_into
from wavflow.config.load import config_from_dict
from wavflow.config.schema import Config
from wavflow.features.encode import encode_captions, encode_video, load_encoders
from wavflow.flow.solvers import BEST
from wavflow.media.audio import load_audio
from wavflow.media.sound import Sound
from wavflow.sampling.batched import Generator
from wavflow.sampling.plan import Plan, Step
from wavflow.sampling.scene import Features, Scene
from wavflow.sampling.windowed import LongSound, known
from wavflow.systems.wavflow.build import build_model
from wavflow.systems.wavflow.scenes import film
from wavflow.training.checkpoint import read_weights

log = logging.getLogger("wavflow")


class Sampler(Generator):
    """A trained network, ready to generate: captions, videos and features in, sounds out.

    It is made by :meth:`load`, or as :class:`wavflow.sampling.batched.Generator`.
    """

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        device: str = "auto",
        dtype: str = "auto",
        ema: str = "ema1",
        config: Config | None = None,
        engine: str = "auto",
        world: World | None = None,
        attention_window: float | None = None,
        rope_scaling: str | None = None,
    ) -> Sampler:
        """Reads a checkpoint.

        Args:
            checkpoint: a training checkpoint, a flat EMA file, a safetensors file, or the name of
                weights that come with the package (`wavflow.training.checkpoint.packaged`).
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            ema: `ema1`, `ema2` or `none`; of no effect on a flat file.
            config: for a file that carries none; must agree with one that it carries.
            engine: how steps run, one of `wavflow.sampling.engine.ENGINES`.
            world: processes that share every sound.
            attention_window: seconds away that sound may be attended to, by default the
                configuration's.
            rope_scaling: of sounds that are longer than in training and made at once: `none`,
                `linear` or `ntk` (`wavflow.layers.embeddings`), by default the configuration's.

        Raises:
            InputError: unreadable file, no configuration, weights of another model, an option
                out of range.
        """
        where = precision.resolve_device(device)
        weights = read_weights(checkpoint, ema)
        config = _settle(checkpoint, config, weights.config)
        given = {"attention_window": attention_window, "rope_scaling": rope_scaling}
        values = config.to_dict()
        values["model"] |= {key: value for key, value in given.items() if value is not None}
        config = config_from_dict(values, where=str(checkpoint))
        model = build_model(config)
        load_into(model, weights.state, checkpoint)
        kind = precision.resolve_dtype(dtype, where)
        sampler = cls(model, config, where, kind, engine, world)
        sampler.weights = {
            "file": str(weights.path),
            "which": weights.which,
            "global_step": weights.global_step,
        }
        log.info(
            "%s: %s weights, %s, engine %s",
            weights.path,
            weights.which,
            precision.describe(where, kind),
            sampler.engine.kind,
        )
        return sampler

    def plan(
        self,
        *,
        solver: str | None = None,
        steps: int | None = None,
        times: str | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
    ) -> Plan:
        """A `Plan` with what is not given filled in.

        Without a solver it is the best one measured, with its steps, times and guidance interval
        (`wavflow.flow.solvers.BEST`). A named one takes the configuration's steps, even times and
        guidance throughout, as the public system does. The guidance is the configuration's.

        Raises:
            InputError: an option out of range.
        """
        named = solver is not None
        if steps is None:
            steps = self.config.sampling.num_steps if named else BEST.steps
        if times is None:
            times = "even" if named else BEST.times
        if guidance_interval is None:
            guidance_interval = (0.0, 1.0) if named else BEST.guidance_interval
        interval: Any = tuple(guidance_interval)  # of two, or `Plan` raises
        return Plan(
            solver=BEST.solver if solver is None else solver,
            steps=steps,
            times=times,
            guidance=self.config.inference.cfg if guidance is None else guidance,
            guidance_interval=interval,
            guidance_rescale=guidance_rescale,
        )

    def __call__(
        self,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        *,
        negative_caption: str | None = None,
        loudness: float | None = -23.0,
        **options: Any,
    ) -> Sound:
        """One finished sound: `sampler("a dog barks", seconds=8).save("dog.wav")`.

        Args:
            caption, video: what is heard and seen; at least one of them.
            negative_caption: what guidance leads away from.
            loudness: LUFS of the sound, None leaves it as it was generated.
            options: `seconds`, `seed` and all of :meth:`generate_features`.

        Raises:
            InputError: as :meth:`as_completed`.
        """
        if caption is None and video is None:
            raise InputError("nothing to generate: give a caption, a video or both")
        (sound,) = self.generate(
            [caption], [video], negative_captions=[negative_caption], **options
        )
        return sound if loudness is None else sound.loud(loudness)

    def generate(
        self,
        captions: Sequence[str | None] | None = None,
        videos: Sequence[str | os.PathLike[str] | None] | None = None,
        **options: Any,
    ) -> list[Sound]:
        """One sound per row, in the rows' order.

        `generate(captions=["rain"], seconds=4, seeds=[7], guidance=4.5, solver="euler", steps=50)`;
        all arguments as of :meth:`as_completed`.
        """
        return _in_order(self.as_completed(captions, videos, **options))

    def as_completed(
        self,
        captions: Sequence[str | None] | None = None,
        videos: Sequence[str | os.PathLike[str] | None] | None = None,
        *,
        negative_captions: Sequence[str | None] | None = None,
        seconds: float | Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Iterator[tuple[int, Sound]]:
        """Generates one sound per row and yields (row, sound) batch by batch.

        Rows of one length run together, whatever they are generated from; nothing runs between
        batches, so that closing the iterator ends the work.

        Args:
            captions, videos: one entry per row, None where a row has none; at least one list.
            negative_captions: per row what guidance leads away from, None for the empty caption.
            seconds: of all sounds or of each; by default the configuration's.
            seeds: one per row; by default seed, seed + 1, ...
            options: as of :meth:`generate_features`.

        Raises:
            InputError: a video that cannot be decoded, lists of different lengths, an option
                out of range.
        """
        given = {"captions": captions, "videos": videos, "negative_captions": negative_captions}
        for name, value in given.items():
            if isinstance(value, (str, os.PathLike)):
                raise InputError(f"{name} is {value!r}; wanted a list with one entry per row")
        rows = len(captions if captions is not None else videos if videos is not None else ())
        if rows == 0:
            raise InputError("nothing to generate: give captions, videos or both")
        captions = [None] * rows if captions is None else list(captions)
        videos = [None] * rows if videos is None else list(videos)
        negative = [None] * rows if negative_captions is None else list(negative_captions)
        if len(captions) != len(videos):
            raise InputError(f"{len(captions)} captions and {len(videos)} videos; wanted as many")
        if len(negative) != rows:
            raise InputError(f"{len(negative)} negative_captions for {rows} rows; wanted as many")
        lasting = self._seconds(seconds, rows)
        window = options.get("window")
        features = [
            self.encode(caption, video, length, away, window)
            for caption, video, length, away in zip(
                captions, videos, lasting, negative, strict=True
            )
        ]
        seeds = [seed + row for row in range(rows)] if seeds is None else list(seeds)
        return self._generate(features, seeds, seconds=lasting, **options)

    def stream(
        self,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Iterator[Sound]:
        """One sound in parts, each as soon as it is done; memory does not grow with its length.

        The parts are those of the sound that :meth:`generate` makes, up to rounding. With S
        evaluations of the solver the first one is there after S (S + 1) / 2 evaluations of single
        windows at least, each window more takes S.

        Args:
            caption, video: what is heard and seen; at least one of them.
            options: `seconds`, `seed`, `negative_caption` and those of :meth:`generate_features`,
                but for trim and progress.

        Raises:
            InputError: as :meth:`as_completed`; a video that breaks off, when it does.
        """
        if caption is None and video is None:
            raise InputError("nothing to generate: give a caption, a video or both")
        return self._streamed(*self._single(caption, video, whole=False, **options))

    def stream_features(self, features: Features, **options: Any) -> Iterator[Sound]:
        """:meth:`stream` from features, as :meth:`generate_features` takes them for one sound."""
        return self._streamed(*self._single(features=features, whole=False, **options))

    def _streamed(
        self, sound: LongSound, parts: Callable[[LongSound, int | None], Iterator[Tensor]]
    ) -> Iterator[Sound]:
        left = sound.samples

        def run() -> Iterator[Sound]:
            nonlocal left
            for part in parts(sound, sound.batch):
                (made,) = self._sounds(part[None], self.config.data, False)
                if left > 0:
                    yield Sound(made.audio[:left], made.sample_rate)
                left -= made.audio.numel()

        return run()

    def complete(
        self,
        recording: str | os.PathLike[str] | Tensor,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        *,
        seconds: float | None = None,
        gap: tuple[float, float] | None = None,
        **options: Any,
    ) -> Sound:
        """A recording that goes on, or in which a gap is filled.

        What is kept comes back sample by sample, in whole tokens; a token at an edge that is not
        kept whole is generated. At every evaluation the kept tokens are the noised truth.

        Args:
            recording: a sound file, or (t,) samples at the model's rate.
            caption, video: of the whole sound; it may have neither.
            seconds: of the whole; by default the recording's.
            gap: seconds from and to which the recording is not kept.
            options: as of :meth:`stream`.

        Raises:
            InputError: as :meth:`as_completed`; nothing to generate, or nothing kept.
        """
        rate = self.sample_rate
        if isinstance(recording, Tensor):
            wave = recording.float().cpu()
        else:
            wave = load_audio(recording, rate)
        lasting = len(wave) / rate
        kept = torch.ones(len(wave), dtype=torch.bool)
        if gap is not None:
            low, high = gap
            if not 0 <= low < high:
                raise InputError(f"gap is {low:g} to {high:g} s; wanted two times in order")
            kept[int(low * rate) : math.ceil(high * rate)] = False
        if not kept.any():
            raise InputError(f"the gap is all of the recording's {lasting:g} s; wanted less")
        seconds = lasting if seconds is None else seconds
        sound, parts = self._single(caption, video, seconds=seconds, **options)
        given, gain = known(wave.to(self.device), kept.to(self.device), sound)
        mask = given.mask.cpu().repeat_interleave(sound.token_size)[: sound.samples]
        if mask.all():
            raise InputError(
                f"nothing to generate: the recording has {lasting:g} s; give more seconds or a gap"
            )
        tokens = torch.cat(list(parts(replace(sound, known=given), None)))
        (made,) = self._sounds(tokens[None], self._sizes(seconds), True, gain)
        wave = F.pad(wave, (0, max(0, sound.samples - len(wave))))[: sound.samples]
        return Sound(torch.where(mask, wave, made.audio), rate)

    def loop(self, caption: str, **options: Any) -> Sound:
        """A sound whose end leads into its beginning, of its `seconds` to the nearest token.

        Args:
            caption: what is heard.
            options: as of :meth:`stream`.

        Raises:
            InputError: as :meth:`as_completed`.
        """
        options.setdefault("window", self.config.data.audio_duration)
        sound, parts = self._single(caption, None, loop=True, **options)
        tokens = torch.cat(list(parts(sound, None)))
        (made,) = self._sounds(tokens[None], self.config.data, False)
        return made

    def _single(
        self,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        *,
        features: Features | None = None,
        seconds: float | None = None,
        seed: int = 0,
        negative_caption: str | None = None,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 8,
        memory: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        cancel: Event | None = None,
        loop: bool = False,
        whole: bool = True,
        **options: Any,
    ) -> tuple[LongSound, Callable[[LongSound, int | None], Iterator[Tensor]]]:
        """A sound of windows, of one if it is no longer, and what makes it in groups."""
        (seconds,) = self._seconds(seconds, 1)
        plan = self.plan(**options)
        if features is None:
            features = self.encode(caption, video, seconds, negative_caption, window)
        if not isinstance(features, Scene):
            self._check(0, features, self._sizes(seconds))
        length = window if loop and window else self._window(seconds, window) or seconds
        sound = self._long(
            features,
            seconds,
            seed,
            plan,
            length,
            overlap,
            batch_size,
            memory,
            loop=loop,
            whole=whole,
        )
        return sound, lambda sound, group: self._long_parts(0, sound, group, on_step, cancel)

    def encode(
        self,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        seconds: float | None = None,
        negative_caption: str | None = None,
        window: float | None = None,
    ) -> Features:
        """Features of one row, as a features file holds them; what is not given is absent.

        A video longer than a window is encoded window by window, when they are generated.

        Raises:
            InputError: a video that cannot be decoded; encoders of another width than the model.
        """
        encoders = load_encoders(self.config.model, self.device)
        seconds = self.config.data.audio_duration if seconds is None else seconds
        features: dict[str, Tensor] = {}
        if caption is not None:
            features |= encode_captions(encoders, [caption])[0]
        if negative_caption is not None:
            (negative,) = encode_captions(encoders, [negative_caption])
            features["negative_text_features"] = negative["text_features"]
        if video is None:
            return features
        length, limits = self._window(seconds, window), self.config.decoding
        if length is not None:
            return film(encoders, Path(video), features, seconds, length, limits)
        return features | encode_video(encoders, Path(video), seconds, limits)

    def _window(self, seconds: float, window: float | None) -> float | None:
        """Seconds of the windows that make a sound of `seconds`; None where it is made at once."""
        window = self.config.data.audio_duration if window is None else window
        if window < 0:
            raise InputError(f"window is {window:g}; wanted seconds, or 0 for none")
        return window if 0 < window < seconds else None

    def generate_features(
        self, features: Sequence[Features], seeds: Sequence[int], **options: Any
    ) -> list[Sound]:
        """Generates one sound per row of features, in their order.

        Args:
            features: per row some of clip_features and sync_features (both or neither),
                text_features and negative_text_features (what guidance leads away from), of the
                configuration's shapes; absent ones are missing modalities. Or what
                :meth:`encode` returned.
            seeds: one per row, each the seed of that row's noise.
            seconds: of all sounds or of each; by default the configuration's. Features of a video
                must be of as many.
            solver, steps, times, guidance, guidance_interval, guidance_rescale: of the
                :class:`Plan`, by default :meth:`plan`'s.
            window: seconds of the windows that a longer sound is made of, by default as trained;
                0 makes any sound at once.
            overlap: seconds that neighbouring windows have in common, by default a fifth of one.
            batch_size: rows, or windows, at a time, at most; fewer where memory demands it.
            memory: bytes that generation may add to what is in use; by default 0.8 of what is
                free. Nothing runs that is expected to need more.
            trim: cut to the asked duration, else whole tokens are kept.
            progress: called with (rows done, rows in all).
            on_step: called with a :class:`Step` after every step.
            cancel: once it is set, the next step is not taken.

        Raises:
            InputError: a shape that does not fit (row, key, found, wanted), an option out of
                range, a clip too long for the memory.
            Cancelled: `cancel` was set.
        """
        return _in_order(self._generate(features, seeds, **options))

    def _generate(
        self,
        features: Sequence[Features],
        seeds: Sequence[int],
        *,
        seconds: float | Sequence[float] | None = None,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 8,
        memory: int | None = None,
        trim: bool = True,
        progress: Callable[[int, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
        cancel: Event | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Sound]]:
        """Checks everything there is to check, then generates as it is iterated."""
        plan = self.plan(**options)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; wanted at least 1")
        if len(seeds) != len(features):
            raise InputError(f"{len(seeds)} seeds for {len(features)} rows; wanted as many")
        lasting = self._seconds(seconds, len(features))
        sizes = {length: self._sizes(length) for length in dict.fromkeys(lasting)}
        for row, given in enumerate(features):
            if not isinstance(given, Scene):
                self._check(row, given, sizes[lasting[row]])
        at_once = [None if self._window(s, window) else s for s in lasting]
        batches = self._batches(at_once, sizes, plan, batch_size, memory)
        long = [
            self._long(
                features[row],
                lasting[row],
                seeds[row],
                plan,
                span,
                overlap,
                batch_size,
                memory,
            )
            for row in range(len(features))
            if (span := self._window(lasting[row], window))
        ]
        long_rows = [row for row, seconds in enumerate(at_once) if seconds is None]

        def run() -> Iterator[tuple[int, Sound]]:
            done = 0
            for batch in batches:
                rows: list[Mapping[str, Tensor]] = []
                for row in batch.rows:
                    given = features[row]
                    assert not isinstance(given, Scene)  # a scene is made of windows
                    rows.append(given)
                tokens = self._sample(
                    batch, rows, [seeds[row] for row in batch.rows], plan, on_step, cancel
                )
                sounds = self._sounds(tokens, batch.data, trim)
                done += len(sounds)
                if progress is not None:
                    progress(done, len(features))
                yield from zip(batch.rows, sounds, strict=True)
            for row, sound in zip(long_rows, long, strict=True):
                parts = self._long_parts(row, sound, None, on_step, cancel)
                data = sizes[lasting[row]]
                (made,) = self._sounds(torch.cat(list(parts))[None], data, trim)
                done += 1
                if progress is not None:
                    progress(done, len(features))
                yield row, made

        return run()

    def _seconds(self, seconds: float | Sequence[float] | None, rows: int) -> list[float]:
        given = self.config.data.audio_duration if seconds is None else seconds
        lasting = [given] * rows if isinstance(given, (int, float)) else list(given)
        if len(lasting) != rows:
            raise InputError(f"{len(lasting)} seconds for {rows} rows; wanted as many")
        for row, length in enumerate(lasting):
            if not 0 < length < float("inf"):
                raise InputError(f"row {row}: seconds is {length}; wanted more than 0")
        return lasting


def _in_order(completed: Iterator[tuple[int, Sound]]) -> list[Sound]:
    return [sound for _, sound in sorted(completed, key=lambda pair: pair[0])]


def _settle(
    checkpoint: str | os.PathLike[str], given: Config | None, carried: dict | None
) -> Config:
    if carried is None:
        if given is None:
            raise InputError(
                f"{checkpoint}: it carries no configuration; give one (a run keeps its own in "
                "config.yaml beside its checkpoints)"
            )
        return given
    trained = config_from_dict(carried, where=str(checkpoint))
    if given is None:
        return trained
    for key in ("target_sample_rate", "audio_duration", "audio_dim", "audio_scale"):
        asked, was = getattr(given.data, key), getattr(trained.data, key)
        if asked != was:
            raise InputError(f"{checkpoint}: trained with data.{key} {was}; asked for {asked}")
    return given


def load(checkpoint: str | os.PathLike[str], **options: Any) -> Sampler:
    """`wavflow.load("toy_8k")("a small bell rings twice").save("bell.wav")`.

    Arguments and options of :meth:`Sampler.load`.
    """
    return Sampler.load(checkpoint, **options)
