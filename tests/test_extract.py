from __future__ import annotations

import csv
import functools
import os
import re
import shutil

import numpy as np
import pytest
import torch

from wavflow.audio import save_wav
from wavflow.config import load_config
from wavflow.data.dataset import ClipDataset, plan, prefetch, read_features, steps_per_epoch
from wavflow.data.toy import write_toy_world
from wavflow.errors import InputError
from wavflow.features.extract import extract


@functools.cache
def toy():
    return load_config("toy_8k").data


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_toy_world(root / "toy", 12, 3, heldout=1, workers=1)
    result = extract(root / "toy/train.csv", root / "out", workers=2)
    return root, result


@pytest.fixture
def world(made, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(made[0], tmp_path / "w")
    rows = read(tmp_path / "w/out/train.csv")
    for row in rows:
        row["audio_path"] = str(tmp_path / "w/toy/audio" / os.path.basename(row["audio_path"]))
    rewrite(tmp_path / "w/out/train.csv", rows)
    return tmp_path / "w"


def test_files_and_table(made):
    root, result = made
    assert (result.done, result.kept, result.failed) == (12, 0, 0)
    source = {row["id"]: row for row in read(root / "toy/train.csv")}
    table = read(result.csv)
    assert list(table[0]) == ["id", "audio_path", "features_path", "video_exist", "text_exist"]
    assert [row["id"] for row in table] == list(source)
    for row in table:
        flags = row["video_exist"], row["text_exist"]
        assert flags == (source[row["id"]]["video_exist"], source[row["id"]]["text_exist"])
        assert os.path.samefile(row["audio_path"], root / "toy" / source[row["id"]]["audio_path"])
        held = torch.load(result.csv.parent / row["features_path"], weights_only=True)
        wanted = ["clip_features", "sync_features"] * (flags[0] == "1")
        wanted += ["text_features"] * (flags[1] == "1")
        assert list(held) == [*wanted, "source"]
        read_features(result.csv.parent / row["features_path"], toy().feature_shapes, wanted)
    assert {row["status"] for row in read(result.report)} == {"ok"}


def test_workers_change_nothing(made, tmp_path):
    root, result = made
    extract(root / "toy/train.csv", tmp_path, workers=0)
    for path in sorted((tmp_path / "features").iterdir()):
        one = torch.load(path, weights_only=True)
        two = torch.load(result.csv.parent / "features" / path.name, weights_only=True)
        assert one["source"] == two["source"]
        for key in one.keys() - {"source"}:
            assert torch.equal(one[key], two[key])


def test_second_run_keeps_what_is_whole_and_current(world):
    again = extract(world / "toy/train.csv", world / "out", workers=0)
    assert (again.done, again.kept, again.failed) == (0, 12, 0)
    rows = read(world / "toy/train.csv")
    changed = next(row for row in rows if row["text_exist"] == "1")
    changed["caption"] = "something else"
    rewrite(world / "toy/train.csv", rows)
    broken = world / "out/features" / f"{rows[-1]['id']}.pth"
    broken.write_bytes(broken.read_bytes()[:100])
    assert changed["id"] != rows[-1]["id"]
    again = extract(world / "toy/train.csv", world / "out", workers=0)
    assert (again.done, again.kept, again.failed) == (2, 10, 0)


def test_text_only_rows_never_decode(world, monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr("wavflow.features.video.decode", refuse)
    rows = [row for row in read(world / "toy/train.csv") if row["video_exist"] == "0"]
    assert rows
    rewrite(world / "toy/text.csv", rows)
    assert extract(world / "toy/text.csv", world / "new", workers=0).done == len(rows)


def test_bad_rows_are_left_out_and_reported(world):
    rows = [row for row in read(world / "toy/train.csv") if row["video_exist"] == "1"][:6]
    with open(world / "toy/videos/broken.mp4", "wb") as file:
        file.write(b"\x00" * 1000)
    rows[0]["video_path"] = "videos/broken.mp4"
    rows[1]["video_path"] = "videos/gone.mp4"
    rows[2]["audio_path"] = "audio/gone.wav"
    rows[3]["id"] = "../escape"
    rows[4]["video_exist"] = "maybe"
    rewrite(world / "toy/bad.csv", rows)
    result = extract(world / "toy/bad.csv", world / "new", workers=2)
    assert (result.done, result.kept, result.failed) == (1, 0, 5)
    report = read(result.report)
    assert [row["status"] for row in report] == ["failed"] * 5 + ["ok"]
    for row, word in zip(
        report, ("broken.mp4", "gone.mp4", "gone.wav", "'../escape'", "'maybe'"), strict=False
    ):
        assert word in row["reason"] and row["reason"].startswith("row ")
    assert [row["id"] for row in read(result.csv)] == [rows[5]["id"]]
    assert not (world / "escape.pth").exists()


def test_unusable_tables(world, tmp_path):
    with pytest.raises(InputError, match="no column 'caption'"):
        rewrite(tmp_path / "c.csv", [{"id": "a", "audio_path": "a", "video_path": "v"}])
        extract(tmp_path / "c.csv", tmp_path / "out")
    with pytest.raises(InputError, match="would replace"):
        extract(world / "toy/train.csv", world / "toy")
    with pytest.raises(InputError, match="encoders 'clop' do not exist"):
        extract(world / "toy/train.csv", world / "new", encoders="clop")


# The training set


def test_dataset_holds_the_rows(made):
    _, result = made
    data = ClipDataset(result.csv, toy())
    table = read(result.csv)
    assert len(data) == 12
    batch = data.batch(range(12))
    assert batch.ids == [row["id"] for row in table]
    assert batch.wave.shape == (12, toy().samples)
    assert batch.has_video.tolist() == [row["video_exist"] == "1" for row in table]
    assert batch.has_text.tolist() == [row["text_exist"] == "1" for row in table]
    assert torch.equal(batch.features["clip_features"].abs().amax((1, 2)) > 0, batch.has_video)
    assert torch.equal(batch.features["text_features"].abs().amax((1, 2)) > 0, batch.has_text)


def test_flag_hides_what_the_file_holds(world):
    rows = read(world / "out/train.csv")
    full = next(row for row in rows if row["video_exist"] == row["text_exist"] == "1")
    full["video_exist"] = "0"
    rewrite(world / "out/one.csv", [full])
    clip = ClipDataset(world / "out/one.csv", toy())[0]
    assert not clip.has_video and clip.has_text
    assert list(clip.features) == ["text_features"]


def test_cache_bound(made):
    _, result = made
    from dataclasses import replace

    full = ClipDataset(result.csv, toy())
    none = ClipDataset(result.csv, replace(toy(), cache_mb=0))
    assert len(full._cache) == 12 and len(none._cache) == 0
    assert torch.equal(full[5].wave, none[5].wave)


def test_bad_rows_are_dropped_named_and_reported(world, caplog):
    rows = read(world / "out/train.csv")
    ids = [row["id"] for row in rows]
    audio = [world / "toy/audio" / f"{id}.wav" for id in ids]
    save_wav(audio[0], torch.zeros(16000), 8000)
    audio[1].write_bytes(b"RIFFnonsense")
    audio[2].write_bytes(b"")
    audio[3].unlink()
    import soundfile

    wave = np.zeros(16000, np.float32)
    wave[7] = np.nan
    soundfile.write(audio[4], wave, 8000, subtype="FLOAT")
    features = torch.load(world / "out" / rows[5]["features_path"], weights_only=True)
    key = next(iter(features))
    torch.save({**features, key: features[key][:-1]}, world / "out" / rows[5]["features_path"])
    features = torch.load(world / "out" / rows[6]["features_path"], weights_only=True)
    key = next(iter(features))
    features[key][0, 0] = float("inf")
    torch.save(features, world / "out" / rows[6]["features_path"])
    rows[7]["text_exist"] = "2"
    rewrite(world / "out/train.csv", rows)

    data = ClipDataset(world / "out/train.csv", toy(), report=world / "report.csv")
    assert [row.id for row in data.rows] == ids[8:]
    assert len(caplog.records) == 8
    report = read(world / "report.csv")
    assert [row["status"] for row in report] == ["skipped"] * 8 + ["ok"] * 4
    for row, word in zip(
        report,
        ("silent", "not readable", ".wav", "no such file", "nan", "wanted (", "non-finite", "'2'"),
        strict=False,
    ):
        assert word in row["reason"], row
    assert re.search(
        r"row 7: .*\.pth: \w+_features is \(\d+, \d+\); wanted \(", report[5]["reason"]
    )


def test_wrong_shapes_everywhere_are_an_error(made):
    from dataclasses import replace

    _, result = made
    with pytest.raises(InputError, match=r"no usable row; the first: row 2: .*\.pth: .*wanted"):
        ClipDataset(result.csv, replace(toy(), clip_dim=32, text_dim=16))
    with pytest.raises(InputError, match="no such file"):
        ClipDataset(result.csv.with_name("gone.csv"), toy())


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_features_file_runs_nothing(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"clip_features": Payload(tmp_path / "ran")}, path)
    with pytest.raises(InputError, match=r"x\.pth: not a readable features file"):
        read_features(path, toy().feature_shapes)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="wanted a dict of features, found list"):
        read_features(path, toy().feature_shapes)
    torch.save({"text_features": torch.zeros(77, 64)}, path)
    with pytest.raises(InputError, match="no clip_features, found text_features"):
        read_features(path, toy().feature_shapes, ("clip_features",))


def test_missing_column(world):
    rows = read(world / "out/train.csv")
    rewrite(world / "out/short.csv", [{k: r[k] for k in ("id", "audio_path")} for r in rows])
    with pytest.raises(InputError, match=r"short\.csv: no column 'features_path'"):
        ClipDataset(world / "out/short.csv", toy())


# Order


def take(items, size, seed, epoch, step, count):
    work = plan(items, size, seed, epoch, step)
    return [next(work) for _ in range(count)]


def test_order_depends_on_seed_and_epoch_and_goes_on_anywhere():
    whole = take(10, 3, 5, 0, 0, 9)
    assert [w.step for w in whole] == [0, 1, 2] * 3
    assert [w.epoch for w in whole] == [0] * 3 + [1] * 3 + [2] * 3
    assert take(10, 3, 5, 1, 2, 4) == whole[5:]
    for epoch in range(3):
        seen = sum((w.indices for w in whole if w.epoch == epoch), [])
        assert len(set(seen)) == 9
    assert [w.indices for w in whole[:3]] != [w.indices for w in whole[3:6]]
    assert take(10, 3, 6, 0, 0, 9) != whole
    assert steps_per_epoch(2, 5) == 1 and len(take(2, 5, 0, 0, 0, 1)[0].indices) == 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_passes_errors_on(workers):
    batches = prefetch(lambda w: sum(w.indices), plan(10, 3, 5, 0, 0), workers, 2)
    for work in take(10, 3, 5, 0, 0, 20):
        assert next(batches) == (work, sum(work.indices))
    batches.close()

    def fail(work):
        raise InputError("gone")

    with pytest.raises(InputError, match="gone"):
        next(prefetch(fail, plan(10, 3, 5, 0, 0), workers, 2))
