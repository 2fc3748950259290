"""Training tables of made-up clips whose samples and rows say where in their clip they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wavflow.data.crop import Grid
from wavflow.data.dataset import ClipDataset
from wavflow.data.manifest import write_csv
from wavflow.data.open import open_dataset
from wavflow.data.pack import PackResult, pack
from wavflow.data.shards import PackedDataset
from wavflow.media.audio import save_wav
from wavflow.systems.wavflow.config import WavflowDataConfig

SIZES = WavflowDataConfig(
    target_sample_rate=8000,
    audio_duration=1.0,
    audio_dim=80,
    clip_seq_len=8,
    clip_dim=16,
    sync_seq_len=24,
    sync_dim=8,
    sync_layout="even",
    text_seq_len=77,
    text_dim=512,
)


def sizes(**more: object) -> WavflowDataConfig:
    return replace(SIZES, **more)


def grid_of(data: WavflowDataConfig) -> Grid:
    return Grid(data, data.tracks)


def clips_of(table: Path, data: WavflowDataConfig, **more: object) -> ClipDataset:
    return ClipDataset(table, data, data.tracks, **more)


def packed_clips(folder: Path, data: WavflowDataConfig, **more: object) -> PackedDataset:
    return PackedDataset(folder, data, data.tracks, **more)


def pack_clips(table: Path, out: Path, data: WavflowDataConfig, **more: object) -> PackResult:
    return pack(table, out, data, data.tracks, **more)


def opened(data: WavflowDataConfig, **more: object) -> ClipDataset | PackedDataset:
    return open_dataset(data, data.tracks, **more)


def rows_of(clip: int, sync: int) -> dict[str, int]:
    """Rows of a video's features, by key."""
    return {"clip_features": clip, "sync_features": sync}


def write_clip(
    root: Path, id: str, number: int, seconds: float, sync_rows: int, video: bool, text: bool
) -> dict[str, object]:
    """Sample i is (i + 1) / 32768; row r begins with (r, number of the clip)."""
    samples = round(seconds * SIZES.target_sample_rate)
    save_wav(root / f"{id}.wav", torch.arange(1, samples + 1) / 32768, SIZES.target_sample_rate)
    rows = {"clip_features": int(8 * seconds), "sync_features": sync_rows, "text_features": 77}
    features = {}
    for (key, count), (_, width) in zip(rows.items(), SIZES.feature_shapes.values(), strict=True):
        if text if key == "text_features" else video:
            features[key] = torch.rand(count, width)
            features[key][:, 0] = torch.arange(count)
            features[key][:, 1] = number
    torch.save(features, root / f"{id}.pth")
    return {
        "id": id,
        "audio_path": f"{id}.wav",
        "features_path": f"{id}.pth",
        "video_exist": video,
        "text_exist": text,
        "source": "film" if number % 3 else "game",
    }


def write_table(root: Path, clips: int, seconds: float = 1.0, name: str = "train.csv") -> Path:
    """Every fifth clip has no video, every seventh no caption; a third are of "game"."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(clips):
        sync_rows = 8 * round(3 * seconds)
        rows.append(write_clip(root, f"c{i:03d}", i, seconds, sync_rows, i % 5 != 1, i % 7 != 2))
    write_csv(root / name, rows, list(rows[0]))
    return root / name
