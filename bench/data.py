"""Clips to train on in benchmarks: noise with random features, on the device or as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wavflow.base.seeding import Draw
from wavflow.data.dataset import ClipBatch, Loaded
from wavflow.data.order import Order
from wavflow.media.audio import save_wav
from wavflow.systems.wavflow.config import WavflowDataConfig

SEED = 0


@dataclass(frozen=True)
class HeldClips:
    """A dataset of one batch, which every step gets."""

    batch: ClipBatch

    def __len__(self) -> int:
        return len(self.batch.ids)

    def id(self, index: int) -> str:
        return self.batch.ids[index]

    def order(self, seed: int) -> Order:
        return Order.of(len(self), seed)

    def load(self, indices: Sequence[int], draw: Draw) -> Loaded:
        """The first clips, as many as are asked for."""
        b, count = self.batch, len(indices)
        few = ClipBatch(
            ids=b.ids[:count],
            wave=b.wave[:count],
            lengths=b.lengths[:count],
            features={key: value[:count] for key, value in b.features.items()},
            present={flag: value[:count] for flag, value in b.present.items()},
        )
        return Loaded(few, {})

    def fingerprint(self) -> str:
        return "held"


def clips(data: WavflowDataConfig, count: int, device: torch.device) -> ClipBatch:
    """Make so many clips of noise with random features."""
    generator = torch.Generator().manual_seed(SEED)
    features = {
        key: torch.randn(count, *shape, generator=generator).to(device)
        for key, shape in data.feature_shapes.items()
    }
    wave = 0.1 * torch.randn(count, data.samples, generator=generator)
    present = torch.ones(count, dtype=torch.bool, device=device)
    return ClipBatch(
        ids=[f"clip_{i}" for i in range(count)],
        wave=wave.to(device),
        lengths=torch.full((count,), data.samples, device=device),
        features=features,
        present={"video": present, "text": present},
    )


def write_clips(folder: Path, data: WavflowDataConfig, count: int) -> Path:
    """Write a table of clips, each a wav and a features file of the configured sizes."""
    generator = torch.Generator().manual_seed(SEED)
    rows = ["id,audio_path,features_path,video_exist,text_exist"]
    for i in range(count):
        wave = 0.1 * torch.randn(data.samples, generator=generator)
        save_wav(folder / f"{i}.wav", wave, data.target_sample_rate)
        features = {
            key: torch.randn(*shape, generator=generator)
            for key, shape in data.feature_shapes.items()
        }
        torch.save(features, folder / f"{i}.pth")
        rows.append(f"{i},{i}.wav,{i}.pth,1,1")
    table = folder / "train.csv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table
