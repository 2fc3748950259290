from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.paths import TESTS
from support.tables import clips_of, grid_of, rows_of, sizes, write_clip, write_table

from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.data.crop import Place
from wavflow.data.manifest import write_csv
from wavflow.data.recording import read_features
from wavflow.media.audio import load_audio, save_wav
from wavflow.systems.wavflow.config import WavflowDataConfig


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, rows):
    write_csv(path, rows, list(rows[0]))
    return path


def load(data, indices, seed=0):
    return data.load(indices, Draw(seed, range(len(indices))))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"), 12)


# Reading


def test_a_batch_holds_the_rows(table):
    data = clips_of(table, sizes())
    rows = read(table)
    assert len(data) == 12 and data.id(3) == "c003"
    loaded = load(data, range(12))
    batch = loaded.batch
    assert loaded.problems == {}
    assert batch.ids == [row["id"] for row in rows]
    assert batch.wave.shape == (12, 8000) and batch.lengths.tolist() == [8000] * 12
    assert batch.present["video"].tolist() == [row["video_exist"] == "1" for row in rows]
    assert batch.present["text"].tolist() == [row["text_exist"] == "1" for row in rows]
    for place, row in enumerate(rows):
        held = torch.load(table.parent / row["features_path"], weights_only=True)
        assert torch.equal(batch.wave[place], load_audio(table.parent / row["audio_path"], 8000))
        for key, values in batch.features.items():
            assert torch.equal(values[place], held.get(key, torch.zeros(values.shape[1:])))


def test_batches_in_any_company(table):
    data = clips_of(table, sizes())
    whole, part = load(data, range(12)).batch, load(data, [7, 7, 1]).batch
    assert part.ids == ["c007", "c007", "c001"]
    for place, index in enumerate((7, 7, 1)):
        assert torch.equal(part.wave[place], whole.wave[index])
        for key in part.features:
            assert torch.equal(part.features[key][place], whole.features[key][index])
    empty = load(data, []).batch
    assert empty.ids == [] and empty.features["text_features"].shape == (0, 77, 512)


def test_waves_of_several_lengths_are_padded(tmp_path):
    rows = [write_clip(tmp_path, n, 0, s, 24, False, True) for n, s in (("a", 0.3), ("b", 1.7))]
    data = clips_of(rewrite(tmp_path / "t.csv", rows), sizes())
    batch = load(data, [0, 1]).batch
    assert batch.lengths.tolist() == [2400, 13600] and batch.wave.shape == (2, 13600)
    assert not batch.wave[0, 2400:].any() and bool(batch.wave[0, :2400].all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_other_dtypes(tmp_path, dtype):
    row = write_clip(tmp_path, "a", 0, 1.0, 24, True, True)
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    held = {key: value.to(dtype).requires_grad_() for key, value in held.items()}
    torch.save(held, tmp_path / "a.pth")
    batch = load(clips_of(rewrite(tmp_path / "t.csv", [row]), sizes()), [0]).batch
    for key, values in batch.features.items():
        assert values.dtype == torch.float32
        assert torch.equal(values[0], held[key].detach().float())


def test_flag_hides_what_the_file_holds(table):
    row = {**read(table)[0], "video_exist": "0"}
    data = clips_of(rewrite(table.with_name("one.csv"), [row]), sizes())
    assert list(data[0].features) == ["text_features"]
    batch = load(data, [0]).batch
    assert not batch.present["video"].any() and not batch.features["clip_features"].any()


def test_cache_bound(table, monkeypatch):
    opened = []
    read_file = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **more: opened.append(path) or read_file(path, **more)
    )
    for megabytes, again in ((4096, [0]), (0, [12]), (1, range(1, 12))):
        data = clips_of(table, sizes(cache_mb=megabytes))
        opened.clear()
        load(data, range(12))
        assert len(opened) in again
        assert sum(kept.nbytes for kept in data.cached.values()) <= megabytes * 2**20


def test_subset_and_fingerprint(table):
    data = clips_of(table, sizes())
    few = data.subset(4)
    assert len(few) == 4 and len(data) == 12 and len(data.subset(100)) == 12
    assert sorted(few.order(1)[p] for p in range(4)) == [0, 1, 2, 3]
    assert load(few, [3]).batch.ids == ["c003"]
    with pytest.raises(ValueError, match="subset of 0 clips"):
        data.subset(0)
    assert data.fingerprint() == clips_of(table, sizes()).fingerprint() != few.fingerprint()
    rows = read(table)
    rows[2]["source"] = "other"
    other = clips_of(rewrite(table.with_name("other.csv"), rows), sizes())
    assert other.fingerprint() != data.fingerprint()


# What cannot be read


def test_bad_rows_are_dropped_named_and_reported(tmp_path, caplog):
    import soundfile

    table = write_table(tmp_path, 14)
    rows = read(table)
    audio = [tmp_path / row["audio_path"] for row in rows]
    save_wav(audio[0], torch.zeros(16000), 8000)
    audio[1].write_bytes(b"RIFFnonsense")
    audio[2].write_bytes(b"")
    audio[3].unlink()
    wave = np.zeros(16000, np.float32)
    wave[7] = np.nan
    soundfile.write(audio[4], wave, 8000, subtype="FLOAT")
    for place, (key, change) in {
        5: ("clip_features", lambda v: v[:-1]),
        7: ("sync_features", lambda v: v.fill_diagonal_(float("inf"))),
        8: ("text_features", lambda v: v[:, :-1]),
        9: ("clip_features", lambda v: v[None]),
        10: ("clip_features", lambda v: v.to_sparse()),
    }.items():
        held = torch.load(tmp_path / rows[place]["features_path"], weights_only=True)
        torch.save({**held, key: change(held[key])}, tmp_path / rows[place]["features_path"])
    rows[6]["text_exist"] = "2"
    rewrite(table, rows)

    progress = []
    data = clips_of(
        table,
        sizes(),
        report=tmp_path / "report.csv",
        progress=lambda done, total: progress.append((done, total)),
    )
    assert data.ids == [row["id"] for row in rows[11:]]
    assert progress == [(done, 13) for done in range(1, 14)]
    assert len(caplog.records) == 11
    report = read(tmp_path / "report.csv")
    assert [row["status"] for row in report] == ["skipped"] * 11 + ["ok"] * 3
    for row, said in zip(
        report,
        (
            "row 2: .*silent",
            "row 3: .*not readable",
            r"row 4: .*\.wav",
            "row 5: .*no such file",
            "row 6: .*sample 7 is nan",
            r"row 7: .*\.pth: clip_features has 7 rows; wanted 8, or more",
            "row 8, text_exist '2': wanted 0 or 1",
            r"row 9: .*\.pth: sync_features holds non-finite values",
            r"row 10: .*\.pth: text_features is \(77, 511\); wanted \(77, 512\)",
            r"row 11: .*\.pth: clip_features is \(1, 8, 16\); wanted \(rows, 16\)",
            r"row 12: .*\.pth: clip_features is a Tensor; wanted a dense tensor",
        ),
        strict=False,
    ):
        assert re.match(said, row["reason"]), row


def test_wrong_sizes_everywhere_are_an_error(table):
    with pytest.raises(InputError, match=r"no usable row; the first: row 2: .*\.pth: .*wanted"):
        clips_of(table, sizes(clip_dim=32, text_dim=16))
    with pytest.raises(InputError, match="no such file"):
        clips_of(table.with_name("gone.csv"), sizes())
    rows = [{key: row[key] for key in ("id", "audio_path")} for row in read(table)]
    with pytest.raises(InputError, match=r"short\.csv: no column 'features_path'"):
        clips_of(rewrite(table.with_name("short.csv"), rows), sizes())


@pytest.mark.parametrize("crop", ["first", "random"])
def test_a_clip_that_goes_later_is_a_problem(tmp_path, crop):
    table = write_table(tmp_path, 4)
    data = clips_of(table, sizes(cache_mb=0, crop=crop))
    whole = load(data, range(4)).batch
    (tmp_path / "c000.wav").unlink()
    (tmp_path / "c003.pth").write_bytes(b"nonsense")
    loaded = load(data, [3, 2, 0, 1])
    assert sorted(loaded.problems) == [0, 2]
    assert re.fullmatch(r".*c003\.pth: not a readable features file.*", loaded.problems[0])
    assert re.fullmatch(r".*c000\.wav: no such file, wanted audio", loaded.problems[2])
    batch = loaded.batch
    assert batch.ids == ["c003", "c002", "c000", "c001"]
    assert batch.lengths.tolist() == [1, 8000, 1, 8000]
    for place in (0, 2):
        assert (
            not batch.wave[place].any()
            and not batch.present["video"][place] | batch.present["text"][place]
        )
        assert not any(values[place].any() for values in batch.features.values())
    assert torch.equal(batch.wave[1], whole.wave[2]) and torch.equal(batch.wave[3], whole.wave[1])
    alone = load(data, [0])
    assert alone.batch.wave.shape == (1, 1) and list(alone.problems) == [0]


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_features_file_runs_nothing(tmp_path):
    path, shapes = tmp_path / "x.pth", sizes().feature_shapes
    torch.save({"clip_features": Payload(tmp_path / "ran")}, path)
    with pytest.raises(InputError, match=r"x\.pth: not a readable features file"):
        read_features(path, shapes)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="wanted a dict of features, found list"):
        read_features(path, shapes)
    torch.save({"text_features": torch.zeros(77, 512)}, path)
    with pytest.raises(InputError, match="no clip_features, found text_features"):
        read_features(path, shapes, ("clip_features",))
    torch.save({"text_features": torch.zeros(78, 512)}, path)
    with pytest.raises(InputError, match=r"text_features is \(78, 512\); wanted \(77, 512\)"):
        read_features(path, shapes)


# Crops


def test_first_takes_the_whole_wave_and_the_first_rows(tmp_path):
    data = clips_of(write_table(tmp_path, 3, 2.5), sizes())
    batch = load(data, [0, 1, 2]).batch
    assert batch.lengths.tolist() == [20000] * 3
    assert batch.features["clip_features"][0, :, 0].tolist() == list(range(8))
    assert batch.features["sync_features"][0, :, 0].tolist() == list(range(24))
    assert data[0].features["sync_features"].shape == (24, 8)
    assert data[0].wave.shape == (20000,)


def starts(batch):
    """Sample, clip row and sync row at which each clip of a batch begins."""
    samples = (batch.wave[:, 0] * 32768).long() - 1
    rows = (batch.features[key][:, 0, 0].long() for key in ("clip_features", "sync_features"))
    return torch.stack([samples, *rows], dim=1).tolist()


def test_random_windows_lie_on_the_grid_of_even_rows(tmp_path):
    data = clips_of(write_table(tmp_path, 1, 2.5), sizes(crop="random"))
    assert data.grid.step == Fraction(1, 8)
    found = load(data, [0] * 300).batch
    assert found.wave.shape == (300, 8000)
    assert {tuple(start) for start in starts(found)} == {(1000 * n, n, 3 * n) for n in range(13)}
    for key, rows in (("clip_features", 8), ("sync_features", 24)):
        values = found.features[key]
        assert torch.equal(values[:, :, 0], values[:, :1, 0] + torch.arange(rows))
    assert torch.equal(found.features["text_features"][0], data[0].features["text_features"])


def test_random_windows_lie_on_the_grid_of_segments(tmp_path):
    """Synchformer's rows: 8 a segment, a segment every 0.32 s, of (25 seconds - 16) // 8 + 1."""
    config = sizes(
        audio_duration=2.0, clip_seq_len=16, sync_seq_len=40, sync_layout="segments", crop="random"
    )
    row = write_clip(tmp_path, "a", 0, 4.0, 8 * ((100 - 16) // 8 + 1), True, True)
    data = clips_of(rewrite(tmp_path / "t.csv", [row]), config)
    found = {tuple(start) for start in starts(load(data, [0] * 300).batch)}
    assert found == {(2560 * n, round(2.56 * n), 8 * n) for n in range(7)}


def test_a_crop_is_of_the_example_alone(tmp_path):
    data = clips_of(write_table(tmp_path, 3, 2.5), sizes(crop="random"))
    whole = data.load([0, 2, 0], Draw(5, [10, 11, 12])).batch
    alone = data.load([0], Draw(5, [12])).batch
    assert torch.equal(alone.wave[0], whole.wave[2])
    other = data.load([0] * 20, Draw(6, range(10, 30))).batch
    assert len({start[0] for start in starts(other)}) > 3


def test_without_video_sound_is_cropped_anywhere(tmp_path):
    row = write_clip(tmp_path, "a", 0, 1.001, 24, False, True)
    data = clips_of(rewrite(tmp_path / "t.csv", [row]), sizes(crop="random"))
    batch = load(data, [0] * 200).batch
    assert {start[0] for start in starts(batch)} == set(range(9))
    assert batch.lengths.tolist() == [8000] * 200


def test_features_of_one_window_allow_the_first_only(tmp_path):
    write_clip(tmp_path, "a", 0, 1.0, 24, True, True)
    save_wav(tmp_path / "a.wav", torch.arange(1, 20001) / 32768, 8000)
    row = read(write_table(tmp_path, 1))[0] | {"audio_path": "a.wav", "features_path": "a.pth"}
    data = clips_of(rewrite(tmp_path / "t.csv", [row]), sizes(crop="random"))
    batch = load(data, [0] * 20).batch
    assert {tuple(start) for start in starts(batch)} == {(0, 0, 0)}
    assert batch.wave.shape == (20, 8000)


def test_the_last_token_is_filled_up(tmp_path):
    config = sizes(crop="random", audio_dim=300)  # 27 tokens of 300 are 100 samples more
    data = clips_of(write_table(tmp_path, 1, 1.25), config)
    batch = load(data, [0] * 40).batch
    samples = [start[0] for start in starts(batch)]
    lengths = dict(zip(samples, batch.lengths.tolist(), strict=True))
    assert lengths == {0: 8100, 1000: 8100, 2000: 8000}


@pytest.mark.parametrize(
    ("clip", "sync", "layout", "message"),
    [
        (7, 24, "even", "clip_features has 7 rows; wanted 8, or more of a longer clip"),
        (8, 23, "even", "sync_features has 23 rows; wanted 24, or more"),
        (
            20,
            24,
            "even",
            "clip_features has 20 rows, 1.50 s more than a window, and sync_features 24",
        ),
        (8, 48, "even", "sync_features 48, 1.00 s more; wanted the same length"),
        (20, 60, "segments", "sync_features has 60 rows; wanted 24 and whole segments of 8 more"),
        (20, 96, "segments", "1.50 s more than a window, and sync_features 96, 2.88 s more"),
    ],
)
def test_rows_that_fit_no_length(clip, sync, layout, message):
    with pytest.raises(InputError, match=f"x.pth: .*{message}"):
        grid_of(sizes(sync_layout=layout)).check("x.pth", rows_of(clip, sync))


@pytest.mark.parametrize("seconds", [1.0, 1.28, 2.0, 3.3, 3.5, 8.0, 10.1])
def test_rows_of_any_length_fit(seconds):
    """The embedded encoders' and Synchformer's ways of rounding."""
    segments = sizes(audio_duration=1.0, clip_seq_len=8, sync_seq_len=16, sync_layout="segments")
    grid_of(sizes()).check("x", rows_of(int(8 * seconds), 8 * round(3 * seconds)))
    grid_of(segments).check("x", rows_of(int(8 * seconds), 8 * ((int(25 * seconds) - 16) // 8 + 1)))


def test_grid_of_the_full_system():
    grid = grid_of(WavflowDataConfig(crop="random"))
    assert grid.step == Fraction(8, 25) and grid.places(10 * 16000, rows_of(80, 232)) == 6
    assert grid.place(5) == Place(sample=25600, rows=rows_of(13, 40))
    assert grid.places(8 * 16000, rows_of(64, 192)) == grid.places(16000, rows_of(64, 192)) == 1
    assert (
        grid.places(9 * 16000, rows_of(80, 232))
        == grid.places(9 * 16000 + 4479, rows_of(80, 232))
        == 4
    )
    assert grid.places(9 * 16000 + 4480, rows_of(80, 232)) == 5
    assert (
        grid.places(10 * 16000, rows_of(80, 192)) == grid.places(10 * 16000, rows_of(64, 232)) == 1
    )
    even = grid_of(WavflowDataConfig(crop="random", sync_layout="even", target_sample_rate=44100))
    assert even.place(3) == Place(sample=16537, rows=rows_of(3, 9))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"audio_duration": 0.7, "clip_seq_len": 5}, "data.clip_seq_len is 5 in 0.7 s"),
        ({"sync_seq_len": 25, "audio_duration": 2.0}, "data.sync_seq_len is 25 in 2 s"),
        ({"sync_seq_len": 25, "sync_layout": "segments"}, "random crops of segments want whole"),
    ],
)
def test_sizes_without_random_crops(more, message):
    grid_of(sizes(**more))
    with pytest.raises(InputError, match=message):
        grid_of(sizes(**more, crop="random"))


# Order


def test_sources_get_their_shares(table):
    weights = {"film": 1.0, "game": 3.0}
    data = clips_of(table, sizes(source_weights=weights))
    order = data.order(3)
    assert len(order) == 12
    games = [order[p] for p in range(12) if order[p] % 3 == 0]
    assert len(games) == 9 and set(games) == {0, 3, 6, 9}
    plain = clips_of(table, sizes()).order(3)
    assert sorted(plain[p] for p in range(12)) == list(range(12))
    assert data.subset(1).order(3)[5] == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"film": 1.0}, "no share for 'game'"),
        ({"film": 1.0, "game": 1.0, "radio": 1.0}, "no clip is of 'radio'"),
        ({"films": 1.0, "game": 1.0}, "no clip is of 'films'; no share for 'film'"),
    ],
)
def test_weights_of_other_sources(table, weights, message):
    with pytest.raises(InputError, match=f"train.csv: data.source_weights: {message}"):
        clips_of(table, sizes(source_weights=weights))


def test_orders_that_are_not_there(table):
    data = clips_of(table, sizes(source_weights={"film": 1.0, "game": 0.0}))
    with pytest.raises(InputError, match="data.source_weights gives no share to any clip"):
        data.subset(1).order(0)
    with pytest.raises(InputError, match="data.shuffle is shards; wanted a folder"):
        clips_of(table, sizes(shuffle="shards"))


# Threads

COUNT_THREADS = """
import os, sys, threading
import torch
from wavflow.base.seeding import Draw
sys.path.insert(0, sys.argv[1])
from support.tables import clips_of, sizes

def started(work):
    def run():
        before = set(os.listdir("/proc/self/task"))
        work()
        print(len(set(os.listdir("/proc/self/task")) - before))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

torch.set_num_threads(3)
data = clips_of(sys.argv[2], sizes(cache_mb=0, crop="random"))
started(lambda: data.load(list(range(12)) * 3, Draw(0, range(36))))
started(lambda: torch.ones(2**20).abs())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_loader_thread_starts_no_others(table):
    """Torch's own work in such a thread does: the second figure."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, str(TESTS), str(table)],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "2"]
