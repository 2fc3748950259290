"""What sampling asks of WavFlow: its field, and the way from captions and videos to conditions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import wavflow_kernels as kernels
from wavflow.base.errors import InputError
from wavflow.features.encode import encode_captions, encode_video, load_encoders
from wavflow.layers.prepare import prepare_inference
from wavflow.sampling.field import Known, Size
from wavflow.sampling.scene import Features, Scene
from wavflow.systems.wavflow.conditions import Conditions
from wavflow.systems.wavflow.config import RunConfig, WavflowDataConfig
from wavflow.systems.wavflow.footprint import clip_bytes
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.systems.wavflow.scenes import film, stored

#: For how many lengths empty conditions and views of the network are kept.
KEPT_LENGTHS = 4
#: Held while a cache changes; networks and conditions are made outside of it.
_keeping = Lock()

T = TypeVar("T")


class WavflowField:
    """The flow that WavFlow's network predicts: waveform tokens (b n d) under video and text.

    Args:
        network: the network with the weights to use, or its prepared copy.
        config: what it was trained with.
        dtype: dtype of its matrix products.
    """

    def __init__(
        self, network: WavflowModel, config: RunConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        self.network, self.config, self.dtype = network, config, dtype
        self.prediction = config.sampling.prediction_type
        self._views: OrderedDict[Hashable, WavflowModel] = OrderedDict()
        self._empty: OrderedDict[Hashable, Conditions] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Copied and pickled without what is kept for speed.
        return self.__dict__ | {"_views": OrderedDict(), "_empty": OrderedDict()}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.device

    def start(self, seeds: Tensor, first: int, tokens: int) -> Tensor:
        """Philox noise, (b tokens d) float32, from token `first` of each seed's sequence on."""
        return kernels.philox_normal(
            seeds,
            tokens,
            self.network.latent_dim,
            noise_scale=self.config.sampling.noise_scale,
            first=first,
        )

    def conditions(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> Conditions:
        """The conditions of sounds of one size; what a row lacks is a missing modality."""
        network = self._of_size(size)
        missing = {
            "clip_features": network.get_empty_clip_sequence(1)[0],
            "sync_features": network.get_empty_sync_sequence(1)[0],
            "text_features": network.get_empty_string_sequence(1)[0],
        }
        return network.preprocess_conditions(
            *(self._stack(features, key, empty) for key, empty in missing.items())
        )

    def empty(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> Conditions:
        """Conditions without video, and with the rows' negative captions or the empty one."""
        network, key = self._of_size(size), "negative_text_features"
        if any(key in row for row in features):
            negative = self._stack(features, key, network.get_empty_string_sequence(1)[0])
            return network.get_empty_conditions(len(features), negative_text_features=negative)
        one = _kept(self._empty, network.config, lambda: network.get_empty_conditions(1))
        return one.expand(len(features))

    def predict(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        """The prediction (b n d) for x (b n d) at a 0-d t."""
        return self._at(x, conditions).predict_flow(x, t.expand(len(x)), conditions)

    def predict_pair(
        self, t: Tensor, x: Tensor, conditions: Conditions, empty: Conditions
    ) -> tuple[Tensor, Tensor]:
        """Predictions with conditions and with empty ones, in one pass of 2 b rows."""
        return self._at(x, conditions).predict_flow_pair(x, t, conditions, empty)

    def among(self, rank: int, size: int) -> None:
        """From now on `size` processes share the tokens of every state; 1 shares nothing."""
        self.network.sharing.among(rank, size)

    def key(self, conditions: Conditions) -> Hashable:
        """What a graph depends on: token counts, attention window, who shares the tokens."""
        tokens = len(conditions.rope), len(conditions.sync_tokens.index)
        sharing = self.network.sharing
        return tokens, conditions.window, sharing.rank, sharing.size

    def bytes(self, size: Size, guided: bool) -> int:
        """An upper estimate of the memory that one sound of that size takes."""
        return clip_bytes(self._of_size(size).config, self.dtype, guided, self.device)

    def waves(self, states: Tensor, samples: int | None = None, gain: float = 1.0) -> Tensor:
        """The waves (b samples) of clean tokens, in [-1, 1] on the CPU.

        gain: how many times as loud as the sound the tokens are, beside the configuration's scale.
        """
        waves = kernels.unpatchify(
            states.float(), samples=samples, audio_scale=self.config.data.audio_scale * gain
        )
        return waves.clamp(-1, 1).cpu()

    def rows(self, size: Size) -> tuple[int, int]:
        """How many rows of clip features and of sync features a sound of that size has."""
        data = self.config.data
        if size.seconds == data.audio_duration:
            return data.clip_seq_len, data.sync_seq_len
        video = load_encoders(self.config.model, self.device).video
        return video.clip_rows(size.seconds), video.sync_rows(size.seconds)

    def _of_size(self, size: Size) -> WavflowModel:
        return self._view(size.tokens, *self.rows(size))

    def _at(self, x: Tensor, conditions: Conditions) -> WavflowModel:
        return self._view(x.shape[1], conditions.clip_f.shape[1], conditions.sync_rows.shape[1])

    def _view(self, tokens: int, clip_rows: int, sync_rows: int) -> WavflowModel:
        """The network for clips of these lengths; all views share the weights."""
        network = self.network
        lengths = tokens, clip_rows, sync_rows
        if lengths == (network.latent_seq_len, network.clip_seq_len, network.sync_seq_len):
            return network
        return _kept(
            self._views, (network.config, lengths), lambda: network.with_seq_lengths(*lengths)
        )

    def _stack(self, features: Sequence[Mapping[str, Tensor]], key: str, empty: Tensor) -> Tensor:
        return torch.stack([row.get(key, empty).to(self.device) for row in features])


class WavflowMaker:
    """Turns captions, videos and features into what WavFlow's field needs.

    Args:
        config: what the network was trained with.
        model: the network with the weights to use, or its copy prepared for `dtype`.
        device: where it runs.
        dtype: dtype of its matrix products.
        prepare: whether its weights are laid out for inference; torch.compile cannot trace weights
            in oneDNN's layout.
    """

    def __init__(
        self,
        config: RunConfig,
        model: WavflowModel,
        device: torch.device,
        dtype: torch.dtype,
        *,
        prepare: bool = True,
    ) -> None:
        model = model.to(device).eval().requires_grad_(False)
        if prepare and not model.is_prepared:
            model = prepare_inference(model, dtype)
        self.config, self.seconds = config, config.data.audio_duration
        self.field = WavflowField(model, config, dtype)

    def size(self, seconds: float) -> Size:
        """How long a sound of so many seconds is.

        Raises:
            InputError: it is shorter than a frame of its video.
        """
        data = self.config.data
        size = Size(seconds, data.target_sample_rate, data.audio_dim)
        if min(self.field.rows(size)) < 1:
            raise InputError(f"seconds is {seconds}; its video has no frame, wanted more")
        return size

    def encode(
        self,
        caption: str | None,
        video: Path | None,
        negative_caption: str | None,
        seconds: float,
        window: float | None,
    ) -> Features:
        """The features of one sound; a video longer than a window is encoded window by window.

        Raises:
            InputError: a video that cannot be decoded.
        """
        encoders = load_encoders(self.config.model, self.field.device)
        features: dict[str, Tensor] = {}
        if caption is not None:
            features |= encode_captions(encoders, [caption])[0]
        if negative_caption is not None:
            (negative,) = encode_captions(encoders, [negative_caption])
            features["negative_text_features"] = negative["text_features"]
        if video is None:
            return features
        limits = self.config.decoding
        if window is not None:
            return film(encoders, video, features, seconds, window, limits)
        return features | encode_video(encoders, video, seconds, limits)

    def check(self, row: int, features: Mapping[str, Tensor], size: Size) -> None:
        """Raises InputError, naming row and key, unless these are features of a sound of `size`."""
        if ("clip_features" in features) != ("sync_features" in features):
            raise InputError(f"row {row}: clip_features and sync_features go together")
        shapes = self._data(size).feature_shapes
        shapes["negative_text_features"] = shapes["text_features"]
        for key, shape in shapes.items():
            found = tuple(features[key].shape) if key in features else shape
            if found != shape:
                raise InputError(f"row {row}: {key} is {found}; the model wants {shape}")

    def scene(self, features: Mapping[str, Tensor], window: Size) -> Scene:
        """The features of the windows of a sound, out of those of the whole sound."""
        return stored(features, self._data(window))

    def known(self, wave: Tensor, kept: Tensor, tokens: int) -> tuple[Known, float]:
        """The tokens of which every sample is kept, lifted as clips of the training are.

        Args:
            wave: (t,) samples from the sound's beginning on; fewer or more than the tokens'.
            kept: (t,) bool, which of them are known; the level is theirs alone.
            tokens: how many tokens the sound has.

        Returns:
            What is known, and the gain of the lift.
        """
        data, heard = self.config.data, wave[kept]
        lifted = kernels.lift_patchify(
            heard[None], token_size=len(heard), tokens=1, audio_scale=1.0
        )
        lifted = lifted.flatten()
        free = lifted.abs() < 1  # samples that the lift did not clip
        gain = float(lifted[free].abs().sum() / heard[free].abs().sum().clamp_min(1e-12)) or 1.0
        length = tokens * data.audio_dim
        wave, kept = (F.pad(x[:length], (0, max(0, length - len(x)))) for x in (wave, kept))
        clean = data.audio_scale * (gain * wave).clamp(-1, 1)
        return Known(clean.view(tokens, -1), kept.view(tokens, -1).all(1)), gain

    def _data(self, size: Size) -> WavflowDataConfig:
        """The section `data` with the sizes of sounds of `size`."""
        clip_rows, sync_rows = self.field.rows(size)
        return replace(
            self.config.data,
            audio_duration=size.seconds,
            clip_seq_len=clip_rows,
            sync_seq_len=sync_rows,
        )


def _kept(cache: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """The cache's value of a key, made if need be; the most recently used ones stay."""
    with _keeping:
        value = cache.pop(key, None)
        if value is not None:
            cache[key] = value
            return value
    value = make()
    with _keeping:
        cache[key] = value
        while len(cache) > KEPT_LENGTHS:
            cache.popitem(last=False)
    return value
