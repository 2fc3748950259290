"""The stream that is meant, and the reader by what a file is."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from support.videos import SIDE, make_video, write_video

from wavflow.base.errors import InputError
from wavflow.media.audio import is_sound_file, load_audio, save_wav
from wavflow.media.mux import mux
from wavflow.media.video import FrameStream, decode

soundfile = pytest.importorskip("soundfile")


def boxes(data: bytes) -> list[bytes]:
    """The boxes of an mp4, or of one that holds others."""
    found = []
    while data:
        size = struct.unpack_from(">I", data)[0]
        found.append(data[:size])
        data = data[size:]
    return found


def tags_first(data: bytes) -> bytes:
    """The mp4 with its tags before its tracks, as taggers write it."""
    top = boxes(data)
    assert top[-1][4:8] == b"moov"  # so that no place of a picture moves
    inner = sorted(boxes(top[-1][8:]), key=lambda box: box[4:8] != b"udta")
    return b"".join([*top[:-1], top[-1][:8], *inner])


def test_cover_art_is_not_the_video(tmp_path):
    """The cover is written before the video; both are streams of pictures."""
    import av
    from av.stream import Disposition

    video = make_video(tmp_path / "video.mp4", 50, 25)
    art = [np.full((SIDE, SIDE, 3), 99, np.uint8)]
    cover = write_video(tmp_path / "cover.avi", art, 25, None, "mjpeg", "yuvj420p")
    path = tmp_path / "x.mp4"
    with av.open(str(video)) as film, av.open(str(cover)) as art, av.open(str(path), "w") as out:
        first = out.add_stream_from_template(art.streams.video[0], opaque=True)
        first.disposition = Disposition.attached_pic
        second = out.add_stream_from_template(film.streams.video[0], opaque=True)
        for stream, source in ((first, art), (second, film)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    path.write_bytes(tags_first(path.read_bytes()))
    with av.open(str(path)) as container:
        assert Disposition.attached_pic in container.streams.video[0].disposition
    stream = FrameStream(25, SIDE, "squash")
    assert decode(path, [stream], 2.0)[0].equal(decode(video, [stream], 2.0)[0])
    mux(path, torch.zeros(16000), 8000, tmp_path / "out.mp4")
    assert decode(tmp_path / "out.mp4", [stream], 2.0)[0].equal(decode(video, [stream], 2.0)[0])


@pytest.mark.parametrize("name", ["x.mts", "x.mpg", "x.flv", "x.wmv", "x.wav", "x.mp3", "x"])
def test_sound_of_a_container_whatever_its_name(tmp_path, name):
    import av

    form = {"x.mpg": "mpeg", "x.flv": "flv", "x.wmv": "asf", "x.mts": "mpegts"}.get(name, "mp4")
    codec = {"mpeg": "mp2", "flv": "aac", "asf": "wmav2", "mpegts": "mp2"}.get(form, "aac")
    with av.open(str(tmp_path / name), "w", format=form) as out:
        stream = out.add_stream(codec, rate=44100, layout="mono", bit_rate=64_000)
        wave = 0.5 * np.sin(np.arange(44100) * 2 * np.pi * 440 / 44100)
        form = stream.codec_context.format.name
        data = wave.astype(np.float32) if form == "fltp" else (wave * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(data[None], form, "mono")
        frame.sample_rate, frame.pts = 44100, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert not is_sound_file(tmp_path / name)
    found = load_audio(tmp_path / name, 8000)
    assert 0.95 < found.numel() / 8000 < 1.15 and float(found.abs().max()) > 0.4


def test_a_wav_called_otherwise(tmp_path):
    save_wav(tmp_path / "x.wav", torch.linspace(-0.5, 0.5, 8000), 8000)
    (tmp_path / "x.mp4").write_bytes((tmp_path / "x.wav").read_bytes())
    assert load_audio(tmp_path / "x.mp4", 8000).equal(load_audio(tmp_path / "x.wav", 8000))


@pytest.mark.parametrize("codec", ["libsvtav1", "libvpx-vp9", "libx265"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_pictures_are_copied_without_an_encoder_of_their_kind(tmp_path, codec, suffix):
    import av

    speed = {"libsvtav1": {"preset": "12"}, "libvpx-vp9": {"cpu-used": "8"}}
    options = speed.get(codec, {"preset": "ultrafast", "x265-params": "log-level=0"})
    pictures = [np.full((SIDE, SIDE, 3), 8 * i, np.uint8) for i in range(30)]
    source = write_video(tmp_path / "x.mkv", pictures, 25, None, codec, **options)
    out = tmp_path / f"out{suffix}"
    if (codec, suffix) == ("libx265", ".webm"):
        with pytest.raises(
            InputError, match=r"x\.mkv: cannot be muxed into out\.webm, which holds no hevc"
        ):
            mux(source, torch.zeros(8000), 8000, out)
        return
    mux(source, torch.zeros(8000), 8000, out)
    with av.open(str(out)) as container:
        assert 25 <= sum(1 for _ in container.decode(video=0)) <= 29
        assert container.streams.audio[0].codec_context.name in ("aac", "opus", "libopus")


def test_stereo_in_antiphase_is_named_and_not_called_silent(tmp_path):
    wave = 0.5 * np.sin(np.arange(8000) / 5)
    soundfile.write(tmp_path / "x.wav", np.stack([wave, -wave], 1), 8000)
    reason = r"x\.wav: its channels are in antiphase and cancel out .* wanted one of them inverted"
    with pytest.raises(InputError, match=reason):
        load_audio(tmp_path / "x.wav", 8000)
    soundfile.write(tmp_path / "x.wav", np.stack([wave, 0 * wave], 1), 8000)
    assert float(load_audio(tmp_path / "x.wav", 8000).abs().max()) > 0.2
