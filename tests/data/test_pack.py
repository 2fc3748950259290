from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from support.tables import (
    clips_of,
    opened,
    pack_clips,
    packed_clips,
    sizes,
    write_clip,
    write_table,
)

from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.cli.app import main
from wavflow.data.dataset import ClipDataset
from wavflow.data.manifest import write_csv
from wavflow.data.shards import PackedDataset

CLIPS = 31
# An id with a dot, and another that only "%25" tells apart from it.
HOSTILE = "a.b%2Eß" + "x" * 150
TWIN = HOSTILE.replace(".", "%2E")


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, rows):
    write_csv(path, rows, list(rows[0]))
    return path


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    return caught.value.code or 0


def same(one, two):
    assert one.problems == two.problems == {}
    assert one.batch.ids == two.batch.ids
    for name in ("wave", "lengths"):
        assert torch.equal(getattr(one.batch, name), getattr(two.batch, name))
    for flag in ("video", "text"):
        assert torch.equal(one.batch.present[flag], two.batch.present[flag])
    for key, values in one.batch.features.items():
        assert torch.equal(values, two.batch.features[key])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Clips of 2 s; one with float32 sound, one with float16 and one with bfloat16 features."""
    import soundfile

    root = tmp_path_factory.mktemp("table")
    path = write_table(root, CLIPS - 2, 2.0)
    wave = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    soundfile.write(root / "c003.wav", wave, 8000, subtype="FLOAT")
    for id, dtype in (("c004", torch.float16), ("c005", torch.bfloat16)):
        held = torch.load(root / f"{id}.pth", weights_only=True)
        torch.save({key: value.to(dtype) for key, value in held.items()}, root / f"{id}.pth")
    rows = read(path)
    rows.append(write_clip(root, HOSTILE, 40, 2.0, 48, True, True))
    rows.append(write_clip(root, TWIN, 40, 2.0, 48, True, True))
    return rewrite(path, rows)


@pytest.fixture(scope="module")
def packed(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "p"
    return pack_clips(table, out, sizes(), shard_mb=1)


@pytest.fixture
def copy(packed, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(packed.folder, tmp_path / "copy")


# The same data


@pytest.mark.parametrize("crop", ["first", "random"])
def test_training_from_the_pack_is_training_from_the_files(table, packed, crop):
    files = clips_of(table, sizes(crop=crop))
    data = packed_clips(packed.folder, sizes(crop=crop), verify=True)
    assert packed.done == len(data) == len(files) == CLIPS and packed.failed == 0
    assert data.fingerprint() == files.fingerprint()
    order, other = files.order(4), data.order(4)
    for start in range(0, 3 * len(files), 16):
        indices = [order[p] for p in range(start, start + 16)]
        assert indices == [other[p] for p in range(start, start + 16)]
        draw = Draw(4, range(start, start + 16))
        same(files.load(indices, draw), data.load(indices, draw))
    one, two = files[5], data[5]
    assert torch.equal(one.wave, two.wave) and one.id == two.id
    assert all(torch.equal(one.features[key], two.features[key]) for key in one.features)
    assert data.subset(3).load([2], Draw(0, [0])).batch.ids == ["c002"]


def test_what_is_kept_of_each_array(packed):
    data = packed_clips(packed.folder, sizes())
    kept = {i: data.recording(i) for i in (0, 3, 4, 5)}
    assert [kept[i].wave.dtype for i in kept] == [np.int16, np.float32, np.int16, np.int16]
    assert kept[4].features["text_features"].dtype == np.float16
    assert kept[5].features["text_features"].dtype == np.float32
    assert kept[0].features["sync_features"].shape == (48, 8)
    assert list(data.recording(1).features) == ["text_features"]
    with pytest.raises(ValueError, match="read-only"):
        kept[0].wave[0] = 1


def test_shards_are_plain_webdataset(table, packed):
    assert len(list(packed.folder.glob("*.tar"))) > 3
    rows = {row["id"]: row for row in read(table)}
    seen = []
    for path in sorted(packed.folder.glob("*.tar")):
        groups = {}
        with tarfile.open(path, "r|") as tar:  # in one pass, as WebDataset reads
            for member in tar:
                key, _, name = member.name.partition(".")
                groups.setdefault(key, {})[name] = tar.extractfile(member).read()
        for clip in groups.values():
            facts = json.loads(clip.pop("json"))
            row = rows[facts["id"]]
            seen.append(facts["id"])
            arrays = {name: np.load(io.BytesIO(value)) for name, value in clip.items()}
            assert ("clip.npy" in arrays) == ("sync.npy" in arrays) == facts["video_exist"]
            assert ("text.npy" in arrays) == facts["text_exist"]
            assert facts["video_exist"] == (row["video_exist"] == "1")
            assert facts["text_exist"] == (row["text_exist"] == "1")
            assert facts["source"] == row["source"]
            assert (facts["sample_rate"], facts["samples"]) == (8000, arrays["wave.npy"].size)
    assert seen == list(rows)
    assert seen[-2:] == [HOSTILE, TWIN]


def test_shards_order_reads_a_few_at_a_time(packed):
    data = packed_clips(packed.folder, sizes(shuffle="shards", shuffle_shards=2))
    order = data.order(1)
    chosen = [order[p] for p in range(len(data))]
    assert sorted(chosen) == list(range(len(data)))
    shards = [data._shards[i] for i in chosen]
    number = len(set(shards))
    assert number > 3 and len(set(shards[: shards.count(shards[0])])) <= 2
    for place in range(len(shards)):
        assert len(set(shards[:place]) & set(shards[place:])) <= 2


# Rows that cannot be used, and the command


def test_bad_rows_are_left_out_and_reported(tmp_path, capsys):
    table = write_table(tmp_path, 8)
    rows = read(table)
    (tmp_path / "c002.wav").unlink()
    (tmp_path / "c007.pth").write_bytes(b"nonsense")
    rows[4]["video_exist"] = "maybe"
    rewrite(table, rows)
    config = tmp_path / "c.yaml"
    keys = ("target_sample_rate", "audio_duration", "audio_dim", "clip_seq_len", "clip_dim")
    keys += ("sync_seq_len", "sync_dim", "sync_layout", "text_dim")
    config.write_text("data:\n" + "".join(f"  {k}: {getattr(sizes(), k)}\n" for k in keys))
    command = ("pack", "--csv", table, "--out", tmp_path / "p", "--config", config)
    for _ in range(2):  # a whole pack says the same again
        assert run(*command, "--shard-mb", 1) == 1
        assert re.search(
            r"5 packed, 3 failed\n3 rows failed; .*report.csv", capsys.readouterr().err
        )
        report = read(tmp_path / "p/report.csv")
        files = clips_of(table, sizes(), report=tmp_path / "files.csv")
        assert report == read(tmp_path / "files.csv")
        assert [row["id"] for row in report if row["status"] == "skipped"] == [
            "c002",
            "c004",
            "c007",
        ]
    data = opened(sizes(csv_path=str(tmp_path / "p")), report=tmp_path / "r.csv")
    assert data.ids == files.ids
    assert sorted(map(tuple, map(dict.values, read(tmp_path / "r.csv")))) == sorted(
        map(tuple, map(dict.values, report))
    )
    rewrite(table, [rows[2], rows[4], rows[7]])
    assert run(*command[:4], tmp_path / "none", *command[5:]) == 2
    assert "no usable row; the first: row 2: " in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "none").iterdir() if p.suffix] == ["report.csv"]
    assert run("pack", "--csv", table, "--out", tmp_path / "q", "--shard-mb", 0) == 2


# Interruption


def test_a_whole_pack_is_left_alone(table, copy, packed):
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("shard*")}
    assert pack_clips(table, copy, sizes(), shard_mb=1).done == packed.done
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("shard*")} == before


@pytest.mark.parametrize("left", [0, 1, 3])
def test_an_interrupted_pack_goes_on_with_whole_shards(table, packed, copy, left, monkeypatch):
    (copy / "pack.json").unlink()
    (copy / ".0123.tmp").write_bytes(b"left behind")
    for path in sorted(copy.glob("shard*.json"))[left:]:
        path.unlink()
    (copy / f"shard-{left:06d}.tar").write_bytes(b"half a shard")
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(copy.glob("shard*"))[: 2 * left]}
    calls = []
    monkeypatch.setattr(
        "wavflow.data.recording.load_audio",
        lambda path, rate, load=sys.modules["wavflow.media.audio"].load_audio: (
            calls.append(path) or load(path, rate)
        ),
    )
    assert pack_clips(table, copy, sizes(), shard_mb=1).done == CLIPS
    assert kept == {name: (copy / name).stat().st_mtime_ns for name in kept}
    index = json.loads((packed.folder / "shard-000000.json").read_text())
    assert len(calls) <= CLIPS - left * len(index["clips"])
    for path in packed.folder.glob("[sp]*"):
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert not (copy / ".0123.tmp").exists()


def test_killed_at_any_time(table, packed, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tables import pack_clips, sizes\n"
        "print('begun', flush=True)\n"
        "pack_clips(sys.argv[2], sys.argv[3], sizes(), shard_mb=1, workers=1)\n"
    )
    argv = [sys.executable, "-c", code, os.path.dirname(__file__), str(table), str(tmp_path)]
    for delay in (0.02, 0.06, 0.1):
        child = subprocess.Popen(argv, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    pack_clips(table, tmp_path, sizes(), shard_mb=1)
    for path in packed.folder.glob("[sp]*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_skipped_rows_survive_an_interruption(tmp_path):
    table = write_table(tmp_path, 20)
    for id in ("c000", "c008", "c019"):
        (tmp_path / f"{id}.wav").unlink()
    whole = pack_clips(table, tmp_path / "p", sizes(), shard_mb=1)
    report = read(whole.report)
    assert (whole.done, whole.failed) == (17, 3)
    content = (tmp_path / "p/pack.json").read_text()
    names = sorted(path.name for path in (tmp_path / "p").glob("shard*.json"))
    assert len(names) >= 3
    for name in names[1:]:
        (tmp_path / "p" / name).unlink()
    (tmp_path / "p/pack.json").unlink()
    assert pack_clips(table, tmp_path / "p", sizes(), shard_mb=1) == whole
    assert (tmp_path / "p/pack.json").read_text() == content and read(whole.report) == report


def test_one_at_a_time(table, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at work in it"):
            pack_clips(table, tmp_path, sizes())


# What does not fit


@pytest.mark.parametrize("whole", [True, False])
def test_another_table_or_config_wants_another_folder(table, copy, tmp_path, whole):
    if not whole:
        (copy / "pack.json").unlink()
    rows = read(table)
    rows[0]["source"] = "radio"
    changed = rewrite(table.with_name("changed.csv"), rows)
    with pytest.raises(InputError, match="another table, or one that has changed.*another folder"):
        pack_clips(changed, copy, sizes())
    with pytest.raises(
        InputError, match="data.target_sample_rate 8000, wanted 16000.*another folder"
    ):
        pack_clips(table, copy, sizes(target_sample_rate=16000))


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("target_sample_rate", 16000, 8000),
        ("audio_duration", 2.0, 1.0),
        ("sync_dim", 4, 8),
        ("text_seq_len", 78, 77),
        ("sync_layout", "segments", "even"),
    ],
)
def test_a_pack_of_other_sizes(packed, key, value, found):
    message = f"pack.json: packed with data.{key} {found}, wanted {value}"
    with pytest.raises(InputError, match=message):
        packed_clips(packed.folder, sizes(**{key: value}))


def test_damage_is_seen_when_a_pack_is_opened(packed, copy, tmp_path):
    tar, index = copy / "shard-000001.tar", copy / "shard-000001.json"
    whole = bytearray(tar.read_bytes())
    whole[len(whole) // 2] ^= 1
    tar.write_bytes(whole)
    packed_clips(copy, sizes())
    with pytest.raises(InputError, match=r"shard-000001.tar: its SHA-256 is \w{64}; wanted \w{64}"):
        packed_clips(copy, sizes(), verify=True)
    tar.write_bytes(whole[:-512])
    with pytest.raises(InputError, match=f"{len(whole) - 512} bytes long; its index wants"):
        packed_clips(copy, sizes())
    tar.unlink()
    with pytest.raises(InputError, match="shard-000001.tar: missing; its index wants"):
        packed_clips(copy, sizes())
    tar.write_bytes(whole)
    held = json.loads(index.read_text())
    for change in ({"offset": 2**40}, {"offset": 1537}, {"dtype": "|O"}, {"shape": [8, 17]}):
        held["clips"][1]["arrays"]["text"] = {"offset": 1536, "dtype": "<f4", "shape": [77, 512]}
        held["clips"][1]["arrays"]["text"] |= change
        index.write_text(json.dumps(held))
        with pytest.raises(InputError, match="shard-000001.json: text of clip c00. cannot be"):
            packed_clips(copy, sizes())
    index.write_text(json.dumps({"schema": 2}))
    with pytest.raises(
        InputError, match="shard-000001.json: no config, table, .*; wanted an index"
    ):
        packed_clips(copy, sizes())
    index.write_text("{")
    with pytest.raises(InputError, match="shard-000001.json: not readable as JSON"):
        packed_clips(copy, sizes())
    (copy / "pack.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(InputError, match="pack.json: its schema is 1; wanted 2"):
        packed_clips(copy, sizes())
    (copy / "pack.json").unlink()
    with pytest.raises(InputError, match="pack.json: no such file, wanted a whole pack"):
        packed_clips(copy, sizes())


# Opening


def test_open_by_what_the_configuration_names(table, packed, tmp_path):
    assert type(opened(sizes(csv_path=str(table)))) is ClipDataset
    assert type(opened(sizes(csv_path=str(packed.folder)))) is PackedDataset
    config = sizes(csv_path=str(table), store=str(tmp_path / "store"))
    progress = []
    data = opened(config, progress=lambda *counts: progress.append(counts))
    assert type(data) is PackedDataset and len(data) == CLIPS
    assert progress[-1] == (CLIPS, CLIPS)
    again = opened(config, progress=lambda *counts: pytest.fail("packed again"))
    assert again.fingerprint() == data.fingerprint()
    with pytest.raises(InputError, match="a folder; with data.store wanted the CSV"):
        opened(sizes(csv_path=str(packed.folder), store=str(tmp_path / "more")))
    with pytest.raises(InputError, match="data.csv_path is not set"):
        opened(sizes())
    with pytest.raises(InputError, match="gone.csv: no such file"):
        opened(sizes(csv_path="gone.csv"))
