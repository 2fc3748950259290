from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wavflow.data.manifest import read_manifest
from wavflow.media.audio import is_silent, load_audio
from wavflow.media.video import FrameStream, decode
from wavflow.toy.scene import GAP, KINDS, LEAD, TAIL, is_heldout_schedule, make_scene
from wavflow.toy.sound import synthesize
from wavflow.toy.words import HELDOUT_PATTERNS, TRAIN_PATTERNS
from wavflow.toy.world import write_toy_world

CLIPS, HELDOUT = 24, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    write_toy_world(out, CLIPS, 7, heldout=HELDOUT, workers=1)
    return out


@pytest.fixture(scope="module")
def scenes():
    train = [make_scene(3, "train", i, 2.0) for i in range(1200)]
    return train, [make_scene(3, "heldout", i, 2.0) for i in range(128)]


def test_the_files(world):
    train = read_manifest(world / "train.csv", required=("id", "audio_path", "video_path"))
    heldout = read_manifest(world / "heldout.csv", required=("id", "audio_path", "video_path"))
    assert (len(train), len(heldout)) == (CLIPS, HELDOUT)
    assert train.errors == heldout.errors == []
    events = json.loads((world / "events.json").read_text())
    assert list(events) == [row.id for row in (*train, *heldout)]
    for row in (*train, *heldout):
        wave = load_audio(row.audio_path, 8000)
        assert wave.shape == (16000,) and not is_silent(wave)
        assert bool(row.caption) == row.text_exist
        assert (row.video_path is not None) == row.video_exist
        if row.video_exist:
            frames = decode(row.video_path, [FrameStream(25, 96, "squash")], 2.0)[0]
            assert len(frames) == 50
    assert {path.stem for path in (world / "videos").iterdir()} == {
        row.id for row in (*train, *heldout) if row.video_exist
    }
    for kind in KINDS:
        assert any(e["kind"] == kind and e["split"] == "heldout" for e in events.values())


def test_the_workers_do_not_matter(world, tmp_path):
    write_toy_world(tmp_path, CLIPS, 7, heldout=HELDOUT, workers=2)
    here = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert here == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for path in here:
        assert (world / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_scenes_depend_on_seed_split_and_index():
    base = make_scene(1, "train", 5, 2.0)
    assert make_scene(1, "train", 5, 2.0) == base
    others = [make_scene(2, "train", 5, 2.0), make_scene(1, "train", 9, 2.0)]
    others.append(make_scene(1, "heldout", 5, 2.0))
    assert len({(s.impacts, s.strength, s.caption) for s in (base, *others)}) == 4


def test_schedules(scenes):
    train, heldout = scenes
    for scene in (*train, *heldout):
        assert 1 <= len(scene.impacts) <= 3
        assert scene.impacts[0] >= LEAD and scene.impacts[-1] <= 50 - TAIL
        assert all(np.diff(scene.impacts) >= GAP)
        assert is_heldout_schedule(scene.impacts) == (scene.split == "heldout")
    assert not {s.impacts for s in train} & {s.impacts for s in heldout}
    counts = np.bincount([len(s.impacts) for s in train], minlength=4)[1:]
    assert counts.min() > 0.25 * len(train)


def test_shares_of_rows(scenes):
    train, heldout = scenes
    for kind in KINDS:
        rows = [s for s in train if s.kind == kind]
        assert len(rows) == len(train) // len(KINDS)
        assert np.mean([not s.video_exist for s in rows]) == pytest.approx(1 / 3, abs=0.02)
        assert np.mean([not s.text_exist for s in rows]) == pytest.approx(0.1, abs=0.02)
    assert all(s.video_exist or s.text_exist for s in train)
    assert all(s.video_exist and s.text_exist for s in heldout)


def test_captions(scenes):
    train, heldout = scenes
    seen = {s.caption for s in train}
    assert not seen & {s.caption for s in heldout}
    assert not set(TRAIN_PATTERNS) & set(HELDOUT_PATTERNS)
    vocabulary = {word for caption in seen for word in caption.replace(",", "").split()}
    known = [w in vocabulary for s in heldout for w in s.caption.replace(",", "").split()]
    assert 0.5 < np.mean(known) < 1.0
    for kind in KINDS:
        assert len({s.caption for s in train if s.kind == kind}) > 100
    for scene in (*train, *heldout):
        assert scene.caption == " ".join(scene.caption.split()) and "{" not in scene.caption
        if "twice" in scene.caption:
            assert len(scene.impacts) == 2
        if "softly" in scene.caption:
            assert scene.strength < 0.5


def test_sounds_start_with_their_impacts(scenes):
    for scene in scenes[1]:
        wave = synthesize(scene, 2.0, 8000).astype(float)
        first = scene.impacts[0] * 320
        floor = np.sqrt(np.mean(wave[:first] ** 2))
        assert np.abs(wave[:first]).max() < 6 * floor < 0.02 * 32768
        for impact in scene.impacts:
            start = impact * 320
            after = np.sqrt(np.mean(wave[start : start + 160] ** 2))
            before = np.sqrt(np.mean(wave[start - 160 : start] ** 2))
            assert after > 4 * before, (scene.id, scene.kind, impact)


def test_kinds_differ_by_ear(scenes):
    """A nearest-centroid rule on coarse spectra tells the kinds apart."""

    def spectrum(scene):
        wave = synthesize(scene, 2.0, 8000).astype(float)
        start = scene.impacts[0] * 320
        power = [
            np.abs(np.fft.rfft(wave[start + i * 512 : start + (i + 1) * 512])) ** 2
            for i in range(3)
        ]
        bands = np.array([[part.mean() for part in np.array_split(p, 12)] for p in power])
        return np.log(bands + 1).ravel()

    train, heldout = scenes
    centroids = {
        kind: np.mean([spectrum(s) for s in train[:160] if s.kind == kind], 0) for kind in KINDS
    }
    right = [
        min(KINDS, key=lambda k: np.linalg.norm(spectrum(s) - centroids[k])) == s.kind
        for s in heldout
    ]
    assert np.mean(right) > 0.97


def test_pictures_flash_in_the_frame_of_the_impact(world):
    events = json.loads((world / "events.json").read_text())
    for row in read_manifest(world / "heldout.csv"):
        frames = decode(row.video_path, [FrameStream(25, 96, "squash")], 2.0)[0].float()
        change = (frames[1:] - frames[:-1]).mean(1).clamp_min(0).square().mean((1, 2))
        times = events[row.id]["times"]
        strongest = torch.topk(change, len(times)).indices + 1
        assert sorted(strongest.tolist()) == [round(t * 25) for t in times]


def test_the_sound_track_of_a_video_agrees_with_its_wav(world):
    for row in list(read_manifest(world / "heldout.csv"))[:4]:
        wave = load_audio(row.audio_path, 8000)
        track = load_audio(row.video_path, 8000, max_seconds=2.0)
        shifts = [
            float(torch.dot(track[200:-200], wave[200 + s : wave.numel() - 200 + s]))
            for s in range(-100, 101)
        ]
        assert abs(int(np.argmax(shifts)) - 100) <= 8  # 1 ms


def test_other_lengths_and_rates(tmp_path):
    write_toy_world(tmp_path, 4, 0, heldout=1, seconds=1.2, rate=11000, workers=1)
    for row in (*read_manifest(tmp_path / "train.csv"), *read_manifest(tmp_path / "heldout.csv")):
        assert load_audio(row.audio_path, 11000).shape == (13200,)
        if row.video_exist:
            assert len(decode(row.video_path, [FrameStream(25, 96, "squash")], 1.2)[0]) == 30


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clips": 0}, "0 clips"),
        ({"seconds": 0.5}, "0.5 s"),
        ({"rate": 10}, "10 Hz"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_bad_options(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        write_toy_world(tmp_path / "x", **{"clips": 4, "seed": 0, **options})
    assert not (tmp_path / "x").exists()
