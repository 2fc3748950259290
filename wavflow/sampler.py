"""From captions and videos to sound."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

import wavflow_kernels as kernels
from wavflow import precision
from wavflow.build import build_model
from wavflow.checkpoint import load_into, read_weights
from wavflow.config import Config, DataConfig, config_from_dict
from wavflow.engine import Engine, Output, mix_guidance
from wavflow.errors import Cancelled, InputError
from wavflow.features.extract import encode_captions, encode_video, load_encoders
from wavflow.memory import available_memory, clip_bytes
from wavflow.model.inference import prepare_inference
from wavflow.model.networks import Conditions, WavflowConfig, WavflowModel
from wavflow.solvers import (
    BEST,
    SOLVERS,
    TIMES,
    SolverError,
    adaptive,
    sampling_times,
    solver_table,
)
from wavflow.sound import Sound

log = logging.getLogger("wavflow")

#: Share of the free memory that generation plans to use.
MEMORY_SHARE = 0.8
#: Lengths whose empty conditions are kept.
KEPT_LENGTHS = 4


@dataclass(frozen=True)
class Plan:
    """How sounds are generated.

    Attributes:
        solver: a key of `wavflow.solvers.SOLVERS`, or `adaptive`.
        steps: of the solver; `adaptive` takes as many as it needs.
        times: `even` under the configuration's noise_shift, `sigmoid` or `log-snr`
            (`wavflow.solvers.sampling_times`).
        guidance: weight of classifier-free guidance; 1 or less runs the conditional pass alone.
        guidance_interval: times from and to which there is guidance, as the network sees them
            (0 noise, 1 data); a step outside costs half.
        guidance_rescale: share of the guided prediction's standard deviation that is brought back
            to the unguided one's (`wavflow.engine.rescale_guidance`).
    """

    solver: str
    steps: int
    times: str
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for wrong, text in (
            (
                self.solver not in (*SOLVERS, "adaptive"),
                f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}, adaptive",
            ),
            (self.steps < 1, f"steps is {self.steps}; wanted at least 1"),
            (self.times not in TIMES, f"times is {self.times!r}; wanted one of {', '.join(TIMES)}"),
            (
                not 0 <= low <= high <= 1,
                f"guidance_interval is {low:g} to {high:g}; wanted times from 0 to 1 in order",
            ),
            (
                not 0 <= self.guidance_rescale <= 1,
                f"guidance_rescale is {self.guidance_rescale}; wanted 0 to 1",
            ),
        ):
            if wrong:
                raise InputError(text)

    @property
    def guided(self) -> bool:
        """Whether any step needs both passes."""
        return self.guidance > 1

    def weight(self, t: float) -> float:
        """Of guidance at time t."""
        low, high = self.guidance_interval
        return self.guidance if self.guided and low <= t <= high else 1.0


@dataclass(frozen=True)
class Step:
    """What a callback is told when a step of a batch is done.

    Attributes:
        rows: that are generated in this batch, by their places in the request.
        done, total: steps of this batch; an adaptive solver's total is None.
        t: the time the network was evaluated at, 0 noise, 1 data.
    """

    rows: tuple[int, ...]
    done: int
    total: int | None
    t: float
    _data: Callable[[], list[Sound]] = field(repr=False)

    def preview(self) -> list[Sound]:
        """The clean sounds that the network expects at this step, one a row; no extra pass.

        To be called within the callback: the next step overwrites what they are made of.
        """
        return self._data()


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

    Args:
        model: the network with the weights to use, or its copy prepared for `dtype`.
        config: what it was trained with.
        device: where it runs.
        dtype: of its matrix products.
        engine: how steps run, one of `wavflow.engine.ENGINES`.
    """

    def __init__(
        self,
        model: WavflowModel,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "auto",
    ) -> None:
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
    ) -> Sampler:
        """Reads a checkpoint.

        Args:
            checkpoint: a training checkpoint, or a flat EMA file.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            ema: `ema1`, `ema2` or `none`; of no effect on a flat file.
            config: for a file that carries none; must agree with one that it carries.
            engine: how steps run, one of `wavflow.engine.ENGINES`.

        Raises:
            InputError: unreadable file, no configuration, weights of another model.
        """
        where = precision.resolve_device(device)
        weights = read_weights(checkpoint, ema)
        config = _settle(checkpoint, config, weights.config)
        model = build_model(config)
        load_into(model, weights.state, checkpoint)
        kind = precision.resolve_dtype(dtype, where)
        sampler = cls(model, config, where, kind, engine)
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
        loudness: float | None = -23.0,
        **options: Any,
    ) -> Sound:
        """One finished sound: `sampler("a dog barks", seconds=8).save("dog.wav")`.

        Args:
            caption, video: what is heard and seen; at least one of them.
            loudness: LUFS of the sound, None leaves it as it was generated.
            options: `seconds`, `seed` and all of :meth:`generate_features`.

        Raises:
            InputError: as :meth:`as_completed`.
        """
        if caption is None and video is None:
            raise InputError("nothing to generate: give a caption, a video or both")
        (sound,) = self.generate([caption], [video], **options)
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
        features = [self.encode(c, v, s) for c, v, s in zip(captions, videos, lasting, strict=True)]
        for row, caption in enumerate(negative):
            if caption is not None:
                features[row]["negative_text_features"] = self.encode(caption)["text_features"]
        seeds = [seed + row for row in range(rows)] if seeds is None else list(seeds)
        return self._generate(features, seeds, seconds=lasting, **options)

    def encode(
        self,
        caption: str | None = None,
        video: str | os.PathLike[str] | None = None,
        seconds: float | None = None,
    ) -> dict[str, Tensor]:
        """Features of one row, as a features file holds them; what is not given is absent.

        Raises:
            InputError: a video that cannot be decoded; encoders of another width than the model.
        """
        encoders = load_encoders(self.config.model, self.device)
        features: dict[str, Tensor] = {}
        if video is not None:
            seconds = self.config.data.audio_duration if seconds is None else seconds
            features |= encode_video(encoders, Path(video), seconds, self.config.decoding)
        if caption is not None:
            features |= encode_captions(encoders, [caption])[0]
        return features

    def generate_features(
        self, features: Sequence[dict[str, Tensor]], seeds: Sequence[int], **options: Any
    ) -> list[Sound]:
        """Generates one sound per row of features, in their order.

        Args:
            features: per row some of clip_features and sync_features (both or neither),
                text_features and negative_text_features (what guidance leads away from), of the
                configuration's shapes; absent ones are missing modalities.
            seeds: one per row, each the seed of that row's noise.
            seconds: of all sounds or of each; by default the configuration's. Features of a video
                must be of as many.
            solver, steps, times, guidance, guidance_interval, guidance_rescale: of the
                :class:`Plan`, by default :meth:`plan`'s.
            batch_size: rows at a time, at most; fewer where memory demands it.
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
        features: Sequence[dict[str, Tensor]],
        seeds: Sequence[int],
        *,
        seconds: float | Sequence[float] | None = None,
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
            self._check(row, given, sizes[lasting[row]])
        batches = self._batches(lasting, sizes, plan, batch_size, memory)

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
        lasting: Sequence[float],
        sizes: dict[float, DataConfig],
        plan: Plan,
        batch_size: int,
        memory: int | None,
    ) -> list[_Batch]:
        """Batches of rows of one length, which fit into the memory."""
        if memory is None:
            memory = int(MEMORY_SHARE * available_memory(self.device))
        batches: list[_Batch] = []
        for length, data in sizes.items():
            clip = clip_bytes(self._network_sizes(data), self.dtype, plan.guided)
            if clip > memory:
                raise InputError(
                    f"a clip of {length:g} s needs about {_size(clip)}, and generation may use "
                    f"{_size(memory)}: ask for fewer seconds"
                )
            rows = [row for row, seconds in enumerate(lasting) if seconds == length]
            size = min(batch_size, memory // clip, len(rows))
            batches += [
                _Batch(tuple(rows[at : at + size]), data) for at in range(0, len(rows), size)
            ]
            if self._reported.get(length) != size:
                self._reported[length] = size
                log.info(
                    "clips of %g s, %d at a time: about %s of %s",
                    length,
                    size,
                    _size(size * clip),
                    _size(memory),
                )
        return batches

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
        features: Sequence[dict[str, Tensor]],
        seeds: Sequence[int],
        plan: Plan,
        on_step: Callable[[Step], None] | None,
        cancel: Event | None,
    ) -> Tensor:  # (b n d) float32
        data, sampling = batch.data, self.config.sampling
        self.model.update_seq_lengths(data.latent_seq_len, data.clip_seq_len, data.sync_seq_len)
        noise = kernels.philox_normal(
            torch.tensor(seeds, dtype=torch.int64, device=self.device),
            data.latent_seq_len,
            data.audio_dim,
            noise_scale=sampling.noise_scale,
        )
        kind, end = sampling.prediction_type, 1.0 - sampling.min_sigma
        steps = 1 if plan.solver == "adaptive" else plan.steps
        grid = sampling_times(plan.times, steps, end, sampling.noise_shift)
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
                pred = self.engine.predict(t, x, conditions, empty, weight, plan.guidance_rescale)
                after(None, float(t), weight, x, pred)
                return mix_guidance(pred, weight)

            try:
                return adaptive(predict, noise, *grid.tolist(), prediction=kind)
            except SolverError as error:
                raise InputError(f"solver adaptive: {error}") from None
        table = solver_table(
            plan.solver,
            grid,
            prediction=kind,
            guidance=plan.weight(plan.guidance_interval[0]),
            interval=plan.guidance_interval,
        )
        rows = table[:, :2].tolist()
        return self.engine.solve(
            noise,
            table,
            conditions,
            empty,
            rescale=plan.guidance_rescale,
            after=lambda row, x, pred: after(len(rows), *rows[row], x, pred),
        )

    def _sounds(self, tokens: Tensor, data: DataConfig, trim: bool) -> list[Sound]:
        waves = kernels.unpatchify(
            tokens.float(), samples=data.samples if trim else None, audio_scale=data.audio_scale
        )
        return [Sound(wave.clone(), self.sample_rate) for wave in waves.clamp(-1, 1).cpu()]

    def _conditions(self, features: Sequence[dict[str, Tensor]]) -> Conditions:
        missing = {
            "clip_features": self.model.get_empty_clip_sequence(1)[0],
            "sync_features": self.model.get_empty_sync_sequence(1)[0],
            "text_features": self.model.get_empty_string_sequence(1)[0],
        }
        return self.model.preprocess_conditions(
            *(self._stack(features, key, empty) for key, empty in missing.items())
        )

    def _empty_conditions(self, features: Sequence[dict[str, Tensor]]) -> Conditions:
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

    def _stack(self, features: Sequence[dict[str, Tensor]], key: str, empty: Tensor) -> Tensor:
        return torch.stack([row.get(key, empty).to(self.device) for row in features])

    def _check(self, row: int, features: dict[str, Tensor], data: DataConfig) -> None:
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
