"""Extraction in parts, its record of what features are made with, and what a second run reads."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tables import pack_clips, packed_clips

from wavflow import __version__
from wavflow.base.errors import InputError
from wavflow.base.files import locked, read_json, working_in, write_json
from wavflow.cli.app import main
from wavflow.config.load import load_config
from wavflow.data.manifest import write_csv
from wavflow.features import extract as module
from wavflow.features.embedded import EmbeddedText
from wavflow.features.extract import extract
from wavflow.features.index import Index
from wavflow.features.provenance import check_model
from wavflow.pipeline.train import try_out
from wavflow.toy.world import write_toy_world

CLIPS = 11


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def states(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every features file."""
    files = (out / "features").glob("*.pth")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Clips of 2 s, and a row with a bad flag and one without a video file among them."""
    root = tmp_path_factory.mktemp("toy")
    write_toy_world(root, CLIPS, 3, heldout=0, workers=1)
    rows = read(root / "train.csv")
    rows.insert(4, rows[0] | {"id": "bad", "video_exist": "maybe"})
    rows.insert(7, rows[0] | {"id": "gone", "video_path": "gone.mp4"})
    write_csv(root / "table.csv", rows, list(rows[0]))
    return root / "table.csv"


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory) -> module.ExtractResult:
    return extract(table, tmp_path_factory.mktemp("whole"), workers=2)


@pytest.fixture
def out(whole: module.ExtractResult, tmp_path: Path) -> Path:
    """A copy of the extracted folder, times of change and all."""
    return Path(shutil.copytree(whole.csv.parent, tmp_path / "out"))


# Shards


def test_shards_share_the_rows_and_the_last_writes_the_table(table, whole, tmp_path) -> None:
    assert (whole.done, whole.failed, whole.unfinished) == (CLIPS, 2, 0)
    wanted = {row["id"]: row for row in read(whole.report)}
    seen: dict[str, dict[str, str]] = {}
    for turn, number in enumerate((1, 2, 0)):
        part = extract(table, tmp_path, shard=(number, 3), workers=0)
        assert part.report.name == f"report.{number}-of-3.csv"
        rows = read(part.report)
        assert part.done + part.failed == len(rows) and part.unfinished == 2 - turn
        assert not seen.keys() & {row["id"] for row in rows}
        seen |= {row["id"]: row for row in rows}
        good = {id for id, row in seen.items() if row["status"] == "ok"}
        assert [row["id"] for row in read(part.csv)] == [id for id in wanted if id in good]
    assert seen == wanted
    assert read(part.csv) == read(whole.csv)
    before = states(tmp_path)
    again = extract(table, tmp_path, workers=0)
    assert (again.done, again.kept, again.failed) == (0, CLIPS, 2) and states(tmp_path) == before


def test_a_shard_that_starts_again_has_not_ended(table, tmp_path, monkeypatch) -> None:
    for number in (0, 1):
        extract(table, tmp_path, shard=(number, 2), workers=0)
    monkeypatch.setattr(module, "_load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(table, tmp_path, shard=(0, 2), workers=0)
    monkeypatch.undo()
    assert extract(table, tmp_path, shard=(1, 2), workers=0).unfinished == 1


def test_more_shards_than_rows_and_shards_that_cannot_be(table, tmp_path) -> None:
    empty = extract(table, tmp_path, shard=(40, 50), workers=0)
    assert (empty.done, empty.failed, empty.unfinished) == (0, 0, 49) and read(empty.csv) == []
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"shard {shard[0]}/{shard[1]} does not exist"):
            extract(table, tmp_path, shard=shard)


def test_processes_at_the_same_time_as_torchrun_starts_them(table, whole, tmp_path) -> None:
    """Both may end last; the table and the pack are whole whoever does."""
    command = [sys.executable, "-m", "wavflow", "extract", "--csv", str(table)]
    command += ["--out", str(tmp_path / "out"), "--pack", str(tmp_path / "packed")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [child.communicate(timeout=120)[1] for child in children]
    reports = [read(tmp_path / "out" / f"report.{rank}-of-2.csv") for rank in range(2)]
    codes = [int(any(row["status"] == "failed" for row in report)) for report in reports]
    assert [child.returncode for child in children] == codes, said
    assert sum(len(report) for report in reports) == CLIPS + 2
    assert read(tmp_path / "out" / "table.csv") == read(whole.csv)
    packed = packed_clips(tmp_path / "packed", load_config("toy_8k").data, verify=True)
    assert packed.ids == [row["id"] for row in read(whole.csv)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_pack_is_that_of_wavflow_pack(table, whole, tmp_path, capsys) -> None:
    def run(shard: str) -> str:
        argv = ["extract", "--csv", str(table), "--out", str(tmp_path / "out"), "--shard", shard]
        with pytest.raises(SystemExit) as caught:
            main([*argv, "--pack", str(tmp_path / "packed")])
        assert caught.value.code == 1  # each has a row that fails
        return capsys.readouterr().err

    assert "shards that have not ended: 1" in run("0/2")
    assert not (tmp_path / "packed").exists()
    assert f"{CLIPS} packed, 0 failed" in run("1/2")
    one, two = tmp_path / "packed", tmp_path / "again"
    pack_clips(tmp_path / "out" / "table.csv", two, load_config("toy_8k").data)
    names = [path.name for path in sorted(two.iterdir())]
    assert names == [path.name for path in sorted(one.iterdir())] and "pack.json" in names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    with pytest.raises(SystemExit):
        main(["extract", "--csv", str(table), "--out", str(tmp_path / "out"), "--shard", "first"])
    assert "--shard is 'first'; wanted i/n, such as 0/4" in capsys.readouterr().err


def test_the_last_of_two_waits_while_the_other_packs(table, out, tmp_path, caplog) -> None:
    argv = ["extract", "--csv", str(table), "--out", str(out), "--pack", str(tmp_path / "packed")]

    def run() -> None:
        with pytest.raises(SystemExit):
            main(argv)

    with locked(tmp_path / "packed"), caplog.at_level("INFO", "wavflow"):
        other = threading.Thread(target=run)
        other.start()
        while "another process is making it; waiting" not in caplog.text:
            assert other.is_alive()
            time.sleep(0.01)
        assert not (tmp_path / "packed").exists()
    other.join(60)
    assert (tmp_path / "packed" / "pack.json").exists()


# The record


def test_other_settings_are_refused_until_told_to_overwrite(table, out) -> None:
    record, before = read_json(out / "features.json"), states(out)
    assert record["wavflow"] == __version__ and record["encoders"] == "embedded"
    assert record["video"]["clip_features"] == [16, 64] and record["seconds"] == 2.0
    assert record["text"]["text_features"] == [77, 64]
    with pytest.raises(InputError, match=r"features.json: seconds is 2.0, wanted 1.5; --overwrite"):
        extract(table, out, seconds=1.5, workers=0)
    assert states(out) == before and read_json(out / "features.json") == record
    assert (out / "report.csv").exists()

    # The first half is made again; a run that was not told to overwrite does the rest.
    half = extract(table, out, seconds=1.5, shard=(0, 2), overwrite=True, workers=0)
    assert half.kept == 0 and 0 < half.done < CLIPS
    assert len(read(half.csv)) == half.done  # nothing of 2 s is among them
    assert read_json(out / "features.json")["video"]["clip_features"] == [12, 64]
    rest = extract(table, out, seconds=1.5, workers=0)
    assert (rest.done, rest.kept) == (CLIPS - half.done, half.done)
    assert extract(table, out, seconds=1.5, overwrite=True, workers=0).kept == CLIPS


@pytest.mark.parametrize(
    ("section", "key"), [("video", "encoder"), ("video", "frames"), ("text", "revision")]
)
def test_every_fact_of_the_record_counts(table, out, section, key) -> None:
    record = read_json(out / "features.json")
    record[section][key] = "another"
    write_json(out / "features.json", record)
    with pytest.raises(InputError, match=f"features.json: {section}.{key} is another, wanted "):
        extract(table, out, workers=0)


def test_another_version_alone_is_no_other_record(table, out) -> None:
    record = read_json(out / "features.json")
    write_json(out / "features.json", record | {"wavflow": "0.0.1"})
    assert extract(table, out, workers=0).kept == CLIPS
    assert read_json(out / "features.json") == record
    write_json(out / "features.json", [record])
    with pytest.raises(InputError, match="features.json: wanted an object"):
        extract(table, out, workers=0)
    # The files know by themselves what they are.
    (out / "features.json").unlink()
    assert extract(table, out, workers=0).kept == CLIPS
    (out / "features.json").unlink()
    assert extract(table, out, seconds=1.5, workers=0).done == CLIPS


def test_a_modality_that_comes_later_joins_the_record(table, tmp_path) -> None:
    rows = [row for row in read(table) if row["video_exist"] == "0"]
    write_csv(table.parent / "words.csv", rows, list(rows[0]))
    extract(table.parent / "words.csv", tmp_path, workers=0)
    assert read_json(tmp_path / "features.json").keys() == {
        "wavflow",
        "encoders",
        "seconds",
        "text",
    }
    assert extract(table, tmp_path, workers=0).kept == len(rows)
    extract(table.parent / "words.csv", tmp_path, workers=0)
    assert "video" in read_json(tmp_path / "features.json")


def test_training_refuses_features_of_other_encoders(table, out) -> None:
    config = load_config("toy_8k")
    check_model(out / "table.csv", config.model)
    check_model(table, config.model)  # no record there
    data = replace(config.data, csv_path=str(out / "table.csv"))
    other = replace(config.model, encoders="clip_synchformer")
    with pytest.raises(InputError, match="encoders is embedded; wanted clip_synchformer, as model"):
        try_out(replace(config, model=other, data=data))

    facts = {"clip_model_name": other.clip_model_name, "clip_pretrained": other.clip_pretrained}
    write_json(out / "features.json", {"encoders": "clip_synchformer", "text": facts})
    check_model(out / "table.csv", other)
    for key in facts:
        with pytest.raises(InputError, match=f"text.{key} is .*; wanted another, as model.{key} "):
            check_model(out / "table.csv", replace(other, **{key: "another"}))


# What a second run reads


def test_rows_that_are_known_are_not_read(table, out, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(module, "read_features", refuse)
    assert extract(table, out, workers=0).kept == CLIPS
    files = sorted((out / "features").glob("*.pth"))
    os.utime(files[0])
    with pytest.raises(AssertionError, match="read"):
        extract(table, out, workers=0)
    monkeypatch.undo()
    assert extract(table, out, workers=0).kept == CLIPS  # read, and noted again
    monkeypatch.setattr(module, "read_features", refuse)
    assert extract(table, out, workers=0).kept == CLIPS
    monkeypatch.undo()

    files[1].write_bytes(files[1].read_bytes()[:-100])
    held = torch.load(files[2], weights_only=True)
    torch.save(held | {"source": held["source"] | {"seconds": 1.0}}, files[2])
    assert extract(table, out, workers=0).done == 2


def test_a_damaged_index_costs_reading_alone(table, out, monkeypatch) -> None:
    (path,) = (out / "index").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xff\x00\n" + b"".join(lines[3:])[:-5])
    before = states(out)
    assert extract(table, out, workers=0).kept == CLIPS and states(out) == before
    monkeypatch.setattr(module, "read_features", None)  # all rows are in the index again
    assert extract(table, out, workers=0).kept == CLIPS
    monkeypatch.undo()
    shutil.rmtree(out / "index")
    assert extract(table, out, workers=0).kept == CLIPS and states(out) == before


def test_the_index_goes_by_size_time_and_source(tmp_path) -> None:
    path, source = tmp_path / "a.b.pth", {"caption": "a bell"}
    path.write_bytes(b"12")
    with Index(tmp_path / "index", "0-of-2") as one, Index(tmp_path / "index", "1-of-2") as two:
        one.note(path, source)
        assert not two.knows(path, source)
        two.refresh()
        assert two.knows(path, source)
        assert not two.knows(path, {"caption": "a drum"})
        assert not two.knows(tmp_path / "a.c.pth", source)
        stat = path.stat()
        path.write_bytes(b"123")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert not two.knows(path, source)


def test_features_that_are_not_finite_are_a_failed_row(table, tmp_path, monkeypatch) -> None:
    encode = EmbeddedText.encode
    monkeypatch.setattr(EmbeddedText, "encode", lambda *given: encode(*given) * float("nan"))
    rows = [row for row in read(table) if row["video_exist"] == "0"]
    write_csv(table.parent / "words.csv", rows, list(rows[0]))
    result = extract(table.parent / "words.csv", tmp_path, workers=0)
    assert (result.done, result.failed) == (0, len(rows))
    reason = "text_features of the encoders hold non-finite values"
    assert all(row["reason"].endswith(reason) for row in read(result.report))
    assert not (tmp_path / "features").exists()


# What killed processes leave


def test_temporary_files_go_when_nobody_else_works_there(tmp_path) -> None:
    for place in (tmp_path, tmp_path / "part"):
        place.mkdir(exist_ok=True)
        (place / ".0123.tmp").touch()
    (tmp_path / ".other").touch()

    def left() -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")]

    with working_in(tmp_path, "part"):
        assert left() == []
        (tmp_path / "part" / ".4567.tmp").touch()
        with working_in(tmp_path, "part"):
            assert left() == ["part/.4567.tmp"]
        assert left() == ["part/.4567.tmp"]
    assert left() == [] and (tmp_path / ".other").exists()
