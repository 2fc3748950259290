"""Sounds as files: a table's rows through interruptions, videos with sound, the finished sound."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import save_tiny

import wavflow
from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.media.audio import load_audio
from wavflow.media.mux import mux
from wavflow.media.sound import Sound
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import infer, row_seed
from wavflow.training import checkpoint

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    wavflow.write_toy_world(root, 6, 1, heldout=4, workers=1)
    return root


@pytest.fixture(scope="module")
def videos(world: Path) -> list[Path]:
    return sorted((world / "videos").glob("heldout_*.mp4"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "checkpoint.pth")


@pytest.fixture(scope="module")
def sampler(saved: Path) -> Sampler:
    return Sampler.load(saved, dtype="float32", ema="none")


@pytest.fixture()
def table(tmp_path: Path, videos: list[Path]) -> Path:
    path = tmp_path / "in.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "video_path", "caption", "video_exist", "text_exist"])
        for number, video in enumerate(videos):
            writer.writerow([f"row{number}", video, f"a bell, {number} times", 1, number % 2])
        writer.writerow(["words", "", "a drum", 0, 1])
    return path


def report(out: Path) -> dict[str, tuple[str, str]]:
    with open(out / "report.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def streams(path: Path) -> tuple[list[bytes], np.ndarray, int]:
    """The video's packets, its decoded sound (t,) and its rate."""
    with av.open(str(path)) as container:
        pictures = [bytes(p) for p in container.demux(video=0) if p.size]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        return pictures, np.concatenate(frames), container.streams.audio[0].rate


def test_a_finished_sound_in_one_call(saved, videos, tmp_path) -> None:
    pipe = wavflow.load(saved, dtype="float32", ema="none")
    sound = pipe("a bell", seconds=1, seed=3)
    assert sound.audio.shape == (8000,) and (sound.sample_rate, sound.seconds) == (8000, 1.0)
    (raw,) = pipe.generate(["a bell"], seconds=1, seed=3)
    torch.testing.assert_close(sound.audio, raw.loud().audio, atol=1e-5, rtol=1e-4)
    assert torch.equal(pipe("a bell", seconds=1, seed=3, loudness=None).audio, raw.audio)
    both = pipe(video=videos[0], caption="a bell", steps=2)
    assert not torch.equal(both.audio, pipe(video=videos[0], steps=2).audio)
    sound.save(tmp_path / "a.flac")
    torch.testing.assert_close(
        load_audio(tmp_path / "a.flac", 8000), sound.audio, atol=1e-4, rtol=0
    )
    pytest.importorskip("matplotlib")
    sound.spectrogram(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="give a caption, a video or both"):
        pipe()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_videos_keep_their_pictures_and_get_the_sound(videos, tmp_path, suffix) -> None:
    time = torch.arange(32000) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * (200 + 300 * time) * time) * (time > 0.5)
    out = tmp_path / f"out{suffix}"
    Sound(tone, 16000).save_video(videos[0], out)
    before, after = streams(videos[0]), streams(out)
    assert after[0] == before[0] and after[2] == 16000
    heard, played = after[1][: len(tone)], tone.numpy()
    shift = max(range(-1100, 1101), key=lambda s: float(np.dot(np.roll(heard, s), played)))
    assert shift == 0 and np.corrcoef(heard, played)[0, 1] > 0.999
    with av.open(str(out)) as container:
        assert next(container.decode(audio=0)).pts == 0


def test_muxing_cuts_the_pictures_at_the_sounds_end(videos, tmp_path) -> None:
    mux(videos[0], 0.1 * torch.randn(8000), 8000, tmp_path / "short.mp4")
    with av.open(str(tmp_path / "short.mp4")) as container:
        frames = list(container.decode(video=0))
    assert 24 <= len(frames) <= 27 and frames[-1].time < 1.05


def test_muxing_refuses(videos, tmp_path) -> None:
    wave = torch.zeros(100)
    with pytest.raises(ValueError, match=r"suffix '.avi', wanted .mp4, .mov, .mkv"):
        mux(videos[0], wave, 8000, tmp_path / "a.avi")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="text.mp4: not readable as video"):
        mux(tmp_path / "text.mp4", wave, 8000, tmp_path / "a.mp4")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{videos[0]}\n")
    with pytest.raises(InputError, match="list.m3u8: not readable as video"):
        mux(playlist, wave, 8000, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "old.webm"), "w") as out:
        stream = out.add_stream("libvpx", rate=25)
        stream.width = stream.height = 16
        out.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        out.mux(stream.encode(None))
    with pytest.raises(InputError, match="old.webm: cannot be muxed into a.mp4"):
        mux(tmp_path / "old.webm", wave, 8000, tmp_path / "a.mp4")
    sound = tmp_path / "sound.ogg"
    soundfile.write(sound, 0.1 * np.random.default_rng(0).standard_normal(8000), 8000)
    with pytest.raises(InputError, match="sound.ogg: no video track"):
        mux(sound, wave, 8000, tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_table_goes_on_after_an_interruption(sampler, table, tmp_path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = {"steps": 2, "batch_size": 2, "mux": True, "format": "flac"}
    infer(sampler, table, whole, **options)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(sampler, table, out, progress=stop, **options)
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.flac")}
    assert len(written) == 4
    (out / "row1.flac").unlink()  # as if the process had died before the row's last file
    result = infer(sampler, table, out, **options)
    assert (result.done, result.failed) == (5, 0)
    assert report(out)["row0"] == ("ok", "was there") and report(out)["words"] == ("ok", "")
    for path, time in written.items():
        assert (path.stat().st_mtime_ns == time) == (path.name != "row1.flac")
    for path in whole.glob("*.flac"):
        torch.testing.assert_close(
            load_audio(out / path.name, 8000), load_audio(path, 8000), atol=2e-4, rtol=0
        )
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    assert sorted(p.stem for p in out.glob("*.mp4")) == ["row0", "row1", "row2", "row3"]


def test_sounds_made_otherwise_are_not_replaced_unasked(sampler, table, tmp_path) -> None:
    out = tmp_path / "out"
    infer(sampler, table, out, steps=1)
    before = (out / "words.wav").read_bytes()
    result = infer(sampler, table, out, steps=1, guidance=2.0)
    assert (result.done, result.failed) == (0, 5)
    assert "made from something else; wanted --overwrite" in report(out)["words"][1]
    assert (out / "words.wav").read_bytes() == before
    result = infer(sampler, table, out, steps=1, guidance=2.0, overwrite=True)
    assert (result.done, result.failed) == (5, 0)
    assert (out / "words.wav").read_bytes() != before


def test_other_weights_of_the_same_name_and_step_are_noticed(saved, table, tmp_path) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out"
    content = state_dict.load(saved)
    for expected in ((5, 0), (0, 5)):
        checkpoint.save(path, content)
        result = infer(Sampler.load(path, "cpu", ema="none"), table, out, steps=1)
        assert (result.done, result.failed) == expected
        name = next(iter(content["model"]))
        content["model"][name] = content["model"][name] + 1


def test_the_json_says_what_a_sound_depends_on(sampler, saved, table, videos, tmp_path) -> None:
    infer(sampler, table, tmp_path / "out", seed=7, solver="2m", steps=2, loudness=None)
    found = json.loads((tmp_path / "out" / "row1.json").read_text())
    wanted = {
        "id": "row1",
        "caption": "a bell, 1 times",
        "video": str(videos[1]),
        "seed": row_seed(7, "row1"),
        "seconds": 2.0,
        "solver": "2m",
        "steps": 2,
        "times": "even",
        "guidance_interval": [0.0, 1.0],
        "loudness": None,
        "sample_rate": 8000,
        "weights": {
            "file": str(saved),
            "which": "model",
            "global_step": 900,
            "sha256": hashlib.sha256(saved.read_bytes()).hexdigest(),
        },
    }
    assert wanted.items() <= found.items()
    assert json.loads((tmp_path / "out" / "words.json").read_text())["video"] is None
    (again,) = sampler.generate(
        [found["caption"]], [found["video"]], seeds=[found["seed"]], solver="2m", steps=2
    )
    torch.testing.assert_close(
        load_audio(tmp_path / "out" / "row1.wav", 8000), again.audio, atol=1e-4, rtol=0
    )
