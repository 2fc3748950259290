"""Sound and pictures of a file have one clock, which begins with the first picture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support.videos import SIDE, write_video

from wavflow.base.errors import InputError
from wavflow.media.audio import load_audio
from wavflow.media.mux import mux

RATE = 8000


def write_film(path: Path, sounds: list[tuple[float, np.ndarray]], picture: float = 0.0) -> Path:
    """Two seconds of pictures from `picture` on, and sounds, each with its time in seconds."""
    import av

    with av.open(str(path), "w") as film:
        shown = film.add_stream("mpeg4", rate=25)
        shown.width = shown.height = SIDE
        shown.pix_fmt = "yuv420p"
        heard = film.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for i in range(50):
            frame = av.VideoFrame(SIDE, SIDE, "yuv420p")
            frame.pts, frame.time_base = round(picture * 25) + i, Fraction(1, 25)
            film.mux(shown.encode(frame))
        film.mux(shown.encode(None))
        for time, wave in sounds:
            data = (wave * 32767).astype(np.int16)[None]
            sound = av.AudioFrame.from_ndarray(data, "s16", "mono")
            sound.sample_rate, sound.time_base = RATE, Fraction(1, RATE)
            sound.pts = round(time * RATE)
            film.mux(heard.encode(sound))
        film.mux(heard.encode(None))
    return path


def tone(seconds: float) -> np.ndarray:
    return np.full(round(seconds * RATE), 0.5, np.float32)


@pytest.mark.parametrize(("sound", "picture"), [(0.4, 0.0), (0.0, 0.4), (0.8, 0.4)])
def test_sound_begins_where_the_first_picture_does(tmp_path, sound, picture):
    path = write_film(tmp_path / "x.mkv", [(sound, tone(1.0))], picture)
    found = load_audio(path, RATE)
    first = max(sound - picture, 0)
    assert abs(int((found > 0.4).nonzero()[0]) / RATE - first) < 0.002
    assert abs(found.numel() / RATE - (sound - picture + 1)) < 0.002
    part = load_audio(path, RATE, 0.6)
    assert torch.equal(part, found[: part.numel()])


def test_a_gap_is_as_long_as_it_is_and_is_named(tmp_path):
    path = write_film(tmp_path / "x.mkv", [(0, tone(0.5)), (1.0, tone(0.5))])
    with pytest.warns(UserWarning, match=r"x\.mkv: its sound has gaps of 0\.500 s in all"):
        found = load_audio(path, RATE)
    assert found.numel() == 12000
    assert not found[4020:7980].any() and (found[8020:] > 0.4).all()


def test_a_change_of_rate_inside_a_stream(tmp_path):
    """One second of each rate is two seconds, whatever the header says."""
    import av

    data = b""
    for rate in (16000, 32000):
        with av.open(str(tmp_path / "part.aac"), "w", format="adts") as out:
            stream = out.add_stream("aac", rate=rate, layout="mono")
            wave = 0.5 * np.sin(np.arange(rate) * 2 * np.pi * 500 / rate)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = rate, 0
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        data += (tmp_path / "part.aac").read_bytes()
    (tmp_path / "x.aac").write_bytes(data)
    found = load_audio(tmp_path / "x.aac", RATE)
    assert abs(found.numel() / RATE - 2) < 0.2
    for second in (0.5, 1.5):
        part = found[int(second * RATE) :][:2000]
        spectrum = torch.fft.rfft(part * torch.hann_window(2000)).abs()
        assert abs(int(spectrum.argmax()) * RATE / 2000 - 500) < 8


def test_pictures_that_begin_late_are_muxed_from_their_first_on(tmp_path):
    import av

    pictures = [np.full((SIDE, SIDE, 3), 255 * (i == 25), np.uint8) for i in range(75)]
    source = write_video(tmp_path / "x.ts", pictures, 25, bf="0")
    mux(source, torch.zeros(2 * RATE), RATE, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as out:
        shown = [(float(f.time), f.to_ndarray(format="gray").mean()) for f in out.decode(video=0)]
    assert len(shown) == 50 and shown[0][0] == 0
    assert [time for time, light in shown if light > 128] == [pytest.approx(1.0)]


def test_times_that_go_back_are_refused(tmp_path):
    import av

    from wavflow.media.audio import _Track

    track = _Track(tmp_path / "x.ts", RATE, None, Fraction(0))
    for pts in (0, 16000, 0):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, pts, Fraction(1, RATE)
        if pts or not track.samples:
            track.frame(frame)
    with pytest.raises(InputError, match=r"x\.ts: the times of its sound go back by 4\.000 s"):
        track.frame(frame)
