"""A tiny system beside the library's own: how loud each stretch of a clip is, from its beat.

Its flow is on states (b n 2), the mean and the level of n stretches, under one track of three
numbers a row that lie evenly in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavflow_kernels as kernels
from wavflow.base.seconds import exact
from wavflow.base.seeding import Draw
from wavflow.config.schema import Config, DataConfig, ModelConfig, over
from wavflow.data.dataset import ClipBatch, Clips
from wavflow.data.tracks import Even, Track
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


def maker(*args: Any, **options: Any) -> Any:
    raise NotImplementedError("pulse is trained alone")


SYSTEM = System(
    sections={"model": PulseModelConfig, "data": PulseDataConfig},
    build=lambda config: PulseNetwork(config.model.width),
    tracks=lambda config: config.data.tracks,
    objective=PulseObjective,
    maker=maker,
)
