from __future__ import annotations

import csv
import functools
import os
import shutil
from dataclasses import replace

import pytest
import torch
from support.tables import clips_of, grid_of, rows_of

from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.config.load import load_config
from wavflow.data.recording import read_features
from wavflow.features.encode import encode_video
from wavflow.features.extract import extract, extract_config
from wavflow.features.registry import get_encoders
from wavflow.media.audio import load_audio
from wavflow.toy.look import draw
from wavflow.toy.scene import make_scene
from wavflow.toy.world import SIDE, write_toy_world


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
        assert list(held) == [*wanted, "source", "wavflow"]
        read_features(result.csv.parent / row["features_path"], toy().feature_shapes, wanted)
    assert {row["status"] for row in read(result.report)} == {"ok"}


def test_workers_change_nothing(made, tmp_path):
    root, result = made
    extract(root / "toy/train.csv", tmp_path, workers=0)
    for path in sorted((tmp_path / "features").iterdir()):
        one = torch.load(path, weights_only=True)
        two = torch.load(result.csv.parent / "features" / path.name, weights_only=True)
        assert one["source"] == two["source"]
        for key in one.keys() - {"source", "wavflow"}:
            assert torch.equal(one[key], two[key])


def test_second_run_keeps_what_is_whole_and_current(world):
    table = (world / "out/train.csv").read_text().replace(str(world), "")
    again = extract(world / "toy/train.csv", world / "out", workers=0)
    assert (again.done, again.kept, again.failed) == (0, 12, 0)
    assert again.csv.read_text().replace(str(world), "") == table
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

    monkeypatch.setattr("wavflow.media.video_worker.decode", refuse)
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


def test_a_table_without_videos(world, caplog):
    rows = [row for row in read(world / "toy/train.csv") if row["text_exist"] == "1"]
    claims = [row["id"] for row in rows if row["video_exist"] == "1"]
    assert 0 < len(claims) < len(rows)
    for row in rows:
        del row["video_path"]
    rewrite(world / "toy/text.csv", rows)
    result = extract(world / "toy/text.csv", world / "new", workers=0)
    assert "text.csv: no column 'video_path', found id, " in caplog.text
    told = {row["id"]: row["reason"] for row in read(result.report) if row["status"] == "failed"}
    assert list(told) == claims
    assert all("video_exist is 1 and there is no video_path" in each for each in told.values())
    for row in rows:
        del row["video_exist"]
    rewrite(world / "toy/text.csv", rows)
    result = extract(world / "toy/text.csv", world / "new", workers=0)
    assert (result.done + result.kept, result.failed) == (len(rows), 0)
    assert {row["video_exist"] for row in read(result.csv)} == {"0"}


def test_unusable_tables(world, tmp_path):
    with pytest.raises(InputError, match="no column 'caption'"):
        rewrite(tmp_path / "c.csv", [{"id": "a", "audio_path": "a", "video_path": "v"}])
        extract(tmp_path / "c.csv", tmp_path / "out")
    with pytest.raises(InputError, match="would replace"):
        extract(world / "toy/train.csv", world / "toy")
    with pytest.raises(InputError, match="encoders 'clop' do not exist"):
        extract(world / "toy/train.csv", world / "new", encoders="clop")


def test_the_source_column_goes_along(world):
    rows = read(world / "toy/train.csv")
    for number, row in enumerate(rows):
        row["source"] = "films, old" if number % 2 else ""
    rewrite(world / "toy/train.csv", rows)
    table = read(extract(world / "toy/train.csv", world / "out", workers=0).csv)
    assert [row["source"] for row in table] == [row["source"] for row in rows]


def write_lossless(path, frames, fps):
    import av

    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=fps, options={"crf": "0", "preset": "ultrafast"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        for picture in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode(None))


def test_rows_of_a_longer_video_are_those_of_its_cut(tmp_path):
    frames = draw(make_scene(2, "train", 3, 5.0), 125, SIDE)  # struck at 2 s, among others
    write_lossless(tmp_path / "whole.mp4", frames, 25)
    encoders, grid = get_encoders("embedded"), grid_of(replace(toy(), crop="random"))
    whole = encode_video(encoders, tmp_path / "whole.mp4", 5.0)
    for second in range(4):
        write_lossless(tmp_path / "cut.mp4", frames[25 * second : 25 * (second + 2)], 25)
        cut = encode_video(encoders, tmp_path / "cut.mp4", 2.0)
        place = grid.place(8 * second)
        assert place.sample == 8000 * second
        clip = whole["clip_features"][place.rows["clip_features"] :][:16]
        sync = whole["sync_features"][place.rows["sync_features"] :][:48]
        torch.testing.assert_close(clip, cut["clip_features"])
        # A cut's first row does not know the picture before it.
        torch.testing.assert_close(sync[1:], cut["sync_features"][1:])
        assert second == 0 or not torch.allclose(sync[0], cut["sync_features"][0])


def test_clip_rows_are_those_of_a_cut_at_every_place(tmp_path):
    frames = draw(make_scene(2, "train", 3, 3.0), 75, SIDE)[::3][:24]  # shown at 8 a second
    write_lossless(tmp_path / "whole.mp4", frames, 8)
    encoders, grid = get_encoders("embedded"), grid_of(replace(toy(), crop="random"))
    whole = encode_video(encoders, tmp_path / "whole.mp4", 3.0)["clip_features"]
    assert grid.places(24000, rows_of(24, 72)) == 9
    for number in range(9):
        write_lossless(tmp_path / "cut.mp4", frames[number : number + 16], 8)
        cut = encode_video(encoders, tmp_path / "cut.mp4", 2.0)["clip_features"]
        torch.testing.assert_close(whole[grid.place(number).rows["clip_features"] :][:16], cut)


def test_a_longer_extraction_trains_on_random_windows(tmp_path):
    write_toy_world(tmp_path / "toy", 6, 3, heldout=0, seconds=3.0, workers=1)
    result = extract(tmp_path / "toy/train.csv", tmp_path / "out", seconds=3.0, workers=0)
    data = clips_of(result.csv, replace(toy(), crop="random"))
    index = next(i for i in range(6) if "clip_features" in data[i].features)
    held = torch.load(result.csv.parent / "features" / f"{data.id(index)}.pth", weights_only=True)
    wave = load_audio(tmp_path / "toy/audio" / f"{data.id(index)}.wav", 8000)
    batch = data.load([index] * 60, Draw(1, range(60))).batch
    assert batch.wave.shape == (60, 16000)
    held_at = set()
    for place in range(60):
        whole = (torch.equal(wave[1000 * n :][:16000], batch.wave[place]) for n in range(9))
        (number,) = [n for n, same in enumerate(whole) if same]
        clip, sync = batch.features["clip_features"], batch.features["sync_features"]
        assert torch.equal(clip[place], held["clip_features"][number : number + 16])
        assert torch.equal(sync[place], held["sync_features"][3 * number : 3 * number + 48])
        held_at.add(number)
    assert held_at == set(range(9))


def test_by_configuration_alone(made, tmp_path):
    root, _ = made
    config = load_config(
        "toy_8k",
        [
            f"data.csv_path={root / 'toy/train.csv'}",
            f"output.pth_dir={tmp_path / 'pth'}",
            f"output.csv_path={tmp_path / 'tables/train.csv'}",
            "extraction.num_workers=1",
        ],
    )
    for done, kept in ((12, 0), (0, 12)):
        result = extract_config(config)
        assert (result.csv, result.done, result.kept) == (
            tmp_path / "tables/train.csv",
            done,
            kept,
        )
    for row in read(result.csv):
        assert row["features_path"] == str(tmp_path / f"pth/{row['id']}.pth")
    assert result.report == tmp_path / "pth/report.csv"


@pytest.mark.parametrize("key", ["data.csv_path", "output.pth_dir", "output.csv_path"])
def test_a_configuration_names_all_three_paths(key):
    paths = ["data.csv_path=a.csv", "output.pth_dir=b", "output.csv_path=c.csv"]
    config = load_config("toy_8k", [*paths, f"{key}=null"])
    with pytest.raises(InputError, match=rf"^{key} is not set in the configuration$"):
        extract_config(config)


def test_the_table_of_a_configuration_is_not_the_one_it_reads(made):
    path = made[0] / "toy/train.csv"
    with pytest.raises(InputError, match=r"train\.csv: the table written there would replace"):
        extract(path, made[0] / "x", table=path)


@pytest.mark.parametrize("name", ["train.csv", "report.csv"])
def test_somebodys_table_is_not_replaced(made, tmp_path, name):
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir()
    theirs.write_text("mine,only\n1,2\n")
    with pytest.raises(InputError, match=rf"{name}: it is there; wanted --overwrite"):
        extract(made[0] / "toy/train.csv", tmp_path / "out", workers=1)
    assert theirs.read_text() == "mine,only\n1,2\n"
    assert [path.name for path in theirs.parent.iterdir()] == [name]
