"""A tiny system beside the library's own: how loud each stretch of a clip is, from its beat.

Its flow is on states (b n 2), the mean and the level of n stretches, under one track of three
numbers a row that lie evenly in time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavflow_kernels as kernels
from wavflow.base.errors import InputError
from wavflow.base.seconds import exact
from wavflow.base.seeding import Draw
from wavflow.config.schema import Config, DataConfig, ModelConfig, over
from wavflow.data.dataset import ClipBatch, Clips
from wavflow.data.tracks import Even, Track
from wavflow.sampling.field import Known, Size
from wavflow.sampling.scene import Features, Scene
from wavflow.systems import System
from wavflow.training.micro_batch import to_device
from wavflow.training.objective import LossTerms
from wavflow.training.run_log import Sample


@dataclass(frozen=True)
class PulseModelConfig(ModelConfig):
    """The network.

    Attributes:
        width: Channels inside.
    """

    width: int = over(16, 0)


@dataclass(frozen=True)
class PulseDataConfig(DataConfig):
    """The table of clips, and the sizes of a clip's data.

    Attributes:
        stretches: Stretches of a clip.
        beat_rows: Rows of a clip's beat.
    """

    PACK_KEYS: ClassVar[tuple[str, ...]] = (*DataConfig.PACK_KEYS, "beat_rows")

    stretches: int = over(20, 0)
    beat_rows: int = over(8, 0)

    @property
    def tracks(self) -> tuple[Track, ...]:
        even = Even(self.beat_rows / exact(self.audio_duration))
        return (Track("beat", self.beat_rows, 3, "video", even, "data.beat_rows"),)


class PulseNetwork(nn.Module):
    """Predicts the clean state from a noisy one, the time and the beat."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.silence = nn.Parameter(torch.zeros(3))
        self.layers = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, beat: Tensor, t: Tensor, present: Tensor) -> Tensor:
        beat = torch.where(present[:, None, None], beat, self.silence)
        nearest = torch.arange(x.shape[1], device=x.device) * beat.shape[1] // x.shape[1]
        time = t[:, None, None].expand(-1, x.shape[1], 1)
        return self.layers(torch.cat((x, beat[:, nearest], time), dim=2))


class PulseObjective:
    """The network, and the loss of its velocity."""

    def __init__(self, config: Config[PulseModelConfig, PulseDataConfig]) -> None:
        self.config = config

    def build(self) -> PulseNetwork:
        return PulseNetwork(self.config.model.width)

    def loss(self, model: nn.Module, batch: ClipBatch, draw: Draw) -> LossTerms:
        data, device = self.config.data, batch.wave.device
        t = to_device(draw.uniform("t").float(), device)
        wave = F.pad(batch.wave, (0, data.samples - batch.wave.shape[1]))[:, None]
        mean = F.adaptive_avg_pool1d(wave, data.stretches)
        level = F.adaptive_avg_pool1d(wave.square(), data.stretches).sqrt()
        x_1 = torch.cat((mean, level), dim=1).mT.contiguous()
        x_t, _ = kernels.flow_mix(x_1, t, seeds=to_device(draw.seeds, device))
        clean = model(x_t, batch.features["beat"], t, batch.present["video"])
        return LossTerms(kernels.flow_loss(clean.float(), x_1, t, x_t=x_t), t)

    def samples(self, model: nn.Module, dataset: Clips) -> list[Sample]:
        return []


@dataclass(frozen=True)
class PulseConditions:
    """Beats of b sounds, and whether they have one."""

    beat: Tensor  # (b rows 3)
    present: Tensor  # (b,) bool

    def expand(self, batch: int) -> PulseConditions:
        return PulseConditions(self.beat.expand(batch, -1, -1), self.present.expand(batch))

    def cat(self, *others: PulseConditions) -> PulseConditions:
        all = (self, *others)
        return PulseConditions(*(torch.cat(each) for each in zip(*map(parts, all), strict=True)))


def parts(conditions: PulseConditions) -> tuple[Tensor, Tensor]:
    return conditions.beat, conditions.present


class PulseField:
    """The flow from noise to the states of stretches."""

    prediction, device = "x", torch.device("cpu")

    def __init__(self, network: PulseNetwork, data: PulseDataConfig) -> None:
        self.network, self.data = network, data

    def rows(self, size: Size) -> int:
        return round(self.data.beat_rows * size.seconds / self.data.audio_duration)

    def start(self, seeds: Tensor, first: int, tokens: int) -> Tensor:
        return kernels.philox_normal(seeds, tokens, 2, first=first)

    def conditions(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> PulseConditions:
        none = torch.zeros(self.rows(size), 3)
        beat = torch.stack([row.get("beat", none) for row in features])
        return PulseConditions(beat, torch.tensor(["beat" in row for row in features]))

    def empty(self, features: Sequence[Mapping[str, Tensor]], size: Size) -> PulseConditions:
        return self.conditions([{} for _ in features], size)

    def predict(self, t: Tensor, x: Tensor, conditions: PulseConditions) -> Tensor:
        return self.network(x, conditions.beat, t.expand(len(x)), conditions.present)

    def predict_pair(
        self, t: Tensor, x: Tensor, conditions: PulseConditions, empty: PulseConditions
    ) -> tuple[Tensor, Tensor]:
        return self.predict(t, x, conditions), self.predict(t, x, empty)

    def among(self, rank: int, size: int) -> None:
        assert size == 1, "a pulse is not shared among processes"

    def key(self, conditions: PulseConditions) -> Hashable:
        return conditions.beat.shape

    def bytes(self, size: Size, guided: bool) -> int:
        return 1000 * size.tokens

    def waves(self, states: Tensor, samples: int | None = None, gain: float = 1.0) -> Tensor:
        size = self.data.samples // self.data.stretches
        mean, level = (each.repeat_interleave(size, 1) / gain for each in states.unbind(2))
        swing = torch.arange(mean.shape[1]) % 2 * 2 - 1
        return (mean + level * swing)[:, :samples].clamp(-1, 1)


class PulseMaker:
    """What sampling asks: a caption's letters beat the time; a video has no pulse."""

    def __init__(
        self, config: Any, model: PulseNetwork, device: torch.device, dtype: torch.dtype, **_: Any
    ) -> None:
        self.data = config.data
        self.seconds, self.field = config.data.audio_duration, PulseField(model.eval(), self.data)

    def size(self, seconds: float) -> Size:
        return Size(seconds, self.data.target_sample_rate, self.data.samples // self.data.stretches)

    def encode(
        self,
        caption: str | None,
        video: Path | None,
        negative_caption: str | None,
        seconds: float,
        window: float | None,
    ) -> Features:
        if video is not None:
            raise InputError(f"{video}: a video has no pulse; wanted a caption")
        letters = torch.tensor([ord(letter) % 32 / 32 for letter in caption or "a"])
        rows = torch.arange(self.field.rows(self.size(seconds))) % len(letters)
        return {"beat": letters[rows][:, None].expand(-1, 3)}

    def check(self, row: int, features: Mapping[str, Tensor], size: Size) -> None:
        found, wanted = tuple(features["beat"].shape), (self.field.rows(size), 3)
        if found != wanted:
            raise InputError(f"row {row}: beat is {found}; the model wants {wanted}")

    def scene(self, features: Mapping[str, Tensor], window: Size) -> Scene:
        step = 1 / Fraction(self.data.beat_rows / self.data.audio_duration)
        rows = torch.arange(self.field.rows(window))

        def beat(time: Fraction) -> dict[str, Tensor]:
            at = (int(time / step) + rows).clamp(max=len(features["beat"]) - 1)
            return {"beat": features["beat"][at]}

        return Scene({}, beat, step)

    def known(self, wave: Tensor, kept: Tensor, tokens: int) -> tuple[Known, float]:
        length = tokens * (self.data.samples // self.data.stretches)
        wave, kept = (F.pad(x[:length], (0, max(0, length - len(x)))) for x in (wave, kept))
        wave, kept = wave.view(tokens, -1), kept.view(tokens, -1).all(1)
        return Known(torch.stack((wave.mean(1), wave.square().mean(1).sqrt()), 1), kept), 1.0


SYSTEM = System(
    sections={"model": PulseModelConfig, "data": PulseDataConfig},
    build=lambda config: PulseNetwork(config.model.width),
    tracks=lambda config: config.data.tracks,
    objective=PulseObjective,
    maker=PulseMaker,
)
