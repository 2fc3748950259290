"""Data sets of clips with no features, with some at their own pace, and with some out of time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.config.schema import DataConfig
from wavflow.data.crop import Grid, Place
from wavflow.data.dataset import ClipDataset
from wavflow.data.manifest import write_csv
from wavflow.data.pack import pack
from wavflow.data.shards import PackedDataset
from wavflow.data.tracks import Even, Segments, Track, columns, flags, present
from wavflow.media.audio import save_wav
from wavflow.systems.wavflow.config import WavflowDataConfig

RATE, SECONDS = 2000, 4
DATA = DataConfig(target_sample_rate=RATE, audio_duration=1.0, crop="random")
#: Two of a video, one of words that are timed, and a caption.
TRACKS = (
    Track("fast", 10, 3, "video", Even(Fraction(10))),
    Track("slow_features", 4, 2, "video", Even(Fraction(4))),
    Track("words", 2, 5, "text", Even(Fraction(2))),
    Track("caption", 7, 6, "text"),
)
ROWS = {"fast": 10 * SECONDS, "slow_features": 4 * SECONDS, "words": 2 * SECONDS, "caption": 7}


def write(root: Path, cells: list[dict[str, object]]) -> Path:
    """Recordings whose samples and rows count themselves, with the features that the cells say."""
    rows = []
    for i, cell in enumerate(cells):
        wave = torch.arange(1, RATE * SECONDS + 1) / 32768
        save_wav(root / f"{i}.wav", wave, RATE)
        rows.append({"id": i, "audio_path": f"{i}.wav", **cell})
        if "features_path" in cell:
            held = {t.key: torch.arange(ROWS[t.key])[:, None].expand(-1, t.width) for t in TRACKS}
            torch.save({k: v.float().contiguous() for k, v in held.items()}, root / f"{i}.pth")
            rows[-1]["features_path"] = f"{i}.pth"
    write_csv(root / "t.csv", rows, list(rows[0]))
    return root / "t.csv"


def starts(batch) -> list[tuple[int, ...]]:
    """First sample, and first row of each track, of each clip."""
    samples = ((batch.wave[:, 0] * 32768).round().long() - 1).tolist()
    rows = [value[:, 0, 0].long().tolist() for value in batch.features.values()]
    return list(zip(samples, *rows, strict=True))


def test_clips_without_features(tmp_path):
    table = write(tmp_path, [{}, {}])
    data = ClipDataset(table, DATA, ())
    batch = data.load([0, 1] * 40, Draw(0, range(80))).batch
    assert batch.features == {} and batch.present == {} and batch.wave.shape == (80, RATE)
    found = [sample for (sample,) in starts(batch)]
    assert len(set(found)) > 60 and any(sample % 100 for sample in found)  # anywhere
    packed = PackedDataset(pack(table, tmp_path / "p", DATA, ()).folder, DATA, ())
    assert torch.equal(packed.load([0] * 8, Draw(0, range(8))).batch.wave[0], batch.wave[0])


def test_several_tracks_at_their_own_pace(tmp_path):
    """Windows begin where a row of all timed tracks does, the caption stays, flags hide."""
    cells = [
        {"features_path": "", "video_exist": video, "text_exist": text}
        for video, text in ((1, 1), (1, 0), (0, 1), (0, 0))
    ]
    table = write(tmp_path, cells)
    data = ClipDataset(table, DATA, TRACKS)
    assert data.grid.step == Fraction(1, 2)
    batch = data.load([0] * 200, Draw(0, range(200))).batch
    assert set(starts(batch)) == {(1000 * n, 5 * n, 2 * n, n, 0) for n in range(7)}
    assert {key: tuple(v.shape[1:]) for key, v in batch.features.items()} == {
        track.key: track.shape for track in TRACKS
    }
    hidden = data.load([0, 1, 2, 3], Draw(1, range(4))).batch
    assert hidden.present["video"].tolist() == [True, True, False, False]
    assert hidden.present["text"].tolist() == [True, False, True, False]
    assert not hidden.features["words"][1].any() and not hidden.features["fast"][2].any()
    only_words = data.load([2] * 100, Draw(2, range(100))).batch
    assert {s[0] for s in starts(only_words)} == {1000 * n for n in range(7)}
    out = PackedDataset(pack(table, tmp_path / "p", DATA, TRACKS).folder, DATA, TRACKS)
    same = out.load([0] * 200, Draw(0, range(200))).batch
    assert torch.equal(same.wave, batch.wave)
    assert all(torch.equal(same.features[key], value) for key, value in batch.features.items())
    assert list(data[2].features) == ["words", "caption"]


def test_a_pack_may_hold_more_than_is_read(tmp_path):
    cells = [{"features_path": "", "video_exist": 1, "text_exist": 1}]
    folder = pack(write(tmp_path, cells), tmp_path / "p", DATA, TRACKS).folder
    assert list(PackedDataset(folder, DATA, TRACKS[1:2])[0].features) == ["slow_features"]


def test_tracks_in_segments_lead():
    segments = Track("s", 16, 1, "video", Segments(8, Fraction(8, 25)))
    other = Track("o", 6, 1, "video", Segments(3, Fraction(12, 25)))
    even = Track("e", 8, 1, "video", Even(Fraction(8)))
    one = Grid(DATA, (even, segments))
    assert one.place(2) == Place(1280, {"e": 5, "s": 16})  # 5.12 is nearest to 5
    both = Grid(DATA, (even, segments, other))
    assert both.step == Fraction(24, 25) and both.place(1).rows == {"e": 8, "s": 24, "o": 6}
    assert both.places(RATE * 4, {"s": 16 + 24 * 2, "o": 60}) == 3


def test_features_of_two_lengths_are_told(tmp_path):
    grid = Grid(DATA, TRACKS)
    grid.check("x", {"fast": 40, "slow_features": 16, "words": 8, "caption": 1})
    grid.check("x", {"words": 8})
    with pytest.raises(InputError, match="x: fast has 40 rows, 3.00 s more .* and words 2, 0.00 s"):
        grid.check("x", {"fast": 40, "words": 2})
    with pytest.raises(
        InputError, match="data.beats is 3 in 1 s; random crops want a whole number"
    ):
        Grid(DATA, [Track("b", 3, 1, "video", Even(Fraction(7, 2)), "data.beats")])


def test_what_tracks_ask_of_a_table():
    assert columns(()) == ("id", "audio_path")
    assert columns(TRACKS[2:]) == ("id", "audio_path", "features_path", "text_exist")
    wanted = ("id", "audio_path", "features_path", "video_exist", "text_exist")
    assert columns(TRACKS) == columns(WavflowDataConfig().tracks) == wanted
    assert flags(reversed(TRACKS)) == ("video", "text")
    assert present(TRACKS, {"words": 1}) == {"text"} and present(TRACKS, {}) == set()


def test_tracks_that_cannot_be():
    with pytest.raises(ValueError, match="flag is 'sound', wanted video or text"):
        Track("a", 1, 1, "sound")
    for key in ("wave", "json", "_features", "a.b"):
        with pytest.raises(ValueError, match="a pack has another use for that name"):
            Track(key, 1, 1)


def test_the_tracks_of_wavflow():
    clip, sync, text = WavflowDataConfig().tracks
    assert [t.key for t in (clip, sync, text)] == [
        "clip_features",
        "sync_features",
        "text_features",
    ]
    assert [t.name for t in (clip, sync, text)] == ["clip", "sync", "text"]
    assert [t.shape for t in (clip, sync, text)] == [(64, 1024), (192, 768), (77, 1024)]
    assert clip.timing == Even(Fraction(8)) and sync.timing == Segments(8, Fraction(8, 25))
    assert text.timing is None and text.flag == "text"
