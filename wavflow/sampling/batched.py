"""From features and noise to sound: what runs the network of a sampler."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import torch
from torch import Tensor

import wavflow_kernels as kernels
from wavflow.base.errors import Cancelled, InputError
from wavflow.base.memory import available_memory, keep_freed_memory
from wavflow.base.processes import World
from wavflow.config.schema import Config, DataConfig
from wavflow.features.encode import load_encoders
from wavflow.flow.guidance import Output, mix_guidance
from wavflow.flow.solvers import SolverError, adaptive, solver_table, table_slots
from wavflow.flow.times import sampling_times
from wavflow.layers.prepare import prepare_inference
from wavflow.media.sound import Sound
from wavflow.sampling.engine import Engine
from wavflow.sampling.plan import Plan, Step
from wavflow.sampling.scene import Features, Scene
from wavflow.sampling.windowed import Evaluation, LongSound
from wavflow.sampling.windows import Windows
from wavflow.systems.wavflow.conditions import Conditions
from wavflow.systems.wavflow.config import WavflowConfig
from wavflow.systems.wavflow.footprint import clip_bytes
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.systems.wavflow.scenes import stored

log = logging.getLogger("wavflow")

#: Share of the free memory that generation plans to use.
MEMORY_SHARE = 0.8
#: Lengths whose empty conditions are kept.
KEPT_LENGTHS = 4


@dataclass(frozen=True)
class _Batch:
    """Rows of one length that are generated together."""

    rows: tuple[int, ...]
    data: DataConfig


class Generator:
    """A trained network at work: features and noise in, sounds out.

    Matrices are prepared for `dtype` once; biases, norms, the timestep embedding (t near 1 needs
    more than 8 bits), the solver's state and the noise stay float32. A clip's noise depends on its
    seed alone, whatever else is in the batch.

    A sound longer than the clips of the training is made of windows (`wavflow.sampling.windowed`).
    Several processes share the windows of a long sound, or the tokens of one that is made at once.

    On a CPU the process keeps the memory it frees from then on (``wavflow.base.memory``).

    Args:
        model: the network with the weights to use, or its copy prepared for `dtype`.
        config: what it was trained with.
        device: where it runs.
        dtype: of its matrix products.
        engine: how steps run, one of `wavflow.sampling.engine.ENGINES`.
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
        if device.type == "cpu":
            keep_freed_memory()
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

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.config.data.target_sample_rate

    def _sizes(self, seconds: float) -> DataConfig:
        """The configuration's data sizes for clips of `seconds`."""
        data = self.config.data
        if seconds == data.audio_duration:
            return data
        video = load_encoders(self.config.model, self.device).video
        clip, sync = video.clip_rows(seconds), video.sync_rows(seconds)
        if min(clip, sync) < 1:
            raise InputError(f"seconds is {seconds}; its video has no frame, wanted more")
        return replace(data, audio_duration=seconds, clip_seq_len=clip, sync_seq_len=sync)

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
            clip_bytes(self._network_sizes(data), self.dtype, plan.guided, self.device),
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
            after=lambda row, x, pred: after(len(rows), rows[row][0], rows[row][1], x, pred),
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
