"""The public system's YAML files run as they are, in a folder laid out as theirs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.public import SMALL, write_public

from wavflow.base import state_dict
from wavflow.cli import main
from wavflow.data.manifest import write_csv
from wavflow.toy.world import write_toy_world

EMBEDDED = ["model.encoders=embedded"]
CLIPS = 3


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wavflow(*arguments: str) -> int:
    """Runs a command in this process; its exit status."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three clips of 8 s, tables without flags, the YAML files: the working folder of a user."""
    root = tmp_path_factory.mktemp("public")
    samples = root / "training_samples"
    write_toy_world(samples, 8, 3, heldout=0, seconds=8.0, workers=1)
    rows = [
        row for row in read(samples / "train.csv") if row["video_exist"] == row["text_exist"] == "1"
    ][:CLIPS]
    assert len(rows) == CLIPS
    for kind, columns in (
        ("vt2a", ("id", "audio_path", "video_path", "caption")),
        ("t2a", ("id", "audio_path", "caption")),
    ):
        table = [{name: row[name] for name in columns} for row in rows]
        write_csv(samples / f"features/{kind}_feature.csv", table, columns)
    examples = [
        {
            "video_path": f"training_samples/{row['video_path']}",
            "caption": row["caption"],
            "video_exist": number,
            "text_exist": 1,
        }
        for number, row in enumerate(rows[:2])
    ]
    write_csv(samples / "infer_example.csv", examples, list(examples[0]))
    write_public(root / "configs")
    return root


@pytest.fixture(scope="module")
def extracted(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        # As torchrun starts the two of them, though one after the other.
        for rank in (0, 1):
            for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
                patch.setenv(name, str(value))
            assert wavflow("extract", "--config", "configs/extract_vt2a.yaml", *EMBEDDED) == 0
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name)
        assert wavflow("extract", "--config", "configs/extract_t2a.yaml", *EMBEDDED) == 0
    return root


@pytest.mark.parametrize("kind", ["vt2a", "t2a"])
def test_extraction_writes_what_the_files_name(extracted, kind):
    samples = extracted / "training_samples"
    source, table = (
        read(samples / name) for name in (f"features/{kind}_feature.csv", f"train_{kind}.csv")
    )
    assert list(table[0]) == ["id", "audio_path", "features_path", "video_exist", "text_exist"]
    assert [row["id"] for row in table] == [row["id"] for row in source]
    for row, given in zip(table, source, strict=True):
        assert os.path.samefile(row["audio_path"], samples / given["audio_path"])
        assert row["features_path"] == str(samples / f"features/{kind}/{row['id']}.pth")
        assert (row["video_exist"], row["text_exist"]) == (str(int(kind == "vt2a")), "1")
        held = torch.load(row["features_path"], weights_only=True)
        rows = {key: held[key].shape[0] for key in held if key.endswith("_features")}
        video = {"clip_features": 64, "sync_features": 192} if kind == "vt2a" else {}
        assert rows == {**video, "text_features": 77}


@pytest.fixture(scope="module")
def trained(extracted):
    """One epoch under torchrun, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "wavflow.train", "--config", "configs/train.yaml"]
    more = ["training.epochs=1", "training.checkpoint_freq=1"]
    done = subprocess.run(
        [*command, *SMALL, *more], cwd=extracted, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("keys with no effect here: ") == 1
    return extracted


def test_training_writes_the_public_layout(trained):
    out = trained / "output/test_wavflow"
    content = state_dict.load(out / "checkpoint_latest.pth")
    wanted = {"model", "optimizer", "epoch", "global_step", "model_ema1", "model_ema2"}
    assert wanted <= content.keys()
    assert content["epoch"] == 1 and content["global_step"] == 1  # 3 clips, 2 x 2 in a step
    assert (out / "training.log").is_file()


def test_generation_writes_a_sound_per_row(trained):
    more = ["model.ckpt_path=output/test_wavflow/checkpoint_latest.pth", "sampling.num_steps=2"]
    command = [sys.executable, "-m", "wavflow.infer", "--config", "configs/infer.yaml"]
    done = subprocess.run(
        [*command, *SMALL, *more], cwd=trained, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    videos = [
        Path(row["video_path"]) for row in read(trained / "training_samples/infer_example.csv")
    ]
    assert sorted(p.stem for p in (trained / "output/infer").glob("*.wav")) == sorted(
        video.stem for video in videos
    )
