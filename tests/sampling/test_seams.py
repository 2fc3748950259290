"""Sounds of windows by a trained network: nothing tells where windows begin and end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wavflow
from wavflow.base.files import read_json
from wavflow.data.manifest import read_manifest
from wavflow.evaluation.toy import match, onsets
from wavflow.media.audio import load_audio
from wavflow.sampling.windows import Windows

pytestmark = pytest.mark.slow

RATE, HOP, SIZE, SECONDS = 8000, 80, 256, 12.0
# In deviations of a clip: what parts sounds of windows (0.10) from clips put one behind the other
# (0.88).
BOUND = 0.5


def measures(wave: np.ndarray) -> dict[str, np.ndarray]:
    """Spectral flux and level of every 10 ms, both logarithmic."""
    padded = np.pad(wave, SIZE // 2)
    frames = np.stack([padded[at : at + SIZE] for at in range(0, len(wave), HOP)])
    spectra = np.log(np.abs(np.fft.rfft(frames * np.hanning(SIZE))) + 1e-2)
    flux = np.sqrt((np.diff(spectra, axis=0, prepend=spectra[:1]) ** 2).mean(axis=1))
    return {"flux": flux, "level": np.log(np.sqrt((frames**2).mean(axis=1)) + 1e-4)}


def places(windows: Windows) -> dict[str, np.ndarray]:
    """Where windows overlap, and where one begins or ends; of every 10 ms."""
    found = {name: np.zeros(windows.tokens, bool) for name in ("joints", "edges")}
    for k in range(1, len(windows)):
        begin, end = windows.starts[k], windows.starts[k - 1] + windows.size
        found["joints"][begin:end] = True
        for at in (begin, end):
            found["edges"][max(at - 2, 0) : at + 2] = True
    return {name: where[: int(SECONDS * 100)] for name, where in found.items()}


def deviation(values: np.ndarray, where: np.ndarray) -> float:
    """The mean of values (clips, t) there against elsewhere, in deviations of a clip's mean there.

    Elsewhere are the same places moved by another time in every clip, many times.
    """
    moves = np.random.default_rng(0).integers(len(where), size=200)
    moved = np.stack([values[:, np.roll(where, move)].mean(axis=1) for move in moves])
    return float((values[:, where].mean() - moved.mean()) / moved.std())


def deviations(waves: list[np.ndarray], windows: Windows) -> dict[str, float]:
    found = [measures(wave) for wave in waves]
    return {
        f"{name}, {place}": deviation(np.stack([each[name] for each in found]), where)
        for name in ("flux", "level")
        for place, where in places(windows).items()
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Short held-out clips, and long ones."""
    root = tmp_path_factory.mktemp("seams")
    wavflow.write_toy_world(root / "short", 1, 5, heldout=16, workers=1)
    wavflow.write_toy_world(root / "long", 1, 6, heldout=24, seconds=SECONDS, workers=1)
    return root


@pytest.fixture(scope="module")
def sampler():
    """The packaged network, trained on another toy world."""
    return wavflow.load("toy_8k", dtype="float32")


def clips(folder):
    """(id, video, caption, times of events) of the held-out clips."""
    events = read_json(folder / "events.json")
    rows = read_manifest(folder / "heldout.csv", ("id", "video_path", "caption"))
    return [(row.video_path, row.caption, events[row.id]["times"]) for row in rows]


def recall(sounds, wanted):
    pairs = zip(sounds, wanted, strict=True)
    return sum((match(onsets(s, RATE), e) for s, e in pairs), start=match([], [])).recall


def test_nothing_is_heard_where_windows_meet(sampler, worlds):
    videos, captions, times = zip(*clips(worlds / "long"), strict=True)
    windows = Windows.cover(SECONDS, sampler.maker.size(sampler.maker.seconds))
    sounds = sampler.generate(captions, videos, seconds=SECONDS, seed=1)
    waves = [sound.audio.numpy() for sound in sounds]
    found = deviations(waves, windows)
    assert all(abs(value) < BOUND for value in found.values()), found

    # As long sounds were made of clips on their own: the measures know.
    pieces = []
    for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        scene, piece = sampler.encode(caption, video, SECONDS), np.zeros(windows.tokens * HOP)
        alone = sampler.generate_features(
            [scene.window(time) for time in windows.times],
            [100 * i + k for k in range(len(windows))],
        )
        for start, clip in zip(windows.starts, alone, strict=True):
            piece[start * HOP : start * HOP + len(clip.audio)] = clip.audio.numpy()
        pieces.append(piece)
    apart = deviations([piece[: len(waves[0])] for piece in pieces], windows)
    assert max(abs(value) for value in apart.values()) > BOUND, apart

    short_videos, short_captions, short_times = zip(*clips(worlds / "short"), strict=True)
    short = sampler.generate(short_captions, short_videos, seed=1)
    heard = recall([s.audio for s in sounds], times), recall([s.audio for s in short], short_times)
    assert heard[0] >= heard[1] - 0.03 and heard[0] > 0.9, heard


def test_nothing_is_heard_where_a_recording_goes_on(sampler, worlds):
    """The true beginnings of held-out clips, and where they end."""
    audio = [load_audio(path, RATE) for path in sorted((worlds / "long/audio").glob("heldout*"))]
    waves, at = [], 450
    for (video, caption, _), wave in zip(clips(worlds / "long"), audio, strict=True):
        begun = wave[: at * HOP]
        waves.append(sampler.complete(begun, caption, video, seconds=9.0).audio.numpy())
        assert torch.equal(torch.from_numpy(waves[-1][: at * HOP]), begun)
    where = np.zeros(900, bool)
    where[at - 2 : at + 2] = True
    for name in ("flux", "level"):
        values = np.stack([measures(wave)[name] for wave in waves])
        assert abs(deviation(values, where)) < 1, name
