"""What is written takes nobody's place, and one row's trouble stays its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.networks import save_tiny

import wavflow
from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, check_output
from wavflow.cli.app import main
from wavflow.media.sound import Sound
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import infer

av = pytest.importorskip("av")
pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("toy")
    wavflow.write_toy_world(root, 1, 1, heldout=4, workers=1)
    return sorted((root / "videos").glob("heldout_*.mp4"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "checkpoint.pth")


@pytest.fixture(scope="module")
def sampler(saved: Path) -> Sampler:
    return Sampler.load(saved, dtype="float32", ema="none")


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["id,video_path,caption", *rows]) + "\n")
    return path


def report(out: Path) -> dict[str, tuple[str, str]]:
    with open(out / "report.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_paths_to_write_are_checked(tmp_path) -> None:
    (tmp_path / "in.mp4").write_text("in")
    (tmp_path / "link.mp4").symlink_to("in.mp4")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="it would replace .*in.mp4, which is read"):
            check_output(tmp_path / "link.mp4", tmp_path / "in.mp4", overwrite=overwrite)
        with pytest.raises(InputError, match="a folder; wanted the name of a file"):
            check_output(tmp_path, overwrite=overwrite)
        with pytest.raises(InputError, match="in.mp4 is not a folder"):
            check_output(tmp_path / "in.mp4" / "out" / "a.wav", overwrite=overwrite)
    with pytest.raises(InputError, match="it is there; wanted --overwrite or another name"):
        check_output(tmp_path / "in.mp4")
    check_output(tmp_path / "in.mp4", overwrite=True)
    check_output(tmp_path / "new" / "a.wav", tmp_path / "in.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "link.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path) -> None:
    (tmp_path / "fixed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="fixed cannot be written to"):
        check_output(tmp_path / "fixed" / "a.wav")


def test_a_full_disk_names_the_file(tmp_path) -> None:
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.wav"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.wav")


def test_one_sound_replaces_neither_source_nor_stranger(saved, videos, tmp_path, capsys) -> None:
    clip = shutil.copy(videos[0], tmp_path / "clip.mp4")
    before = clip.read_bytes()
    base = ["generate", "--checkpoint", str(saved), "--ema", "none", "--video", str(clip)]
    base += ["--steps", "1", "--out", str(tmp_path / "clip.wav")]
    for more in ([], ["--overwrite"]):
        assert "clip.mp4: it would replace" in refused([*base, "--mux", *more], capsys)
    assert clip.read_bytes() == before and not (tmp_path / "clip.wav").exists()
    (tmp_path / "clip.wav").write_text("somebody's")
    assert "clip.wav: it is there; wanted --overwrite" in refused(base, capsys)
    assert "clip.wav: it is there" in refused([*base, "--stream"], capsys)
    assert (tmp_path / "clip.wav").read_text() == "somebody's"
    kept = [*base[:-1], str(tmp_path / "b.wav"), "--recording", str(tmp_path / "b.wav")]
    assert "b.wav: it would replace" in refused(kept, capsys)
    with pytest.raises(InputError, match="which is read"):
        Sound(torch.zeros(8000), 8000).save_video(clip, tmp_path / "." / "clip.mp4")
    assert clip.read_bytes() == before


def test_rows_replace_neither_sources_nor_strangers(sampler, videos, tmp_path) -> None:
    shutil.copy(videos[0], tmp_path / "a.mp4")
    shutil.copy(videos[1], tmp_path / "b.mp4")
    (tmp_path / "c.json").write_text('{"licence": "CC0"}')
    (tmp_path / "d.wav").write_text("somebody's")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rows = ["a,a.mp4,", "b,a.mp4,", "c,,a bell", "d,,a drum", "e,,rain"]
    table = write_table(tmp_path / "in.csv", *rows)
    result = infer(sampler, table, tmp_path, steps=1, mux=True)
    assert (result.done, result.failed) == (1, 4)
    found = report(tmp_path)
    assert found["e"] == ("ok", "")
    for id, name in (("a", "a.mp4"), ("b", "b.mp4"), ("c", "c.json"), ("d", "d.wav")):
        assert found[id][0] == "failed" and name in found[id][1], found
    assert all(path.read_bytes() == content for path, content in before.items())
    infer(sampler, table, tmp_path, steps=1, mux=True, overwrite=True)
    found = report(tmp_path)
    assert [found[id][0] for id in "abcde"] == ["failed", "ok", "ok", "ok", "ok"]
    assert (tmp_path / "a.mp4").read_bytes() == before[tmp_path / "a.mp4"]


def test_a_report_replaces_reports_alone(sampler, tmp_path) -> None:
    table = write_table(tmp_path / "report.csv", "a,,a bell")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="report.csv: it would replace"):
            infer(sampler, table, tmp_path, steps=1, overwrite=overwrite)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.csv").write_text("my,own\n")
    with pytest.raises(InputError, match="report.csv: it is there"):
        infer(sampler, table, out, steps=1)
    assert sorted(p.name for p in out.iterdir()) == ["report.csv"]


def test_a_toy_world_replaces_toy_worlds_alone(tmp_path) -> None:
    table = write_table(tmp_path / "train.csv", "a,,a bell")
    with pytest.raises(InputError, match="train.csv: it is there"):
        wavflow.write_toy_world(tmp_path, 1, 1, heldout=0, workers=1)
    table.unlink()
    for _ in range(2):
        wavflow.write_toy_world(tmp_path, 1, 1, heldout=0, workers=1)


def test_a_sound_is_there_if_what_it_was_made_of_is_unchanged(
    sampler, videos, tmp_path, monkeypatch
) -> None:
    video = shutil.copy(videos[0], tmp_path / "x.mp4")
    table, out = write_table(tmp_path / "in.csv", "x,x.mp4,"), tmp_path / "out"
    infer(sampler, table, out, steps=1)
    monkeypatch.chdir(tmp_path)
    os.utime(video, (1, 1))
    infer(sampler, "in.csv", "out", steps=1)
    assert report(out)["x"] == ("ok", "was there")
    shutil.copy(videos[1], video)
    result = infer(sampler, table, out, steps=1)
    assert result.failed == 1
    assert "made from something else; wanted --overwrite" in report(out)["x"][1]
    before = json.loads((out / "x.json").read_text())
    infer(sampler, table, out, steps=1, overwrite=True)
    after = json.loads((out / "x.json").read_text())
    assert before["video_sha256"] != after["video_sha256"] and before["video"] == after["video"]
    assert before["files"] == ["x.wav"]


def test_rows_of_nothing_are_left_out(sampler, tmp_path) -> None:
    table = write_table(tmp_path / "in.csv", "a,,a bell", ",,", "b,, ", "c,,rain")
    result = infer(sampler, table, tmp_path / "out", steps=1)
    assert (result.done, result.failed) == (2, 2)
    found = report(tmp_path / "out")
    assert found["b"] == ("skipped", "row 4: nothing to generate: give a caption, a video or both")
    assert "row 3" in found["row_00001"][1] and not (tmp_path / "out" / "b.wav").exists()


def test_a_row_that_fails_takes_no_other_along(sampler, tmp_path, monkeypatch) -> None:
    table = write_table(tmp_path / "in.csv", *(f"{id},,a bell" for id in "abcd"))
    save, solve = Sound.save, sampler.generator._solve

    def full(self, path):
        if Path(path).stem == "b":
            raise OSError(28, "No space left on device", str(path))
        save(self, path)

    broken = 0

    def solves(batch, *rest):
        nonlocal broken
        if len(batch.rows) > 1:
            broken += 1
            raise RuntimeError("out of memory")
        return solve(batch, *rest)

    monkeypatch.setattr(Sound, "save", full)
    monkeypatch.setattr(sampler.generator, "_solve", solves)
    result = infer(sampler, table, tmp_path / "out", steps=1, batch_size=4)
    assert (result.done, result.failed, broken) == (3, 1, 1)
    status, reason = report(tmp_path / "out")["b"]
    assert status == "failed" and reason.startswith("row 3: ")
    assert "b.wav: No space left on device" in reason
    monkeypatch.undo()
    assert infer(sampler, table, tmp_path / "out", steps=1).done == 4


def test_a_report_that_cannot_be_written_is_told(sampler, tmp_path, monkeypatch, caplog) -> None:
    table = write_table(tmp_path / "in.csv", "a,,a bell")

    def full(*_):
        raise OSError(28, "No space left on device", "report.csv")

    monkeypatch.setattr("wavflow.pipeline.table.write_report", full)
    with pytest.raises(InputError, match="report.csv: cannot be written .No space left"):
        infer(sampler, table, tmp_path / "out", steps=1)
    assert "a: ok" in caplog.text
