"""A regression that trains in milliseconds, as the trainer's objective and data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wavflow.base.processes import World
from wavflow.base.seeding import Draw
from wavflow.config.schema import TrainingConfig
from wavflow.data.order import Order
from wavflow.training.micro_batch import to_device
from wavflow.training.objective import LossTerms
from wavflow.training.run_log import Sample
from wavflow.training.trainer import Trainer

SETTINGS = TrainingConfig(
    epochs=4,
    batch_size=4,
    lr=1e-2,
    warmup_steps=3,
    log_freq=3,
    num_workers=0,
    lr_schedule="cosine",
    weight_decay=0.01,
    seed=7,
    tensorboard=False,
)
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class PointBatch:
    x: Tensor
    y: Tensor

    def pin_memory(self) -> PointBatch:
        return PointBatch(self.x.pin_memory(), self.y.pin_memory())

    def to(self, device: torch.device) -> PointBatch:
        return PointBatch(
            self.x.to(device, non_blocking=True), self.y.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class LoadedPoints:
    batch: PointBatch
    problems: dict[int, str]


class Points:
    """Points of a plane; `broken` items are NaN, `missing` ones cannot be read."""

    def __init__(
        self,
        items: int = 22,
        broken: Sequence[int] = (),
        missing: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.x = torch.randn(items, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.y = self.x.sum(1, keepdim=True)
        self.x[list(broken)] = float("nan")
        self.missing = set(missing)

    def __len__(self) -> int:
        return len(self.x)

    def id(self, index: int) -> str:
        return f"clip{index}"

    def order(self, seed: int) -> Order:
        return Order.of(len(self), seed)

    def load(self, indices: Sequence[int], draw: Draw) -> LoadedPoints:
        assert len(draw.positions) == len(indices)
        problems = {place: "it is gone" for place, i in enumerate(indices) if i in self.missing}
        return LoadedPoints(PointBatch(self.x[list(indices)], self.y[list(indices)]), problems)

    def fingerprint(self) -> str:
        return str(len(self.x))


class Net(nn.Module):
    """Three layers in a list, as the blocks of a transformer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Fit:
    """Regression under noise that comes from the draw; `each_step` is told every loss taken."""

    def __init__(
        self,
        each_step: Callable[[Draw], None] = lambda draw: None,
        hidden: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.each_step, self.hidden, self.dtype = each_step, hidden, dtype
        self.losses: list[Tensor] = []

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Net(self.hidden).to(self.dtype)

    def loss(self, model: nn.Module, batch: PointBatch, draw: Draw) -> LossTerms:
        if len(draw.positions) == len(batch.x):
            self.each_step(draw)
        noise = torch.stack([draw.normal(f"noise {i}") for i in range(3)], dim=1)
        t = draw.uniform("t")
        x = batch.x + to_device((0.1 * t[:, None] * noise).to(batch.x.dtype), batch.x.device)
        values = (model(x) - batch.y).square().mean(1)
        self.losses.append(values.detach().clone())
        return LossTerms(values, t)

    def samples(self, model: nn.Module, dataset: Points) -> list[Sample]:
        wave = model(dataset.x[:2]).detach().flatten().clamp(-1, 1).float().repeat(500)
        return [Sample("first", 8000, wave, wave)]


def make_trainer(
    out: Path,
    settings: TrainingConfig = SETTINGS,
    objective: Fit | None = None,
    dataset: Points | None = None,
    world: World = ALONE,
    **more: object,
) -> Trainer:
    dtype = (objective or Fit()).dtype
    return Trainer(
        objective or Fit(),
        dataset or Points(),
        settings,
        out,
        world=world,
        dtype=dtype,
        **{"config": {}, **more},
    )
