"""Sound or video that ends before its header says is refused, not taken for a short one."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from support.videos import make_video

from wavflow.base.errors import InputError
from wavflow.media.audio import SoundFile, load_audio
from wavflow.media.video import FrameStream, decode

soundfile = pytest.importorskip("soundfile")

NOISE = 0.3 * np.random.default_rng(0).standard_normal(16000).clip(-3, 3)


def cut(path, size: int):
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_a_wav_that_is_cut(tmp_path):
    soundfile.write(tmp_path / "x.wav", NOISE, 8000)
    whole = load_audio(tmp_path / "x.wav", 8000)
    path = cut(tmp_path / "x.wav", 44 + 2 * 800)
    reason = r"x\.wav: ends at sample 800, wanted the 16000 that its header promises"
    for read in (load_audio, SoundFile):
        with pytest.raises(InputError, match=reason):
            read(path, 8000)
    assert load_audio(path, 8000, 0.05).equal(whole[:400])
    with pytest.warns(UserWarning, match=reason):
        assert load_audio(path, 8000, partial=True).equal(whole[:800])


def test_a_wav_of_a_stream_promises_nothing(tmp_path):
    soundfile.write(tmp_path / "x.wav", NOISE, 8000)
    data = bytearray((tmp_path / "x.wav").read_bytes())
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFFF)
    (tmp_path / "x.wav").write_bytes(data)
    assert load_audio(tmp_path / "x.wav", 8000).numel() == 16000


@pytest.mark.parametrize("suffix", [".flac", ".mp3"])
def test_other_sound_files_that_are_cut(tmp_path, suffix):
    soundfile.write(tmp_path / f"x{suffix}", NOISE, 8000)
    path = tmp_path / f"x{suffix}"
    assert load_audio(path, 8000).numel() == 16000
    with pytest.raises(InputError, match=r"x\.(mp3|flac): (ends at sample|not readable as audio)"):
        load_audio(cut(path, path.stat().st_size // 2), 8000)


@pytest.mark.parametrize(("suffix", "options"), [(".mkv", ""), (".mp4", "faststart")])
def test_a_video_that_is_cut_is_not_a_short_one(tmp_path, suffix, options):
    import av

    make_video(tmp_path / "all.mkv", 100, 25)
    path = tmp_path / f"x{suffix}"
    flags = {"movflags": options} if options else {}
    with av.open(str(tmp_path / "all.mkv")) as source, av.open(str(path), "w", options=flags) as to:
        stream = to.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                to.mux(packet)
    stream = FrameStream(25, 32, "squash")
    assert len(decode(path, [stream], 30, to_end=True)[0]) == 100
    cut(path, path.stat().st_size * 6 // 10)
    with pytest.raises(InputError, match=r"(breaks off at .* s, wanted the 4\.000 s|not readable)"):
        decode(path, [stream], 30, to_end=True)
    assert len(decode(path, [stream], 1.0)[0]) == 25
