"""Training on windows of long recordings: what is read, how loud it is, and whole extractions."""

from __future__ import annotations

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tables import SIZES, clips_of, grid_of, pack_clips, packed_clips, sizes
from support.videos import make_video

import wavflow_kernels as kernels
from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.cli.app import main
from wavflow.config.load import load_config
from wavflow.data.manifest import write_csv
from wavflow.data.recording import Level, measure
from wavflow.features import encode
from wavflow.features.encode import encode_video, encode_whole_video
from wavflow.features.extract import extract
from wavflow.features.registry import get_encoders
from wavflow.media import video_worker
from wavflow.media.audio import SoundFile, load_audio
from wavflow.media.video import FrameStream, decode
from wavflow.systems.wavflow.objective import WavflowObjective
from wavflow.toy.world import write_toy_world

soundfile = pytest.importorskip("soundfile")

RATE = SIZES.target_sample_rate
SECONDS = 12  # of a long recording; windows are 1 s


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    wave = np.random.default_rng(seed).normal(0, 0.1, (samples, channels)).clip(-1, 1)
    return wave.astype(np.float32)


def write_row(root: Path, id: str, wave: np.ndarray, seconds: float, rate: int = RATE) -> dict:
    """A recording of that sound, with features of so many seconds whose rows count themselves."""
    soundfile.write(root / f"{id}.wav", wave, rate, subtype="PCM_16")
    features = {}
    rows = (int(8 * seconds), int(24 * seconds), SIZES.text_seq_len)
    for (key, (_, width)), count in zip(SIZES.feature_shapes.items(), rows, strict=True):
        features[key] = torch.rand(count, width)
        features[key][:, 0] = torch.arange(count)
    torch.save(features, root / f"{id}.pth")
    return {
        "id": id,
        "audio_path": f"{id}.wav",
        "features_path": f"{id}.pth",
        "video_exist": True,
        "text_exist": True,
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two long recordings, one of them silent from 4 to 8 s, and a short one."""
    root = tmp_path_factory.mktemp("long")
    quiet = noise(SECONDS * RATE, seed=1)
    quiet[4 * RATE : 8 * RATE] = 0
    rows = [
        write_row(root, "long", noise(SECONDS * RATE), SECONDS),
        write_row(root, "quiet", quiet, SECONDS),
        write_row(root, "short", noise(2 * RATE), 2),
    ]
    write_csv(root / "train.csv", rows, list(rows[0]))
    return root / "train.csv"


def windows(**more: object):
    return sizes(crop="random", lift="recording", **more)


# Reading a part of a file


@given(
    channels=st.integers(1, 3),
    suffix=st.sampled_from([".wav", ".flac"]),
    cuts=st.lists(st.integers(0, 5000), min_size=2, max_size=2).map(sorted),
)
def test_a_part_is_that_of_the_whole(tmp_path_factory, channels, suffix, cuts):
    path = tmp_path_factory.getbasetemp() / f"part{channels}{suffix}"
    if not path.exists():
        soundfile.write(path, noise(5000, channels), RATE)
    file, whole = SoundFile(path, RATE), load_audio(path, RATE).numpy()
    assert file.size == whole.size == 5000
    np.testing.assert_array_equal(file[slice(*cuts)], whole[slice(*cuts)])


@pytest.mark.parametrize(
    "found, rate",
    [(48000, 16000), (44100, 16000), (8000, 16000), (11025, 8000), (22050, 44100), (192000, 44100)],
)
def test_a_resampled_part_is_nearly_that_of_the_whole(tmp_path, found, rate):
    worst = 0.0
    for samples in (3 * found, 3 * found + 1, 2 * found + 457):
        soundfile.write(tmp_path / "x.wav", noise(samples), found, subtype="FLOAT")
        file = SoundFile(tmp_path / "x.wav", rate)
        whole = load_audio(tmp_path / "x.wav", rate).numpy()
        assert file.size == whole.size and file.agrees
        np.testing.assert_array_equal(file[:], whole)
        for start in (0, 1, 777, rate, rate + 13, file.size - rate, file.size - 1):
            part = file[start : start + rate]
            assert part.size == min(rate, file.size - start)
            worst = max(worst, np.abs(part - whole[start : start + rate]).max())
    assert worst < 1e-5


def test_a_part_that_is_not_there_or_not_finite(tmp_path):
    wave = noise(8000)
    wave[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", wave, RATE, subtype="FLOAT")
    file = SoundFile(tmp_path / "nan.wav", RATE)
    assert file[:5000].size == 5000
    with pytest.raises(InputError, match=r"nan.wav: sample 5000 is nan, wanted finite samples"):
        file[4000:6000]
    soundfile.write(tmp_path / "cut.wav", noise(8000), RATE)
    file = SoundFile(tmp_path / "cut.wav", RATE)
    soundfile.write(tmp_path / "cut.wav", noise(3000), RATE)
    with pytest.raises(InputError, match=r"cut.wav: ends at sample 3000, wanted the 8000 that its"):
        file[2000:4000]
    with pytest.raises(InputError, match=r"none.wav: no such file"):
        SoundFile(tmp_path / "none.wav", RATE)


def test_the_level_is_that_of_all_samples(tmp_path):
    wave = noise(3 * 2**20 // 2)[:, 0]
    wave[-1] = -0.75
    found = measure(wave)
    assert found.peak == 0.75
    assert found.mean_square == pytest.approx(np.square(wave.astype(np.float64)).mean(), rel=1e-12)
    soundfile.write(tmp_path / "x.wav", wave, RATE, subtype="FLOAT")
    assert measure(SoundFile(tmp_path / "x.wav", RATE)) == found


# Windows of a data set


def test_a_window_costs_what_a_window_costs(table, monkeypatch):
    data = clips_of(table, windows())
    assert list(data.cached) == ["short"]
    read = []
    plain = SoundFile._read

    def noted(self, start, stop):
        read.append(stop - start)
        return plain(self, start, stop)

    def refuse(*args):
        raise AssertionError("read whole")

    monkeypatch.setattr(SoundFile, "_read", noted)
    monkeypatch.setattr("wavflow.data.recording.load_audio", refuse)
    loaded = data.load([0, 1] * 10, Draw(0, range(20)))
    assert not loaded.problems and read == [RATE] * 20


@pytest.mark.parametrize("crop", ["first", "random"])
def test_windows_are_those_of_the_whole(table, crop, tmp_path):
    config = sizes(crop=crop, lift="recording")
    data, grid = clips_of(table, config), grid_of(config)
    packed = packed_clips(pack_clips(table, tmp_path / "p", sizes()).folder, config)
    indices, draw = [0, 1, 2] * 8, Draw(3, range(24))
    loaded, same = (each.load(indices, draw) for each in (data, packed))
    assert loaded.problems == same.problems == {}
    assert torch.equal(loaded.batch.wave, same.batch.wave)
    assert torch.equal(loaded.batch.levels, same.batch.levels)
    starts = set()
    for place, index in enumerate(indices):
        name = data.id(index)
        held = torch.load(table.parent / f"{name}.pth", weights_only=True)
        row = int(loaded.batch.features["clip_features"][place, 0, 0])
        where = grid.place(row)
        assert where.rows["clip_features"] == row and (crop == "random" or row == 0)
        starts.add(row)
        whole = load_audio(table.parent / f"{name}.wav", RATE)
        found = loaded.batch.wave[place]
        assert torch.equal(found, whole[where.sample :][:RATE])
        sync = held["sync_features"][where.rows["sync_features"] :][: config.sync_seq_len]
        assert torch.equal(loaded.batch.features["sync_features"][place], sync)
        assert torch.equal(loaded.batch.features["text_features"][place], held["text_features"])
        for key, value in same.batch.features.items():
            assert torch.equal(loaded.batch.features[key], value)
    assert len(starts) > 10 or crop == "first"
    assert data[0].wave.shape == (RATE,)


def test_epochs_see_other_windows_and_a_run_the_same(table):
    data, again = clips_of(table, windows()), clips_of(table, windows(cache_mb=0))
    first, second = (data.load([0, 1], Draw(7, positions)).batch for positions in ([0, 1], [3, 4]))
    assert not torch.equal(first.wave, second.wave)
    other = again.load([1, 2, 0], Draw(7, [4, 5, 3])).batch
    assert torch.equal(other.wave[[2, 0]], second.wave)
    assert torch.equal(other.levels[[2, 0]], second.levels)


@pytest.mark.parametrize("heard, seen", [(6, 12), (12, 6)])
def test_the_shorter_of_sound_and_video_counts(tmp_path, heard, seen):
    row = write_row(tmp_path, "a", noise(heard * RATE), seen)
    write_csv(tmp_path / "t.csv", [row], list(row))
    batch = clips_of(tmp_path / "t.csv", windows()).load([0] * 200, Draw(0, range(200))).batch
    assert batch.lengths.tolist() == [RATE] * 200
    assert set(batch.features["clip_features"][:, 0, 0].tolist()) == set(range(41))


def test_other_rates_are_windows_too(tmp_path):
    row = write_row(tmp_path, "a", noise(SECONDS * 11025), SECONDS, 11025)
    write_csv(tmp_path / "t.csv", [row], list(row))
    data = clips_of(tmp_path / "t.csv", windows())
    assert not data.cached
    whole = load_audio(tmp_path / "a.wav", RATE)
    batch = data.load([0] * 20, Draw(0, range(20))).batch
    for wave, row in zip(batch.wave, batch.features["clip_features"][:, 0, 0].int(), strict=True):
        assert (wave - whole[1000 * row :][:RATE]).abs().max() < 1e-5
    assert batch.levels[0, 0] == pytest.approx(float(whole.double().square().mean()), rel=1e-6)


@pytest.mark.parametrize("name, rate", [("a.ogg", RATE), ("a.wav", 7999)])
def test_what_cannot_be_read_in_parts_is_said(tmp_path, caplog, name, rate):
    row = write_row(tmp_path, "a", noise(SECONDS * RATE), SECONDS)
    soundfile.write(tmp_path / name, noise(SECONDS * rate), rate)
    write_csv(tmp_path / "t.csv", [row | {"audio_path": name}], list(row))
    data = clips_of(tmp_path / "t.csv", windows())
    assert not data.cached
    assert not data.load([0, 0], Draw(0, [0, 1])).problems
    (record,) = [r for r in caplog.records if "read whole" in r.message]
    assert record.message.endswith(
        f"{name}: read whole for every window; wanted a pack, or .wav or .flac of a common rate"
    )


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: f["sync_features"][200].fill_(np.inf), "sync_features holds non-finite values"),
        (lambda f: f.update(clip_features=f["clip_features"][:50].clone()), "wanted the same len"),
    ],
)
def test_features_of_long_recordings_are_checked_when_opened(tmp_path, spoil, message):
    rows = [write_row(tmp_path, id, noise(SECONDS * RATE), SECONDS) for id in ("good", "bad")]
    write_csv(tmp_path / "t.csv", rows, list(rows[0]))
    held = torch.load(tmp_path / "bad.pth", weights_only=True)
    spoil(held)
    torch.save(held, tmp_path / "bad.pth")
    data = clips_of(tmp_path / "t.csv", windows(), report=tmp_path / "report.csv")
    assert data.ids == ["good"] and message in (tmp_path / "report.csv").read_text()
    (tmp_path / "good.pth").unlink()
    assert "no such features file" in data.load([0], Draw(0, [0])).problems[0]


# Loudness


def test_windows_are_as_loud_as_in_their_recording(table):
    batch = clips_of(table, windows()).load([1] * 60, Draw(0, range(60))).batch
    whole = load_audio(table.parent / "quiet.wav", RATE)[None]
    lifted = kernels.lift_patchify(whole, token_size=80, tokens=100 * SECONDS)[0]
    tokens = kernels.lift_patchify(
        batch.wave, batch.lengths, levels=batch.levels, token_size=80, tokens=100
    )
    rows = batch.features["clip_features"][:, 0, 0].int().tolist()
    silent = 0
    for found, row in zip(tokens, rows, strict=True):
        at = 1000 * row
        wanted = lifted.flatten()[at : at + RATE].view(100, 80)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        silent += not found.any()
    assert silent > 0
    alone = kernels.lift_patchify(batch.wave, batch.lengths, token_size=80, tokens=100)
    assert (alone - tokens).abs().max() > 0.1


def test_clips_are_lifted_alone_unless_told_otherwise(table):
    assert sizes().lift == "clip"
    for crop in ("first", "random"):
        data = clips_of(table, sizes(crop=crop))
        assert data.load([0], Draw(0, [0])).batch.levels is None
    assert clips_of(table, sizes())[0].wave.shape == (SECONDS * RATE,)


def test_silence_is_refused_of_whole_recordings_alone(tmp_path):
    rows = [
        write_row(tmp_path, "silent", np.zeros((SECONDS * RATE, 1)), SECONDS),
        write_row(tmp_path, "click", np.eye(SECONDS * RATE, 1) / 2, SECONDS),
    ]
    write_csv(tmp_path / "t.csv", rows, list(rows[0]))
    data = clips_of(tmp_path / "t.csv", windows(), report=tmp_path / "report.csv")
    assert data.ids == ["click"] and "the audio is silent" in (tmp_path / "report.csv").read_text()
    loaded = data.load([0] * 9, Draw(0, range(9)))
    assert not loaded.problems
    level = Level(0.25 / (SECONDS * RATE), 0.5)
    assert loaded.batch.levels.tolist() == [[np.float32(level.mean_square), 0.5]] * 9


# Whole videos


class Counting:
    """`video_worker.decode`, and the seconds it was asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, path, streams, seconds, *args, **kwargs):
        self.seconds.append(seconds)
        return guard_decode(path, streams, seconds, *args, **kwargs)


guard_decode = video_worker.decode


@pytest.mark.parametrize("frames", [50, 100, 101, 103, 109])
def test_pieces_join_to_the_whole(tmp_path, monkeypatch, frames):
    path, encoders = make_video(tmp_path / "x.mp4", frames, 25), get_encoders("embedded")
    wanted = encode_video(encoders, path, frames / 25)
    decoded = Counting()
    monkeypatch.setattr(video_worker, "decode", decoded)
    for piece in (1, 2, 32):
        monkeypatch.setattr(encode, "PIECE", piece)
        decoded.seconds.clear()
        found, seconds = encode_whole_video(encoders, path)
        assert seconds == frames / 25
        assert decoded.seconds == [piece] * (frames // (25 * piece) + 1)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("fps, frames", [(Fraction(30000, 1001), 77), (24, 50), (10, 23), (50, 99)])
def test_the_end_is_where_every_stream_ends(tmp_path, fps, frames):
    path = make_video(tmp_path / "x.mp4", frames, fps)
    streams = [FrameStream(8, 16, "squash"), FrameStream(25, 16, "squash")]
    shown = decode(path, streams, 60, to_end=True)
    length = Fraction(len(shown[1]), 25)
    assert abs(length - frames / fps) <= Fraction(1, 25)
    assert [len(each) for each in shown] == [stream.count(length) for stream in streams]
    for one, two in zip(decode(path, streams, length), shown, strict=True):
        assert torch.equal(one, two)
    beyond = video_worker.decode(path, streams, 5, start=10, to_end=True)
    assert [len(each) for each in beyond] == [0, 0]
    with pytest.raises(InputError, match="frames at 8 fps"):
        video_worker.decode(path, streams, 60)


def test_streams_that_round_the_end_apart(tmp_path):
    """From 0.073 to 1.061 s: slots 1 to 7 of 8 a second, slots 2 to 26 of 25 a second."""
    path = make_video(tmp_path / "x.mkv", 25, 25, [73, *range(101, 1022, 40)])
    streams = [FrameStream(8, 16, "squash"), FrameStream(25, 16, "squash")]
    shown = decode(path, streams, 2, to_end=True)
    assert [len(each) for each in shown] == [7, 24]
    assert [len(each) for each in decode(path, streams[1:], 2, to_end=True)] == [25]


def test_a_video_that_is_over_before_a_frame(tmp_path):
    path = make_video(tmp_path / "x.mp4", 1, 100)
    with pytest.raises(InputError, match=r"x.mp4: shorter than a frame at 25 a second"):
        encode_whole_video(get_encoders("embedded"), path)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """The table of a toy world of 12 s clips."""
    root = tmp_path_factory.mktemp("films")
    write_toy_world(root / "toy", 6, 1, heldout=0, seconds=12.0, workers=1)
    return root / "toy/train.csv"


@pytest.fixture(scope="module")
def encoded(films, tmp_path_factory) -> Path:
    return extract(films, tmp_path_factory.mktemp("encoded"), seconds="whole", workers=1).csv


def test_whole_rows_are_as_long_as_their_videos(films, tmp_path, capsys):
    write_toy_world(tmp_path / "short", 1, 1, heldout=0, seconds=9.0, workers=1)
    with open(films, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("audio_path", "video_path"):
            row[key] = str(films.parent / row[key]) if row[key] else ""
    rows[0]["video_path"] = str(tmp_path / "short/videos/train_00000.mp4")
    write_csv(tmp_path / "films.csv", rows, list(rows[0]))
    result = extract(tmp_path / "films.csv", tmp_path / "out", seconds="whole", workers=1)
    assert (result.done, result.failed) == (6, 0)
    for row in rows:
        held = torch.load(tmp_path / f"out/features/{row['id']}.pth", weights_only=True)
        seconds = 9.0 if row is rows[0] else 12.0
        assert ("seconds" in held) == ("clip_features" in held) == (row["video_exist"] == "1")
        if row["video_exist"] == "1":
            assert held["seconds"] == seconds and held["source"]["seconds"] == "whole"
            assert len(held["clip_features"]) == 8 * seconds
            assert len(held["sync_features"]) == 24 * seconds
    again = extract(tmp_path / "films.csv", tmp_path / "out", seconds="whole", workers=1)
    assert (again.done, again.kept) == (0, 6)
    (tmp_path / "out/index/0-of-1.tsv").unlink()
    again = extract(tmp_path / "films.csv", tmp_path / "out", seconds="whole", workers=1)
    assert (again.done, again.kept) == (0, 6)
    with pytest.raises(InputError, match=r"features.json: seconds is whole, wanted 2.0; --overw"):
        extract(tmp_path / "films.csv", tmp_path / "out", workers=1)
    argv = ["extract", "--csv", str(tmp_path / "films.csv"), "--out", str(tmp_path / "out")]
    for word, code, said in (
        ("whole", 0, "0 extracted, 6 kept, 0 failed"),
        ("all", 2, "error: seconds is 'all'; wanted a number or whole"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*argv, "--seconds", word, "--workers", "1"])
        assert end.value.code == code and said in "".join(capsys.readouterr())


def test_the_objective_lifts_by_the_recording(encoded):
    config = load_config("toy_8k", ["data.crop=random", "data.lift=recording"])
    draw = Draw(0, range(8))
    batch = clips_of(encoded, config.data).load([0] * 8, draw).batch
    louder = replace(batch, levels=batch.levels * torch.tensor([0.25, 0.5]))
    seen, lifted = [], []

    def model(x_t, *conditions, **flags):
        seen.append(x_t)
        return x_t

    for each in (batch, louder):
        t = WavflowObjective(config).loss(model, each, draw).t[:, None, None]
        x_1 = kernels.lift_patchify(
            each.wave, each.lengths, levels=each.levels, token_size=80, tokens=200
        )
        lifted.append(t * x_1)
    assert (lifted[1] - lifted[0]).abs().max() > 0.1
    torch.testing.assert_close(seen[1] - seen[0], lifted[1] - lifted[0], rtol=0, atol=1e-5)


def test_a_run_on_whole_recordings_goes_on_as_if_never_stopped(encoded, tmp_path):
    import wavflow

    options = [
        "model.hidden_dim=32",
        "model.num_heads=1",
        "model.depth=2",
        "model.fused_depth=1",
        f"data.csv_path={encoded}",
        "data.crop=random",
        "data.lift=recording",
        "training.batch_size=4",
        "training.lr_schedule=constant",
        "training.dtype=float32",
    ]

    def run(name, steps):
        more = [f"training.output_dir={tmp_path / name}", f"training.max_steps={steps}"]
        return wavflow.train("toy_8k", [*options, *more])

    run("stopped", 2)
    whole, joined = run("whole", 5), run("stopped", 5)
    one, two = (state_dict.load(result.checkpoint)["model"] for result in (whole, joined))
    assert all(torch.equal(one[name], two[name]) for name in one)
