"""From captions and videos to sound."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavflow.base import precision
from wavflow.base.errors import InputError
from wavflow.base.processes import World
from wavflow.config.load import load_config
from wavflow.config.schema import Config
from wavflow.media.audio import load_audio
from wavflow.media.container import open_media
from wavflow.media.sound import Sound
from wavflow.pipeline.load import read_model
from wavflow.pipeline.request import Request, Settings, check_loudness, check_seed
from wavflow.sampling.batched import Generator
from wavflow.sampling.engine import Engine
from wavflow.sampling.field import Field
from wavflow.sampling.plan import Plan
from wavflow.sampling.scene import Features, Scene
from wavflow.sampling.windowed import LongSound
from wavflow.systems import system

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from wavflow.pipeline.request import Options, PathLike, PlanOptions, RowOptions

log = logging.getLogger("wavflow")

#: Seconds that a film or recording may be longer than its sound without a word.
SHORTENED = 0.1


class Sampler:
    """A trained network, ready to generate: captions, videos and features in, sounds out.

    Made by :meth:`load`, or from a network in memory. How sounds are generated is said by keyword
    arguments, the same for all methods: those of `wavflow.pipeline.request.Settings`.

    Args:
        model: the network with the weights to use, or its copy prepared for `dtype`.
        config: what it was trained with.
        device: where it runs.
        dtype: dtype of its matrix products; biases, norms, the timestep embedding (t near 1 needs
            more than 8 bits), the solver's state and the noise stay float32.
        engine: how steps run, one of `wavflow.sampling.engine.ENGINES`.
        world: processes that share every sound; by default this one alone.

    Attributes:
        generator: follows the network's field.
        weights: where the weights come from, for the record.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "auto",
        world: World | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.maker = system(config.system).maker(
            config, model, device, dtype, prepare=engine != "compile" or device.type != "cpu"
        )
        self.generator = Generator(self.maker, config.sampling, dtype, engine, world)
        self.weights: dict[str, Any] = {}

    @classmethod
    def load(
        cls,
        checkpoint: PathLike,
        device: str = "auto",
        dtype: str = "auto",
        ema: str = "ema1",
        config: Config | PathLike | None = None,
        engine: str = "auto",
        world: World | None = None,
        attention_window: float | None = None,
        rope_scaling: str | None = None,
    ) -> Sampler:
        """Reads a checkpoint: `wavflow.load("toy_8k")("a small bell rings").save("bell.wav")`.

        Args:
            checkpoint: a training checkpoint, a flat EMA file, a safetensors file, or the name of
                weights that come with the package (`wavflow.training.checkpoint.packaged`).
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            ema: `ema1`, `ema2` or `none`; of no effect on a flat file.
            config: a `Config`, YAML file or preset, for a file that carries none; must agree with
                one that it carries.
            engine: how steps run, one of `wavflow.sampling.engine.ENGINES`.
            world: processes that share every sound.
            attention_window: seconds away that sound may be attended to, by default the
                configuration's.
            rope_scaling: how positions go on in sounds that are longer than in training and made at
                once: `none`, `linear` or `ntk` (`wavflow.layers.embeddings`), by default the
                configuration's.

        Raises:
            InputError: an unreadable file, no configuration, weights of another model, or an
                option out of range.
        """
        where = precision.resolve_device(device)
        if config is not None and not isinstance(config, Config):
            config = load_config(config)
        own = {"attention_window": attention_window, "rope_scaling": rope_scaling}
        model, config, weights = read_model(
            checkpoint, ema, config, {key: value for key, value in own.items() if value is not None}
        )
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

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.generator.rate

    @property
    def engine(self) -> Engine:
        """What runs the steps."""
        return self.generator.engine

    @property
    def field(self) -> Field:
        """What is followed from noise to sound."""
        return self.generator.field

    def plan(self, **options: Unpack[PlanOptions]) -> Plan:
        """The plan that options make, with what is not given filled in.

        Raises:
            InputError: an option out of range.
        """
        return Settings(**options).plan(self.config)

    def __call__(
        self,
        caption: str | None = None,
        video: PathLike | None = None,
        *,
        negative_caption: str | None = None,
        seconds: float | None = None,
        seed: int = 0,
        loudness: float | None = -23.0,
        **options: Unpack[Options],
    ) -> Sound:
        """One finished sound: `sampler("a dog barks", seconds=8).save("dog.wav")`.

        Args:
            caption, video: what is heard and seen; at least one of them.
            negative_caption: what guidance leads away from.
            seconds: its length, by default as trained.
            seed: what its noise depends on.
            loudness: LUFS of the sound, None leaves it as it was generated.
            options: as in `wavflow.pipeline.request.Settings`.

        Raises:
            InputError: as in :meth:`as_completed`.
            Cancelled: `cancel` was set.
        """
        request = Request(
            caption=caption,
            video=video,
            negative_caption=negative_caption,
            seconds=seconds,
            seed=seed,
        )
        check_loudness(loudness)
        sound = self.make(request, **options)
        return sound if loudness is None else sound.loud(loudness)

    def make(self, request: Request, **options: Unpack[Options]) -> Sound:
        """The sound of a request, in one piece, as loud as it was generated.

        Args:
            request: what is asked for.
            options: as in `wavflow.pipeline.request.Settings`.

        Raises:
            InputError: as in the method that makes such a sound.
            Cancelled: `cancel` was set.
        """
        request.check()
        away, seconds, seed = request.negative_caption, request.seconds, request.seed
        if request.recording is not None:
            return self.complete(
                request.recording,
                request.caption,
                request.video,
                negative_caption=away,
                seconds=seconds,
                gap=request.gap,
                seed=seed,
                **options,
            )
        if request.loop and request.caption is not None:
            return self.loop(
                request.caption, negative_caption=away, seconds=seconds, seed=seed, **options
            )
        (sound,) = self.generate(
            [request.caption],
            [request.video],
            negative_captions=[away],
            seconds=seconds,
            seed=seed,
            **options,
        )
        return sound

    def generate(
        self,
        captions: Sequence[str | None] | None = None,
        videos: Sequence[PathLike | None] | None = None,
        *,
        negative_captions: Sequence[str | None] | None = None,
        seconds: float | Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        seed: int = 0,
        **options: Unpack[RowOptions],
    ) -> list[Sound]:
        """One sound per row, in the rows' order; arguments and errors as in :meth:`as_completed`.

        `generate(captions=["rain"], seconds=4, seeds=[7], guidance=4.5, solver="euler", steps=50)`
        """
        return _in_order(
            self.as_completed(
                captions,
                videos,
                negative_captions=negative_captions,
                seconds=seconds,
                seeds=seeds,
                seed=seed,
                **options,
            )
        )

    def as_completed(
        self,
        captions: Sequence[str | None] | None = None,
        videos: Sequence[PathLike | None] | None = None,
        *,
        negative_captions: Sequence[str | None] | None = None,
        seconds: float | Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        seed: int = 0,
        **options: Unpack[RowOptions],
    ) -> Iterator[tuple[int, Sound]]:
        """Generates one sound per row and yields (row, sound) batch by batch.

        Rows of one length run together, whatever they are generated from; nothing runs between
        batches, so that closing the iterator ends the work.

        Args:
            captions, videos: one entry per row, None where a row has none; at least one list.
            negative_captions: per row what guidance leads away from, None for the empty caption.
            seconds: length of all sounds or of each; by default as trained.
            seeds: what each row's noise depends on; by default seed, seed + 1, ...
            seed: the first row's seed, where `seeds` are not given.
            options: as in `wavflow.pipeline.request.Settings`.

        Raises:
            InputError: a video that cannot be decoded, lists of different lengths, an option
                out of range, a sound too long for the memory.
            Cancelled: `cancel` was set.
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
        lasting = self.seconds(seconds, rows)
        settings = Settings(**options)
        features = [
            self.encode(caption, video, length, away, settings.window)
            for caption, video, length, away in zip(
                captions, videos, lasting, negative, strict=True
            )
        ]
        seeds = [seed + row for row in range(rows)] if seeds is None else list(seeds)
        return self._generate(features, seeds, lasting, settings)

    def generate_features(
        self,
        features: Sequence[Features],
        seeds: Sequence[int],
        *,
        seconds: float | Sequence[float] | None = None,
        **options: Unpack[RowOptions],
    ) -> list[Sound]:
        """Generates one sound per row of features, in their order.

        Args:
            features: per row the features of a features file, of the configuration's shapes, or
                what :meth:`encode` returned; absent ones are missing modalities. What guidance
                leads away from has the keys of captions with `negative_` before them.
            seeds: what each row's noise depends on, one per row.
            seconds: length of all sounds or of each; by default as trained. The features of a video
                must be of as many seconds.
            options: as in `wavflow.pipeline.request.Settings`.

        Raises:
            InputError: a shape that does not fit (row, key, found, wanted), an option out of
                range, a sound too long for the memory.
            Cancelled: `cancel` was set.
        """
        return _in_order(self.features_as_completed(features, seeds, seconds=seconds, **options))

    def features_as_completed(
        self,
        features: Sequence[Features],
        seeds: Sequence[int],
        *,
        seconds: float | Sequence[float] | None = None,
        **options: Unpack[RowOptions],
    ) -> Iterator[tuple[int, Sound]]:
        """:meth:`generate_features`, each (row, sound) as soon as it is done."""
        lasting = self.seconds(seconds, len(features))
        return self._generate(features, seeds, lasting, Settings(**options))

    def stream(
        self,
        caption: str | None = None,
        video: PathLike | None = None,
        *,
        negative_caption: str | None = None,
        seconds: float | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Iterator[Sound]:
        """One sound in parts, each as soon as it is done; memory does not grow with its length.

        The parts are those of the sound that :meth:`generate` makes, up to rounding. With S
        evaluations of the solver the first one is there after S (S + 1) / 2 evaluations of single
        windows at least, each window more takes S.

        Args:
            caption, video: what is heard and seen; at least one of them.
            negative_caption, seconds, seed, options: as in :meth:`__call__`.

        Raises:
            InputError: as :meth:`as_completed`; a video that breaks off, when it does.
            Cancelled: `cancel` was set.
        """
        request = Request(
            caption=caption,
            video=video,
            negative_caption=negative_caption,
            seconds=seconds,
            seed=seed,
            stream=True,
        )
        return self._streamed(*self._long(request, Settings(**options)))

    def stream_features(
        self,
        features: Features,
        *,
        seconds: float | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Iterator[Sound]:
        """:meth:`stream` from features, as :meth:`generate_features` takes them for one sound."""
        request = Request(seconds=seconds, seed=seed, stream=True)
        return self._streamed(*self._long(request, Settings(**options), features))

    def complete(
        self,
        recording: PathLike | Tensor,
        caption: str | None = None,
        video: PathLike | None = None,
        *,
        negative_caption: str | None = None,
        seconds: float | None = None,
        gap: tuple[float, float] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Sound:
        """A recording that goes on, or in which a gap is filled.

        What is kept comes back sample by sample, in whole tokens; a token at an edge that is not
        kept whole is generated. At every evaluation the kept tokens are the noised truth.

        Args:
            recording: a sound file, or (t,) samples at the model's rate.
            caption, video: what is heard and seen in the whole sound; both may be absent.
            seconds: length of the whole sound; by default the recording's.
            gap: seconds from and to which the recording is not kept.
            negative_caption, seed, options: as in :meth:`__call__`.

        Raises:
            InputError: as :meth:`as_completed`; nothing to generate, or nothing kept.
            Cancelled: `cancel` was set.
        """
        request = Request(
            caption=caption,
            video=video,
            negative_caption=negative_caption,
            seconds=seconds,
            seed=seed,
            recording=recording,
            gap=gap,
        )
        request.check()
        rate = self.sample_rate
        if isinstance(recording, Tensor):
            wave = recording.float().cpu()
        else:
            wave = load_audio(recording, rate)
        lasting = len(wave) / rate
        kept = torch.ones(len(wave), dtype=torch.bool)
        if gap is not None:
            kept[int(gap[0] * rate) : math.ceil(gap[1] * rate)] = False
        if not kept.any():
            raise InputError(f"the gap is all of the recording's {lasting:g} s; wanted less")
        request = replace(request, seconds=lasting if seconds is None else seconds)
        if request.seconds is not None and request.seconds < lasting - SHORTENED:
            log.warning(
                "the recording has %g s: its first %g s are kept (seconds %g for all)",
                lasting,
                request.seconds,
                lasting,
            )
        sound, parts = self._long(request, Settings(**options))
        device = self.device
        given, gain = self.maker.known(wave.to(device), kept.to(device), sound.windows.tokens)
        mask = given.mask.cpu().repeat_interleave(sound.size.token_size)[: sound.samples]
        if mask.all():
            raise InputError(
                f"nothing to generate: the recording has {lasting:g} s; give more seconds or a gap"
            )
        states = torch.cat(list(parts(replace(sound, known=given), None)))[None]
        (made,) = self.generator.sounds(states, sound.samples, gain)
        wave = F.pad(wave, (0, max(0, sound.samples - len(wave))))[: sound.samples]
        return Sound(torch.where(mask, wave, made.audio), rate)

    def loop(
        self,
        caption: str,
        *,
        negative_caption: str | None = None,
        seconds: float | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Sound:
        """A sound whose end leads into its beginning; it has `seconds` to the nearest token.

        Args:
            caption: what is heard.
            negative_caption, seconds, seed, options: as in :meth:`__call__`.

        Raises:
            InputError: as :meth:`as_completed`.
            Cancelled: `cancel` was set.
        """
        request = Request(
            caption=caption,
            negative_caption=negative_caption,
            seconds=seconds,
            seed=seed,
            loop=True,
        )
        sound, parts = self._long(request, Settings(**options))
        (made,) = self.generator.sounds(torch.cat(list(parts(sound, None)))[None])
        return made

    def encode(
        self,
        caption: str | None = None,
        video: PathLike | None = None,
        seconds: float | None = None,
        negative_caption: str | None = None,
        window: float | None = None,
    ) -> Features:
        """Features of one row, as a features file holds them; what is not given is absent.

        A video longer than a window is encoded window by window, while these are generated.

        Args:
            caption, video, negative_caption, seconds: as in :meth:`__call__`.
            window: seconds of the windows that the sound is made of, as in
                `wavflow.pipeline.request.Settings`.

        Raises:
            InputError: a video that cannot be decoded; encoders of another width than the model.
        """
        seconds = self.maker.seconds if seconds is None else seconds
        path = None if video is None else Path(video)
        span = self.generator.window(seconds, window)
        features = self.maker.encode(caption, path, negative_caption, seconds, span)
        if path is not None:
            whole = film_seconds(path)
            if whole is not None and whole > seconds + SHORTENED:
                log.warning(
                    "%s: the video has %.2f s, its first %g s get sound (seconds %.2f for all)",
                    path,
                    whole,
                    seconds,
                    whole,
                )
        return features

    def _long(
        self, request: Request, settings: Settings, features: Features | None = None
    ) -> tuple[LongSound, Callable[[LongSound, int | None], Iterator[Tensor]]]:
        """How a sound is made of windows, or of one, and what makes its parts in groups."""
        if features is None:
            request.check()
        if settings.progress is not None or not settings.trim:
            raise InputError("trim and progress are for rows of sounds, not for a single one")
        (seconds,) = self.seconds(request.seconds, 1)
        plan = settings.plan(self.config)
        if features is None:
            features = self.encode(
                request.caption, request.video, seconds, request.negative_caption, settings.window
            )
        if not isinstance(features, Scene):
            self.maker.check(0, features, self.maker.size(seconds))
        window = self.generator.window(seconds, settings.window) or seconds
        if request.loop:  # a window may reach around it
            window = (self.maker.seconds if settings.window is None else settings.window) or seconds
        sound = self.generator.long(
            features,
            seconds,
            request.seed,
            plan,
            window,
            overlap=settings.overlap,
            budget=settings.budget,
            loop=request.loop,
            whole=not request.stream,
        )
        monitor = settings.monitor
        return sound, lambda sound, group: self.generator.parts(0, sound, group, monitor)

    def _streamed(
        self, sound: LongSound, parts: Callable[[LongSound, int | None], Iterator[Tensor]]
    ) -> Iterator[Sound]:
        left = sound.samples

        def run() -> Iterator[Sound]:
            nonlocal left
            for part in parts(sound, sound.batch):
                (made,) = self.generator.sounds(part[None])
                if left > 0:
                    yield Sound(made.audio[:left], made.sample_rate)
                left -= made.audio.numel()

        return run()

    def _generate(
        self,
        features: Sequence[Features],
        seeds: Sequence[int],
        seconds: Sequence[float],
        settings: Settings,
    ) -> Iterator[tuple[int, Sound]]:
        if len(seeds) != len(features):
            raise InputError(f"{len(seeds)} seeds for {len(features)} rows; wanted as many")
        for row, seed in enumerate(seeds):
            check_seed(seed, f"row {row}: seed")
        return self.generator.generate(
            features,
            seeds,
            settings.plan(self.config),
            seconds=seconds,
            window=settings.window,
            overlap=settings.overlap,
            budget=settings.budget,
            trim=settings.trim,
            progress=settings.progress,
            monitor=settings.monitor,
        )

    def seconds(self, seconds: float | Sequence[float] | None, rows: int) -> list[float]:
        """The length of each of `rows` sounds, by default as trained.

        Raises:
            InputError: as many lengths as rows are wanted, and each above 0.
        """
        given = self.maker.seconds if seconds is None else seconds
        lasting = [given] * rows if isinstance(given, (int, float)) else list(given)
        if len(lasting) != rows:
            raise InputError(f"{len(lasting)} seconds for {rows} rows; wanted as many")
        for row, length in enumerate(lasting):
            if not 0 < length < math.inf:
                raise InputError(f"row {row}: seconds is {length}; wanted more than 0")
        return lasting


def _in_order(completed: Iterator[tuple[int, Sound]]) -> list[Sound]:
    return [sound for _, sound in sorted(completed, key=lambda pair: pair[0])]


def film_seconds(path: Path) -> float | None:
    """How long a video's pictures last, as its container says; None where it does not."""
    import av

    try:
        with open_media(path, "video") as container:
            stream = container.streams.video[0]
            if stream.duration is not None and stream.time_base is not None:
                return float(stream.duration * stream.time_base)
            return None if container.duration is None else container.duration / av.time_base
    except (InputError, IndexError, av.FFmpegError):
        return None


load = Sampler.load
