from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, check_id, write_json
from wavflow.media.audio import is_silent, load_audio, save_wav
from wavflow.media.loudness import normalize_loudness

LSB = 2.0**-15


def sine(hz: float, rate: int, seconds: float, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * hz * torch.arange(int(rate * seconds)) / rate)


def frequency(wave: torch.Tensor, rate: int) -> float:
    spectrum = torch.fft.rfft(wave * torch.hann_window(wave.numel())).abs()
    return float(spectrum.argmax()) * rate / wave.numel()


waves = arrays(np.float32, st.integers(1, 300), elements=st.floats(-1.5, 1.5, width=32))


@given(wave=waves, suffix=st.sampled_from([".wav", ".flac"]))
def test_round_trip_is_within_one_step_and_clips_never_wrap(tmp_path_factory, wave, suffix):
    path = tmp_path_factory.getbasetemp() / f"round_trip{suffix}"
    save_wav(path, torch.from_numpy(wave), 8000)
    back = load_audio(path, 8000).numpy()
    assert back.shape == wave.shape and back.dtype == np.float32
    assert np.abs(back - np.clip(wave, -1, 1)).max() <= LSB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_written_alike(tmp_path, dtype):
    save_wav(tmp_path / "x.wav", torch.tensor([1.5, -1.5, 0.5, -0.25], dtype=dtype), 8000)
    assert load_audio(tmp_path / "x.wav", 8000).tolist() == [1 - LSB, -1.0, 0.5, -0.25]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "x.wav"
    save_wav(path, sine(440, 8000, 0.1), 8000)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"x\.wav: sample 2 is"):
        save_wav(path, torch.tensor([0.0, 0.1, bad]), 8000)
    with pytest.raises(OSError):
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError("disk full")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.wav"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="suffix '.ogg'"):
        save_wav(tmp_path / "x.ogg", torch.zeros(8), 8000)
    with pytest.raises(ValueError, match=r"shape \(2, 8\)"):
        save_wav(tmp_path / "x.wav", torch.zeros(2, 8), 8000)
    with pytest.raises(InputError, match="no samples"):
        save_wav(tmp_path / "x.wav", torch.zeros(0), 8000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("found", "wanted"), [(8000, 16000), (44100, 8000), (16000, 44100)])
def test_resampling_keeps_frequency_level_and_length(tmp_path, found, wanted):
    save_wav(tmp_path / "x.wav", sine(1000, found, 1.0), found)
    wave = load_audio(tmp_path / "x.wav", wanted)
    assert wave.shape == (wanted,)
    assert frequency(wave, wanted) == pytest.approx(1000, abs=1.0)
    middle = wave[wanted // 4 : -wanted // 4]
    assert float(middle.pow(2).mean().sqrt()) == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)


def test_stereo_is_averaged_and_float_files_keep_their_range(tmp_path):
    import soundfile

    left, right = np.array([1.5, 0.5, -0.5]), np.array([0.5, 0.5, 0.25])
    soundfile.write(tmp_path / "x.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    assert load_audio(tmp_path / "x.wav", 8000).tolist() == [1.0, 0.5, -0.125]


def test_max_seconds_reads_the_start_alone(tmp_path):
    save_wav(tmp_path / "x.wav", sine(300, 44100, 3.0), 44100)
    whole = load_audio(tmp_path / "x.wav", 16000)
    part = load_audio(tmp_path / "x.wav", 16000, max_seconds=0.7)
    assert part.shape == (11200,)
    torch.testing.assert_close(part, whole[:11200], rtol=0, atol=1e-5)
    assert load_audio(tmp_path / "x.wav", 16000, max_seconds=60).shape == whole.shape


def write_mp4(path: Path, wave: np.ndarray, rate: int) -> None:
    import av

    with av.open(str(path), "w") as mp4:
        stream = mp4.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        mp4.mux(stream.encode(frame))
        mp4.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", [".mp4", ".m4a"])
def test_audio_tracks_of_containers_are_read_in_sync(tmp_path, suffix):
    wave = np.zeros(16000, np.float32)
    wave[6400:] = sine(700, 16000, 0.6).numpy()
    path = tmp_path / f"x{suffix}"
    write_mp4(path, wave, 16000)
    back = load_audio(path, 16000, max_seconds=1.0)
    assert back.shape == (16000,)
    assert abs(int((back.abs() > 0.2).nonzero()[0]) - 6400) < 80  # 5 ms
    assert frequency(back[8000:], 16000) == pytest.approx(700, abs=3)
    assert load_audio(path, 8000, max_seconds=0.5).shape == (4000,)


def test_unusable_audio_is_named(tmp_path):
    import soundfile

    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "text.mp4").write_text("not audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    for name, reason in [
        ("missing.wav", "no such file"),
        ("folder.wav", "no such file"),
        ("text.wav", "not readable as audio"),
        ("text.mp4", "not readable as audio"),
        ("nothing.wav", "not readable as audio"),
        ("empty.wav", "no audio samples"),
        ("nan.wav", "sample 1 is nan"),
    ]:
        with pytest.raises(InputError, match=reason) as caught:
            load_audio(tmp_path / name, 8000)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="rate is 0"):
        load_audio(tmp_path / "text.wav", 0)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("level", [0.003, 0.2])
def test_loudness_is_met(rate, level):
    import pyloudnorm

    generator = torch.Generator().manual_seed(0)
    wave = level * torch.randn(2 * rate, generator=generator).clamp(-3, 3)
    out = normalize_loudness(wave, rate)
    assert out.dtype == wave.dtype
    assert pyloudnorm.Meter(rate).integrated_loudness(out.double().numpy()) == pytest.approx(
        -23, abs=0.1
    )


def test_loudness_leaves_the_short_and_the_silent_and_never_clips():
    short = 0.01 * torch.ones(3000)
    assert normalize_loudness(short, 8000) is short
    for quiet in (torch.zeros(8000), 1e-5 * torch.randn(8000)):
        assert normalize_loudness(quiet, 8000) is quiet
    sparse = torch.zeros(16000)
    sparse[::4000] = 0.5
    assert float(normalize_loudness(sparse, 8000, -5.0).abs().max()) == pytest.approx(0.99)
    with pytest.raises(ValueError, match=r"shape \(1, 8000\)"):
        normalize_loudness(torch.zeros(1, 8000), 8000)


def test_silence(tmp_path):
    assert is_silent(torch.zeros(10)) and is_silent(torch.full((10,), -LSB))
    assert not is_silent(torch.full((10,), 2 * LSB))
    save_wav(tmp_path / "x.wav", torch.zeros(800), 8000)
    assert is_silent(load_audio(tmp_path / "x.wav", 8000))


def test_hostile_ids():
    for good in ("a", "001", "Ünïcode name", "a.b-c_d", "x" * 200):
        assert check_id(good) == good
    for bad in ("", " ", "../x", "a/b", "a\\b", "..", ".x", "a..b", "a\nb", "a\0", "é" * 101):
        with pytest.raises(InputError, match="id "):
            check_id(bad)
    with pytest.raises(TypeError, match="int"):
        check_id(1)


def test_json_is_strict_and_files_get_the_usual_permissions(tmp_path):
    write_json(tmp_path / "sub" / "x.json", {"a": "é", "b": [1, 2.5]})
    assert (tmp_path / "sub" / "x.json").read_text("utf-8").startswith('{\n  "a": "é"')
    with pytest.raises(ValueError):
        write_json(tmp_path / "sub" / "x.json", math.nan)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "sub" / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="mode"):
        with atomic_write(tmp_path / "y", "a"):
            pass


def test_importing_audio_loads_no_codec():
    code = (
        "import sys, wavflow.media.audio, wavflow.data.manifest, wavflow.features.encoder\n"
        "print([m for m in ('soundfile', 'soxr', 'pyloudnorm', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
