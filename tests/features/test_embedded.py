from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavflow.data.manifest import read_manifest
from wavflow.features.registry import get_encoders
from wavflow.media.video import decode
from wavflow.toy.scene import KINDS, make_scene
from wavflow.toy.world import write_toy_world

ENCODERS = get_encoders("embedded")
VIDEO, TEXT = ENCODERS.video, ENCODERS.text


def encode(path, seconds=2.0):
    return VIDEO.encode(decode(path, VIDEO.streams, seconds), seconds)


def blank(seconds):
    return [
        torch.full((stream.count(seconds), 3, stream.size, stream.size), 60, dtype=torch.uint8)
        for stream in VIDEO.streams
    ]


def test_interface():
    assert (VIDEO.clip_dim, VIDEO.sync_dim, TEXT.dim, TEXT.length) == (64, 4, 64, 77)
    assert (VIDEO.clip_rows(2.0), VIDEO.sync_rows(2.0)) == (16, 48)
    assert (VIDEO.clip_rows(8.0), VIDEO.sync_rows(8.0), VIDEO.sync_rows(1.28)) == (64, 192, 32)
    with pytest.raises(ValueError, match="'other'"):
        get_encoders("other")


# Text


def test_text_shapes_norms_and_the_empty_caption():
    features = TEXT.encode(["a bell rings", "", "A  BELL, rings!", "word " * 100])
    assert features.shape == (4, 77, 64) and features.dtype == torch.float32
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[:, 0], features[:1, 0].expand(4, -1))
    norms = features.norm(dim=-1) / (2.5 * 64**0.5)
    assert norms.min() > 0.8 and norms.max() < 1.2
    assert (features[1] - features[0])[1:].norm(dim=-1).min() > 0.5
    assert not torch.equal(features[1, 1], features[1, 2])
    assert TEXT.encode([]).shape == (0, 77, 64)
    with pytest.raises(TypeError, match="list of str"):
        TEXT.encode("a bell rings")


@given(st.text(max_size=60))
@settings(max_examples=30)
def test_any_caption_is_encoded_and_alone_as_in_company(caption):
    both = TEXT.encode([caption, "a drum booms"])
    assert torch.isfinite(both).all()
    assert torch.equal(both[:1], TEXT.encode([caption]))


def test_text_is_the_same_in_every_process():
    code = (
        "from wavflow.features.registry import get_encoders\n"
        "x = get_encoders().text.encode(['the big bell rings twice'])\n"
        "print(x.numpy().tobytes().hex())"
    )
    mine = TEXT.encode(["the big bell rings twice"]).numpy().tobytes().hex()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mine
    signs = (TEXT.encode([""])[0, 0, :8] > 0).tolist()  # the bits of a hash, known for ever
    assert signs == [False, False, False, False, True, False, False, False]


def test_forms_of_a_word_are_closer_than_other_words():
    def near(a, b):
        return float(torch.dot(TEXT._word(a), TEXT._word(b)))

    alike = [near("bell", "bells"), near("chirp", "chirping"), near("drum", "drums")]
    strange = [near("bell", "drum"), near("chirp", "steam"), near("bird", "valve")]
    assert min(alike) > 0.3 > max(strange)


def nearest_centroid(features, kinds, queries):
    names = sorted(set(kinds))
    centroids = torch.stack([features[[k == name for k in kinds]].mean(dim=0) for name in names])
    return [names[i] for i in torch.cdist(queries, centroids).argmin(dim=1).tolist()]


def test_unseen_wordings_lie_near_their_kind():
    train = [make_scene(1, "train", i, 2.0) for i in range(400)]
    train = [s for s in train if s.caption]
    heldout = [make_scene(1, "heldout", i, 2.0) for i in range(80)]
    features = TEXT.encode([s.caption for s in train]).mean(dim=1)
    queries = TEXT.encode([s.caption for s in heldout]).mean(dim=1)
    found = nearest_centroid(features, [s.kind for s in train], queries)
    assert np.mean([f == s.kind for f, s in zip(found, heldout, strict=True)]) > 0.95


# Video


@pytest.mark.parametrize("seconds", [1.0, 1.28, 2.0, 3.3])
def test_video_shapes_and_stillness(seconds):
    clip, sync = VIDEO.encode(blank(seconds), seconds)
    assert clip.shape == (VIDEO.clip_rows(seconds), 64) and clip.dtype == torch.float32
    assert sync.shape == (VIDEO.sync_rows(seconds), 4) and sync.dtype == torch.float32
    assert not sync.any() and torch.isfinite(clip).all()


@given(frame=st.integers(1, 49))
def test_a_flash_is_in_the_row_of_its_time_and_its_place_can_be_read(frame):
    frames = blank(2.0)
    frames[1][frame:, :, 8:16, 16:24] = 200
    sync = VIDEO.encode(frames, 2.0)[1]
    energy = sync.abs().sum(dim=1)
    row = 24 * frame // 25
    assert int(energy.argmax()) == row and not sync[:row].any()
    early, late = sync[row].view(2, 2)
    place = float(late.abs().sum() / (early.abs().sum() + late.abs().sum()))
    after = [24 * (frame + 1) // 25]  # the change of motion as the flash stays
    if after != [row]:
        assert abs((row + place) / 24 - frame / 25) < 1e-4
    assert sync[max(after) + 1 :].abs().sum() == 0


def test_wrong_frames_are_named():
    frames = blank(2.0)
    with pytest.raises(ValueError, match=r"25 fps are torch.uint8 \(49, 3, 32, 32\), wanted"):
        VIDEO.encode([frames[0], frames[1][1:]], 2.0)
    with pytest.raises(ValueError, match="torch.float32"):
        VIDEO.encode([frames[0].float(), frames[1]], 2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    write_toy_world(out, 60, 11, heldout=32, workers=1)
    events = json.loads((out / "events.json").read_text())
    sets = []
    for name in ("train", "heldout"):
        rows = [row for row in read_manifest(out / f"{name}.csv") if row.video_exist]
        sets.append([(events[row.id], *encode(row.video_path)) for row in rows])
    return sets


def test_scales(world):
    for index, low, high in ((1, 2.0, 5.0), (2, 0.5, 5.0)):
        values = torch.cat([clip[index] for clip in world[0]])
        assert low < float(values.std()) < high and float(values.abs().max()) < 40


def test_a_linear_probe_reads_the_impacts(world):
    def table(clips):
        rows, labels = [], []
        for event, _, sync in clips:
            padded = torch.nn.functional.pad(sync, (0, 0, 2, 2))
            rows.append(torch.cat([padded[i : i + 48] for i in range(5)], dim=1))
            label = torch.zeros(48)
            label[[round(t * 25) * 24 // 25 for t in event["times"]]] = 1
            labels.append(label)
        return torch.cat(rows).double(), torch.cat(labels).double()

    x, y = table(world[0])
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ (y - y.mean()))
    x, y = table(world[1])
    score = x @ weight
    hits, misses = score[y == 1], score[y == 0]
    assert float((hits[:, None] > misses).double().mean()) > 0.995  # area under the ROC curve


def test_mean_appearance_tells_the_kind(world):
    def table(clips):
        rows = torch.stack([clip.mean(dim=0) for _, clip, _ in clips]).double()
        return torch.nn.functional.pad(rows, (0, 1), value=1.0), torch.tensor(
            [KINDS.index(event["kind"]) for event, _, _ in clips]
        )

    x, kinds = table(world[0])
    wanted = torch.nn.functional.one_hot(kinds, len(KINDS)).double()
    weight = torch.linalg.solve(x.T @ x + 16 * torch.eye(x.shape[1]), x.T @ wanted)  # ridge
    x, kinds = table(world[1])
    assert float(((x @ weight).argmax(dim=1) == kinds).double().mean()) > 0.9
