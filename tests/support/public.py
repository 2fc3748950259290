"""The public system's configuration files, and the overrides that make them run in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: File name -> its content, key by key.
PUBLIC: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "config/public_configs.json").read_text(encoding="utf-8")
)

#: A network of the smallest size, for clips as the files have them, that hears the encoders which
#: come with the package.
SMALL = [
    "model.encoders=embedded",
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "data.clip_dim=64",
    "data.sync_dim=4",
    "data.sync_layout=even",
    "data.text_dim=64",
]


def write_public(folder: Path, files: dict[str, Any] = PUBLIC) -> Path:
    """Writes the files into a folder, and returns it."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        OmegaConf.save(OmegaConf.create(content), folder / name)
    return folder
