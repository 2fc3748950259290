"""From captions and videos to sound."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import wavflow_kernels as kernels
from wavflow import precision
from wavflow.build import build_model
from wavflow.checkpoint import load_into, read_weights
from wavflow.config import Config, config_from_dict
from wavflow.errors import InputError
from wavflow.features.extract import encode_captions, encode_video, load_encoders
from wavflow.model.inference import prepare_inference
from wavflow.model.networks import Conditions, WavflowModel
from wavflow.solvers import SOLVERS, adaptive, solve, solver_table, time_grid

log = logging.getLogger("wavflow")


@dataclass(frozen=True)
class Sound:
    """One generated clip: wave (t,) float32 in [-1, 1], rate in Hz."""

    wave: Tensor
    rate: int

    def loud(self, lufs: float = -23.0) -> Sound:
        """The same sound at an integrated loudness of `lufs` (ITU-R BS.1770)."""
        from wavflow.audio import normalize_loudness

        return Sound(normalize_loudness(self.wave, self.rate, lufs), self.rate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes 16-bit PCM: .wav, or .flac by the suffix."""
        from wavflow.audio import save_wav

        save_wav(path, self.wave, self.rate)


class Sampler:
    """A trained network, ready to generate.

    Matrices are prepared for `dtype` once; biases, norms, the timestep embedding (t near 1 needs
    more than 8 bits), the solver's state and the noise stay float32. A clip's noise depends on its
    seed alone, whatever else is in the batch.

    Args:
        model: the network, with the weights to use.
        config: what it was trained with.
        device: where it runs.
        dtype: of its matrix products.
    """

    def __init__(
        self, model: WavflowModel, config: Config, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        model = model.to(device).eval().requires_grad_(False)
        self.model = model if dtype == torch.float32 else prepare_inference(model, dtype)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        device: str = "auto",
        dtype: str = "auto",
        ema: str = "ema1",
        config: Config | None = None,
    ) -> Sampler:
        """Reads a checkpoint.

        Args:
            checkpoint: a training checkpoint, or a flat EMA file.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            ema: `ema1`, `ema2` or `none`; of no effect on a flat file.
            config: for a file that carries none; must agree with one that it carries.

        Raises:
            InputError: unreadable file, no configuration, weights of another model.
        """
        where = precision.resolve_device(device)
        weights = read_weights(checkpoint, ema)
        config = _settle(checkpoint, config, weights.config)
        model = build_model(config)
        load_into(model, weights.state, checkpoint)
        kind = precision.resolve_dtype(dtype, where)
        log.info("%s: %s weights, %s", checkpoint, weights.which, precision.describe(where, kind))
        return cls(model, config, where, kind)

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self.config.data.target_sample_rate

    def generate(
        self,
        captions: Sequence[str | None] | None = None,
        videos: Sequence[str | os.PathLike[str] | None] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        solver: str = "euler",
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sound]:
        """Generates one sound per row.

        Args:
            captions, videos: one entry per row, None where a row has none; at least one list.
            seeds: one per row; by default seed, seed + 1, ...
            guidance: classifier-free guidance, by default the configuration's; 1 or less runs the
                conditional pass alone.
            steps: solver steps, by default the configuration's.
            solver: a key of `wavflow.solvers.SOLVERS`, or `adaptive`.
            batch_size: rows at a time.
            progress: called with (rows done, rows in all).

        Raises:
            InputError: a video that cannot be decoded, lists of different lengths, an option
                out of range.
        """
        for name, value in (("captions", captions), ("videos", videos)):
            if isinstance(value, (str, os.PathLike)):
                raise InputError(f"{name} is {value!r}; wanted a list with one entry per row")
        rows = len(captions if captions is not None else videos if videos is not None else ())
        captions = [None] * rows if captions is None else list(captions)
        videos = [None] * rows if videos is None else list(videos)
        if rows == 0:
            raise InputError("nothing to generate: give captions, videos or both")
        if len(captions) != len(videos):
            raise InputError(f"{len(captions)} captions and {len(videos)} videos; wanted as many")
        features = [self.encode(c, v) for c, v in zip(captions, videos, strict=True)]
        seeds = [seed + row for row in range(rows)] if seeds is None else list(seeds)
        return self.generate_features(
            features,
            seeds,
            guidance=guidance,
            steps=steps,
            solver=solver,
            batch_size=batch_size,
            progress=progress,
        )

    def encode(
        self, caption: str | None = None, video: str | os.PathLike[str] | None = None
    ) -> dict[str, Tensor]:
        """Features of one row, as a features file holds them; what is not given is absent.

        Raises:
            InputError: a video that cannot be decoded; encoders of another width than the model.
        """
        encoders = load_encoders(self.config.model.encoders)
        features: dict[str, Tensor] = {}
        if video is not None:
            features |= encode_video(encoders, Path(video), self.config.data.audio_duration)
        if caption is not None:
            features |= encode_captions(encoders, [caption])[0]
        return features

    @torch.inference_mode()
    def generate_features(
        self,
        features: Sequence[dict[str, Tensor]],
        seeds: Sequence[int],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        solver: str = "euler",
        batch_size: int = 8,
        trim: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sound]:
        """Generates one sound per row of features.

        Args:
            features: per row some of clip_features and sync_features (both or neither) and
                text_features, of the configuration's shapes; absent ones are missing modalities.
            seeds: one per row, each the seed of that row's noise.
            trim: cut to the configured duration, else whole tokens are kept.

        Raises:
            InputError: a shape that does not fit (row, key, found, wanted), an option out of
                range.
        """
        steps = self.config.sampling.num_steps if steps is None else steps
        guidance = self.config.inference.cfg if guidance is None else guidance
        if solver not in (*SOLVERS, "adaptive"):
            raise InputError(f"solver is {solver!r}; wanted one of {', '.join(SOLVERS)}, adaptive")
        if steps < 1 or batch_size < 1:
            raise InputError(f"steps is {steps}, batch_size {batch_size}; wanted at least 1")
        if len(seeds) != len(features):
            raise InputError(f"{len(seeds)} seeds for {len(features)} rows; wanted as many")
        for row, given in enumerate(features):
            self._check(row, given)
        sounds: list[Sound] = []
        for at in range(0, len(features), batch_size):
            tokens = self._sample(
                features[at : at + batch_size], seeds[at : at + batch_size], guidance, steps, solver
            )
            data = self.config.data
            waves = kernels.unpatchify(
                tokens, samples=data.samples if trim else None, audio_scale=data.audio_scale
            )
            sounds += [Sound(wave.clone(), self.rate) for wave in waves.float().clamp(-1, 1).cpu()]
            if progress is not None:
                progress(len(sounds), len(features))
        return sounds

    def _sample(
        self,
        features: Sequence[dict[str, Tensor]],
        seeds: Sequence[int],
        guidance: float,
        steps: int,
        solver: str,
    ) -> Tensor:  # (b n d) float32
        data, sampling = self.config.data, self.config.sampling
        noise = kernels.philox_normal(
            torch.tensor(seeds, dtype=torch.int64, device=self.device),
            data.latent_seq_len,
            data.audio_dim,
            noise_scale=sampling.noise_scale,
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            conditions = self._conditions(features)
            empty = self.model.get_empty_conditions(len(features)) if guidance > 1 else None

            def predict(t: Tensor, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
                if empty is None:
                    return self.model.predict_flow(x, t.expand(len(x)), conditions)
                return self.model.predict_flow_pair(x, t, conditions, empty)

            def guided(t: Tensor, x: Tensor) -> Tensor:
                return self.model.ode_wrapper(t, x, conditions, empty, guidance).float()

            kind = sampling.prediction_type
            end = 1.0 - sampling.min_sigma
            if solver != "adaptive":
                grid = time_grid(steps, 0.0, end, sampling.noise_shift)
                table = solver_table(solver, grid, prediction=kind, guidance=guidance)
                return solve(predict, noise, table)
            start, end = time_grid(1, 0.0, end, sampling.noise_shift).tolist()
            try:
                return adaptive(guided, noise, start, end, prediction=kind)
            except RuntimeError as error:
                raise InputError(f"solver adaptive: {error}") from None

    def _conditions(self, features: Sequence[dict[str, Tensor]]) -> Conditions:
        missing = {
            "clip_features": self.model.get_empty_clip_sequence(1)[0],
            "sync_features": self.model.get_empty_sync_sequence(1)[0],
            "text_features": self.model.get_empty_string_sequence(1)[0],
        }
        return self.model.preprocess_conditions(
            *(
                torch.stack([f[key].to(self.device) if key in f else empty for f in features])
                for key, empty in missing.items()
            )
        )

    def _check(self, row: int, features: dict[str, Tensor]) -> None:
        if ("clip_features" in features) != ("sync_features" in features):
            raise InputError(f"row {row}: clip_features and sync_features go together")
        for key, shape in self.config.data.feature_shapes.items():
            found = tuple(features[key].shape) if key in features else shape
            if found != shape:
                raise InputError(f"row {row}: {key} is {found}; the model wants {shape}")


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
