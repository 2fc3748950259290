"""From captions and videos to sound."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wavflow_kernels as kernels
from wavflow import precision
from wavflow.audio import load_audio
from wavflow.build import build_model
from wavflow.checkpoint import load_into, read_weights
from wavflow.config import Config, DataConfig, config_from_dict
from wavflow.engine import Engine, Output, mix_guidance
from wavflow.errors import Cancelled, InputError
from wavflow.features.extract import encode_captions, encode_video, load_encoders
from wavflow.long import Evaluation, LongSound, known
from wavflow.memory import available_memory, clip_bytes
from wavflow.model.inference import prepare_inference
from wavflow.model.networks import Conditions, WavflowConfig, WavflowModel
from wavflow.parallel import World
from wavflow.plan import Plan, Step
from wavflow.scene import Scene, film, stored
from wavflow.solvers import (
    BEST,
    SolverError,
    adaptive,
    sampling_times,
    solver_table,
    table_slots,
)
from wavflow.sound import Sound
from wavflow.windows import Windows

log = logging.getLogger("wavflow")

#: Share of the free memory that generation plans to use.
MEMORY_SHARE = 0.8
#: Lengths whose empty conditions are kept.
KEPT_LENGTHS = 4


#: Features of one sound, as a features file holds them, or of the windows of a long one.
Features = Mapping[str, Tensor] | Scene


@dataclass(frozen=True)
class _Batch:
    """Rows of one length that are generated together."""

    rows: tuple[int, ...]
    data: DataConfig


class Sampler:
    """A trained network, ready to generate.

    Matrices are prepared for `dtype` once; biases, norms, the timestep embedding (t near 1 needs
    more than 8 bits), the solver's state and the noise stay float32. A clip's noise depends on its
    seed alone, whatever else is in the batch.

    A sound longer than the clips of the training is made of windows (`wavflow.long`). Several
    processes share the windows of a long sound, or the tokens of one that is made at once.

    Args:
        model: the network with the weights to use, or its copy prepared for `dtype`.
        config: what it was trained with.
        device: where it runs.
        dtype: of its matrix products.
        engine: how steps run, one of `wavflow.engine.ENGINES`.
        world: processes that share every sound; by default this one alone.
    """

    def __init__(
        self,
        model: WavflowModel,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "auto",
        world: World | None = None,
    ) -> None:
        self.world = world or World(0, 1, device)
        self.config, self.device, self.dtype = config, device, dtype
        model = model.to(device).eval().requires_grad_(False)
        # torch.compile cannot trace weights in oneDNN's layout.
        plain = model.is_prepared or (engine == "compile" and device.type == "cpu")
        self.model = model if plain else prepare_inference(model, dtype)
        try:
            self.engine = Engine(self.model, engine, dtype)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._empty: OrderedDict[tuple[int, ...], Conditions] = OrderedDict()
        self._reported: dict[float, int] = {}
        #: Where the weights come from, for the record.
        self.weights: dict[str, Any] = {}

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
            checkpoint: a training checkpoint, or a flat EMA file.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            ema: `ema1`, `ema2` or `none`; of no effect on a flat file.
            config: for a file that carries none; must agree with one that it carries.
            engine: how steps run, one of `wavflow.engine.ENGINES`.
            world: processes that share every sound.
            attention_window: seconds away that sound may be attended to, by default the
                configuration's.
            rope_scaling: of sounds that are longer than in training and made at once: `none`,
                `linear` or `ntk` (`wavflow.model.embeddings`), by default the configuration's.

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
            "file": str(checkpoint),
            "which": weights.which,
            "global_step": weights.global_step,
        }
        log.info(
            "%s: %s weights, %s, engine %s",
            checkpoint,
            weights.which,
            precision.describe(where, kind),
            sampler.engine.kind,
        )
        return sampler

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.config.data.target_sample_rate

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
        (`wavflow.solvers.BEST`). A named one takes the configuration's steps, even times and
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
        return Plan(
            solver=solver if named else BEST.solver,
            steps=steps,
            times=times,
            guidance=self.config.inference.cfg if guidance is None else guidance,
            guidance_interval=tuple(guidance_interval),
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
        captions, videos, negative = (
            [None] * rows if value is None else list(value) for value in given.values()
        )
        if len(captions) != len(videos):
            raise InputError(f"{len(captions)} captions and {len(videos)} videos; wanted as many")
        if len(negative) != rows:
            raise InputError(f"{len(negative)} negative_captions for {rows} rows; wanted as many")
        lasting = self._seconds(seconds, rows)
        window = options.get("window")
        features = [
            self.encode(*row, window)
            for row in zip(captions, videos, lasting, negative, strict=True)
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
        is_tensor = isinstance(recording, Tensor)
        wave = recording.float().cpu() if is_tensor else load_audio(recording, rate)
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
                self._window(lasting[row], window),
                overlap,
                batch_size,
                memory,
            )
            for row in range(len(features))
            if at_once[row] is None
        ]
        long_rows = [row for row, seconds in enumerate(at_once) if seconds is None]

        def run() -> Iterator[tuple[int, Sound]]:
            done = 0
            for batch in batches:
                rows = [features[row] for row in batch.rows]
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

    def _sizes(self, seconds: float) -> DataConfig:
        """The configuration's data sizes for clips of `seconds`."""
        data = self.config.data
        if seconds == data.audio_duration:
            return data
        video = load_encoders(self.config.model, self.device).video
        rows = {"clip_seq_len": video.clip_rows(seconds), "sync_seq_len": video.sync_rows(seconds)}
        if min(rows.values()) < 1:
            raise InputError(f"seconds is {seconds}; its video has no frame, wanted more")
        return replace(data, audio_duration=seconds, **rows)

    def _batches(
        self,
        lasting: Sequence[float | None],
        sizes: dict[float, DataConfig],
        plan: Plan,
        batch_size: int,
        memory: int | None,
    ) -> list[_Batch]:
        """Batches of rows of one length, which fit into the memory; none of rows of None."""
        batches: list[_Batch] = []
        for length, data in sizes.items():
            rows = [row for row, seconds in enumerate(lasting) if seconds == length]
            if rows:
                size = self._fitting(data, plan, min(batch_size, len(rows)), memory)
                batches += [
                    _Batch(tuple(rows[at : at + size]), data) for at in range(0, len(rows), size)
                ]
        return batches

    def _fitting(self, data: DataConfig, plan: Plan, wanted: int, memory: int | None) -> int:
        """How many clips of up to `wanted` fit into the memory."""
        if memory is None:
            memory = int(MEMORY_SHARE * available_memory(self.device))
        clip, length = (
            clip_bytes(self._network_sizes(data), self.dtype, plan.guided),
            data.audio_duration,
        )
        if clip > memory:
            raise InputError(
                f"a clip of {length:g} s needs about {_size(clip)}, and generation may use "
                f"{_size(memory)}: ask for fewer seconds"
            )
        size = min(wanted, memory // clip)
        if self._reported.get(length) != size:
            self._reported[length] = size
            log.info(
                "clips of %g s, %d at a time: about %s of %s",
                length,
                size,
                _size(size * clip),
                _size(memory),
            )
        return size

    def _network_sizes(self, data: DataConfig) -> WavflowConfig:
        return replace(
            self.model.config,
            latent_seq_len=data.latent_seq_len,
            clip_seq_len=data.clip_seq_len,
            sync_seq_len=data.sync_seq_len,
        )

    @torch.inference_mode()
    def _sample(
        self,
        batch: _Batch,
        features: Sequence[Mapping[str, Tensor]],
        seeds: Sequence[int],
        plan: Plan,
        on_step: Callable[[Step], None] | None,
        cancel: Event | None,
    ) -> Tensor:  # (b n d) float32
        data, sampling = batch.data, self.config.sampling
        self.model.sharing.among(self.world.rank, self.world.size)
        self.model.update_seq_lengths(data.latent_seq_len, data.clip_seq_len, data.sync_seq_len)
        noise = kernels.philox_normal(
            torch.tensor(seeds, dtype=torch.int64, device=self.device),
            data.latent_seq_len,
            data.audio_dim,
            noise_scale=sampling.noise_scale,
        )
        kind = sampling.prediction_type
        times: list[float] = []

        def check_cancelled() -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after {len(times)} steps")

        def after(total: int | None, t: float, weight: float, x: Tensor, pred: Output) -> None:
            times.append(t)
            if on_step is not None:

                def preview() -> list[Sound]:
                    guided = mix_guidance(pred, weight)
                    clean = guided if kind == "x" else x + (1 - t) * guided
                    return self._sounds(clean, data, True)

                on_step(Step(batch.rows, len(times), total, t, preview))
            check_cancelled()

        check_cancelled()
        with self.engine.cast():
            conditions = self._conditions(features)
            empty = self._empty_conditions(features) if plan.guided else None
        if plan.solver == "adaptive":

            def predict(t: Tensor, x: Tensor) -> Tensor:
                weight = plan.weight(float(t))
                pred = self.engine.predict(
                    float(t), x, conditions, empty, weight, plan.guidance_rescale
                )
                after(None, float(t), weight, x, pred)
                return mix_guidance(pred, weight)

            try:
                return adaptive(predict, noise, 0.0, 1.0 - sampling.min_sigma, prediction=kind)
            except SolverError as error:
                raise InputError(f"solver adaptive: {error}") from None
        table = self._table(plan)
        rows = table[:, :2].tolist()
        return self.engine.solve(
            noise,
            table,
            conditions,
            empty,
            rescale=plan.guidance_rescale,
            after=lambda row, x, pred: after(len(rows), *rows[row], x, pred),
        )

    def _table(self, plan: Plan) -> Tensor:  # (evaluations, 2 + k (k + 1))
        sampling = self.config.sampling
        end = 1.0 - sampling.min_sigma
        return solver_table(
            plan.solver,
            sampling_times(plan.times, plan.steps, end, sampling.noise_shift),
            prediction=sampling.prediction_type,
            guidance=plan.weight(plan.guidance_interval[0]),
            interval=plan.guidance_interval,
        )

    def _long(
        self,
        features: Features,
        seconds: float,
        seed: int,
        plan: Plan,
        window: float,
        overlap: float | None,
        batch_size: int,
        memory: int | None,
        *,
        loop: bool = False,
        whole: bool = True,
    ) -> LongSound:
        """
        Args:
            window: seconds of a window; a sound that is no longer than one is made of one.
            loop: the sound's end leads into its beginning.
            whole: all of it will be in memory.
        """
        if plan.solver == "adaptive":
            raise InputError(
                f"solver is 'adaptive', and {seconds:g} s are made of windows; wanted a solver of "
                "fixed steps, or window 0"
            )
        if memory is None:
            memory = int(MEMORY_SHARE * available_memory(self.device))
        data, table = self._sizes(window), self._table(plan)
        # The state, the sums of its predictions and the sound itself.
        needed = 4 * int(seconds * self.sample_rate) * (2 * table_slots(table) + 4)
        if whole and needed > memory:
            raise InputError(
                f"{seconds:g} s take about {_size(needed)} at once, and generation may use "
                f"{_size(memory)}: ask for fewer seconds, or stream them"
            )
        scene = features if isinstance(features, Scene) else stored(features, data)
        windows = Windows.cover(seconds, data, overlap=overlap, grid=scene.grid, loop=loop)
        seeds = torch.tensor([seed], dtype=torch.int64, device=self.device)

        def noise(first: int, tokens: int) -> Tensor:
            scale = self.config.sampling.noise_scale
            return kernels.philox_normal(
                seeds, tokens, data.audio_dim, noise_scale=scale, first=first
            )[0]

        return LongSound(
            engine=self.engine,
            windows=windows,
            data=data,
            samples=self._sizes(seconds).samples,
            table=table,
            prediction=self.config.sampling.prediction_type,
            rescale=plan.guidance_rescale,
            scene=scene,
            conditions=self._conditions,
            empty=self._empty_conditions if plan.guided else None,
            noise=noise,
            known=None,
            batch=self._fitting(data, plan, min(batch_size, len(windows)), memory),
            world=self.world,
        )

    def _long_parts(
        self,
        row: int,
        sound: LongSound,
        group: int | None,
        on_step: Callable[[Step], None] | None,
        cancel: Event | None,
    ) -> Iterator[Tensor]:  # (n d) float32
        done = 0

        def check_cancelled() -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after {done} of {sound.evaluations} evaluations")

        def after(evaluation: Evaluation) -> None:
            nonlocal done
            done += evaluation.windows
            if on_step is not None:
                data = self.config.data

                def preview() -> list[Sound]:
                    return self._sounds(evaluation.clean[None], data, False)

                on_step(Step((row,), done, sound.evaluations, evaluation.t, preview))
            check_cancelled()

        check_cancelled()
        return sound.parts(group, after)

    def _sounds(
        self, tokens: Tensor, data: DataConfig, trim: bool, gain: float = 1.0
    ) -> list[Sound]:
        waves = kernels.unpatchify(
            tokens.float(),
            samples=data.samples if trim else None,
            audio_scale=data.audio_scale * gain,
        )
        return [Sound(wave.clone(), self.sample_rate) for wave in waves.clamp(-1, 1).cpu()]

    def _conditions(self, features: Sequence[Mapping[str, Tensor]]) -> Conditions:
        missing = {
            "clip_features": self.model.get_empty_clip_sequence(1)[0],
            "sync_features": self.model.get_empty_sync_sequence(1)[0],
            "text_features": self.model.get_empty_string_sequence(1)[0],
        }
        return self.model.preprocess_conditions(
            *(self._stack(features, key, empty) for key, empty in missing.items())
        )

    def _empty_conditions(self, features: Sequence[Mapping[str, Tensor]]) -> Conditions:
        key = "negative_text_features"
        if any(key in row for row in features):
            negative = self._stack(features, key, self.model.get_empty_string_sequence(1)[0])
            return self.model.get_empty_conditions(len(features), negative_text_features=negative)
        sizes = self.model.config
        lengths = (sizes.latent_seq_len, sizes.clip_seq_len, sizes.sync_seq_len)
        one = self._empty.pop(lengths, None) or self.model.get_empty_conditions(1)
        self._empty[lengths] = one
        while len(self._empty) > KEPT_LENGTHS:
            self._empty.popitem(last=False)
        return one.expand(len(features))

    def _stack(self, features: Sequence[Mapping[str, Tensor]], key: str, empty: Tensor) -> Tensor:
        return torch.stack([row.get(key, empty).to(self.device) for row in features])

    def _check(self, row: int, features: Mapping[str, Tensor], data: DataConfig) -> None:
        if ("clip_features" in features) != ("sync_features" in features):
            raise InputError(f"row {row}: clip_features and sync_features go together")
        shapes = data.feature_shapes
        shapes["negative_text_features"] = shapes["text_features"]
        for key, shape in shapes.items():
            found = tuple(features[key].shape) if key in features else shape
            if found != shape:
                raise InputError(f"row {row}: {key} is {found}; the model wants {shape}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _in_order(completed: Iterator[tuple[int, Sound]]) -> list[Sound]:
    return [sound for _, sound in sorted(completed, key=lambda pair: pair[0])]


def _settle(
    checkpoint: str | os.PathLike[str], given: Config | None, carried: dict | None
) -> Config:
    if given is None and carried is None:
        raise InputError(
            f"{checkpoint}: it carries no configuration; give one (a run keeps its own in "
            "config.yaml beside its checkpoints)"
        )
    if carried is None:
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
    """`wavflow.load("checkpoint.pth")("a dog barks", seconds=8).save("dog.wav")`.

    All options of :meth:`Sampler.load`.
    """
    return Sampler.load(checkpoint, **options)
