from __future__ import annotations

import math
import shutil
import struct
import subprocess
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.videos import SIDE, make_video, write_video
from torch.nn.functional import interpolate

from wavflow.base.errors import InputError
from wavflow.config.schema import DecodingConfig
from wavflow.features.clip import CLIP_STREAM
from wavflow.features.synchformer import SYNC_STREAM
from wavflow.media.video import FrameStream, decode


def numbers(frames: torch.Tensor) -> list[int]:
    bits = frames[:, 0, SIDE // 2, 4::8] > 127
    return (bits.long() << torch.arange(8)).sum(1).tolist()


def at(fps: int) -> FrameStream:
    return FrameStream(fps, SIDE, "squash")


TABLE = [
    (30, 8, [1, 5, 9, 13, 16, 20]),
    (30, 25, [0, 1, 2, 4, 5, 6, 7, 8]),
    (24, 8, [1, 4, 7, 10, 13, 16]),
    (24, 25, [0, 1, 2, 3, 4, 5, 6, 7]),
    (25, 8, [1, 4, 7, 10, 14, 17]),
    (25, 25, [0, 1, 2, 3, 4, 5]),
    (60, 8, [3, 11, 18, 26, 33, 41]),
    (60, 25, [1, 3, 5, 8, 10, 13, 15, 17]),
    (10, 8, [0, 1, 3, 4, 5, 6]),
    (10, 25, [0, 0, 0, 1, 1, 2, 2, 2]),
    (15, 8, [0, 2, 4, 6, 8, 10]),
]


@pytest.mark.parametrize(("source", "target", "wanted"), TABLE)
def test_which_frames_are_shown(tmp_path, source, target, wanted):
    path = make_video(tmp_path / "x.mp4", source + source // 5, source)
    seconds = len(wanted) / target
    assert numbers(decode(path, [at(target)], seconds)[0]) == wanted


@pytest.mark.parametrize(
    ("count", "fps", "clip", "sync"),
    [
        (240, 30, 64, 200),
        (239, 30, 64, 199),
        (239, Fraction(30000, 1001), 64, 199),
        (80, 10, 64, 200),
        (250, 30, 67, 208),
    ],
)
def test_how_many_frames_there_are(tmp_path, count, fps, clip, sync):
    path = make_video(tmp_path / "x.mp4", count, fps)
    for target, wanted in ((8, clip), (25, sync)):
        exact = decode(path, [at(target)], wanted / target)[0]
        assert exact.shape == (wanted, 3, SIDE, SIDE) and exact.dtype == torch.uint8
        with pytest.raises(InputError, match=rf"{wanted} frames at {target} fps .* {wanted + 1} "):
            decode(path, [at(target)], (wanted + 1) / target)
    if sync == 199:
        with pytest.raises(InputError, match=r"x\.mp4: 199 frames at 25 fps .* wanted 200 \(8 s\)"):
            decode(path, [at(8), at(25)], 8.0)


def test_the_last_picture_is_held_on_request(tmp_path):
    path = make_video(tmp_path / "x.mp4", 239, 30)  # 7.967 s
    streams = [at(8), at(25)]
    with pytest.warns(UserWarning, match=r"x\.mp4: too short \(7\.967 s\), the last pict"):
        held = decode(path, streams, 8.0, DecodingConfig(hold_seconds=0.05))
    assert [len(frames) for frames in held] == [64, 200]
    seen = decode(path, [at(25)], 199 / 25)[0]
    assert torch.equal(held[1], torch.cat([seen, seen[-1:]]))
    with pytest.raises(InputError, match=r"x\.mp4: 199 frames at 25 fps \(7\.967 s\), wanted 200"):
        decode(path, streams, 8.0, DecodingConfig(hold_seconds=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is held where nothing lacks
        whole = decode(path, streams, 7.9, DecodingConfig(hold_seconds=0.05))
    assert all(map(torch.equal, whole, decode(path, streams, 7.9)))


def filtered(path: Path, *filters: str) -> torch.Tensor:  # (t 3 h w)
    """The frames that FFmpeg's own filters show, as RGB."""
    import av

    shown = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream)]
        chain += [graph.add(*each.split("=", 1)) for each in (*filters, "format=pix_fmts=rgb24")]
        sink = graph.add("buffersink")
        for one, two in zip(chain, [*chain[1:], sink], strict=True):
            one.link_to(two)
        graph.configure()
        for frame in [*container.decode(stream), None]:
            chain[0].push(frame)
            while True:
                try:
                    shown.append(sink.pull().to_ndarray())
                except (av.BlockingIOError, av.EOFError):
                    break
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)


def graph_numbers(path: Path, fps: int) -> list[int]:
    """The frames that FFmpeg's own fps filter shows."""
    return numbers(filtered(path, f"fps=fps={fps}"))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("seed", range(3))
def test_variable_rates_and_late_starts_agree_with_the_fps_filter(tmp_path, suffix, seed):
    rng = np.random.default_rng(seed)
    pts = (np.cumsum(rng.integers(5, 120, 60)) + seed * 300).tolist()
    path = make_video(tmp_path / f"x{suffix}", 60, 25, pts)
    for fps in (8, 25):
        wanted = graph_numbers(path, fps)
        assert numbers(decode(path, [at(fps)], len(wanted) / fps)[0]) == wanted
        with pytest.raises(InputError, match=f"{len(wanted)} frames"):
            decode(path, [at(fps)], (len(wanted) + 1) / fps)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.avi", "libx264", {}),  # pictures out of order
        ("x.avi", "mpeg4", {"bf": "2"}),
        ("x.flv", "flv", {}),  # no durations
        ("x.wmv", "wmv2", {}),
        ("x.ts", "libx264", {}),  # a late start
        ("x.mpg", "mpeg2video", {"bf": "2"}),
        ("x.webm", "libvpx", {}),
        ("x.mov", "mpeg4", {}),
        ("x.mxf", "mpeg2video", {"bf": "2"}),
    ],
)
def test_containers_agree_with_the_fps_filter(tmp_path, name, codec, options):
    path = make_video(tmp_path / name, 50, 25, codec=codec, **options)
    for fps in (8, 25):
        wanted = graph_numbers(path, fps)
        assert numbers(decode(path, [at(fps)], len(wanted) / fps)[0]) == wanted
        with pytest.raises(InputError, match=f"{len(wanted)} frames"):
            decode(path, [at(fps)], (len(wanted) + 1) / fps)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program")
@pytest.mark.parametrize(("source", "fps"), [(30, 8), (30, 25), (24, 25), (60, 8)])
def test_frames_are_those_of_the_ffmpeg_program(tmp_path, source, fps):
    path = make_video(tmp_path / "x.mkv", source * 2, source)
    options = f"-v error -i {path} -vf fps={fps} -pix_fmt rgb24 -f rawvideo -"
    raw = subprocess.run(["ffmpeg", *options.split()], capture_output=True, check=True).stdout
    wanted = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, SIDE, SIDE, 3)
    found = decode(path, [at(fps)], len(wanted) / fps)[0]
    assert numbers(found) == numbers(wanted.permute(0, 3, 1, 2))


BT709 = {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"}


@pytest.mark.parametrize(
    ("codec", "form", "height", "width", "options"),
    [
        ("libx264", "yuv420p", 64, 96, {}),
        ("libx264", "yuv420p", 64, 96, BT709),
        ("libx264", "yuv420p", 64, 96, {"x264-params": "fullrange=on"}),
        ("libx264", "yuv420p", 64, 96, {"x264-params": "interlaced=1"}),
        ("libx264", "yuv420p10le", 64, 96, {}),
        ("libx264", "yuv422p", 64, 96, {}),
        ("libx264", "yuv444p", 63, 97, {}),
        ("ffv1", "yuv420p", 63, 97, {}),
        ("ffv1", "yuv420p", 1, 97, {}),
        ("ffv1", "yuva420p", 64, 96, {}),
        ("ffv1", "gray", 64, 96, {}),
        ("mjpeg", "yuvj422p", 63, 97, {}),
        ("rawvideo", "nv12", 64, 96, {}),
    ],
)
def test_colours_are_those_of_the_format_filter(tmp_path, codec, form, height, width, options):
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (6, 1 + height // 4, 1 + width // 4, 3), dtype=np.uint8)
    pictures = pictures.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    path = write_video(tmp_path / "x.mkv", pictures, 25, codec=codec, pix_fmt=form, **options)
    wanted = filtered(path)
    whole = FrameStream(25, 48, "squash")
    found = decode(path, [whole], 6 / 25)[0]
    for picture, frame in zip(wanted, found, strict=True):
        assert torch.equal(whole.fit(picture.permute(1, 2, 0).contiguous()), frame)


def test_pictures_may_change_their_size(tmp_path):
    path = tmp_path / "x.ts"
    for start, side, shade in ((0, 48, 200), (400, 64, 60)):
        pictures = [np.full((side, side, 3), shade, np.uint8)] * 10
        pts = list(range(start, start + 400, 40))
        part = write_video(tmp_path / "part.ts", pictures, 25, pts, tune="zerolatency")
        with open(path, "ab") as file:
            file.write(part.read_bytes())
    found = decode(path, [FrameStream(25, 32, "squash")], 0.76)[0].float().mean((1, 2, 3))
    assert found.tolist() == pytest.approx([200] * 10 + [60] * 9, abs=3)
    with pytest.raises(InputError, match=r"x\.ts: pictures of 64 x 64 pixels, decoding\.megapix"):
        decode(path, [at(25)], 0.76, DecodingConfig(megapixels=0.003))


def test_all_streams_come_from_one_pass(tmp_path):
    path = make_video(tmp_path / "x.mp4", 40, 30)
    streams = [at(25), FrameStream(8, 16, "squash"), at(8)]
    together = decode(path, streams, 1.0)
    for stream, frames in zip(streams, together, strict=True):
        assert torch.equal(decode(path, [stream], 1.0)[0], frames)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.mp4", "libx264", {"preset": "medium", "bf": "3", "g": "20"}),
        ("x.mkv", "libx264", {"x264opts": "open-gop=1:keyint=12:bframes=3"}),
        ("x.ts", "libx264", {"g": "20"}),
        ("x.mpg", "mpeg2video", {"bf": "2", "g": "10"}),
        ("x.avi", "mpeg4", {"bf": "2"}),
        ("x.flv", "flv", {}),
        ("x.webm", "libvpx", {"g": "15"}),
    ],
)
def test_a_later_start_shows_what_the_whole_shows_there(tmp_path, name, codec, options):
    """From any slot of a stream on, whether or not the container can jump there."""
    path = make_video(tmp_path / name, 90, 30, codec=codec, **options)
    for fps in (25, 8):
        whole = decode(path, [at(fps)], 2.8)[0]
        for first in (1, 5, 13, fps * 2):
            later = decode(path, [at(fps)], 0.5, start=Fraction(first, fps))[0]
            assert torch.equal(later, whole[first : first + len(later)])


@pytest.mark.parametrize("first", range(1, 30, 4))
def test_a_start_between_the_slots_of_a_stream(tmp_path, first):
    path, start = make_video(tmp_path / "x.mp4", 90, 25), Fraction(first, 25)
    # The last frame whose time rounds to the slot, halves to the later one.
    wanted = [math.ceil(25 * (start + Fraction(2 * slot + 1, 16))) - 1 for slot in range(8)]
    assert numbers(decode(path, [at(25), at(8)], 1.0, start=start)[1]) == wanted


def test_decoding_begins_at_the_key_frame_before_the_start(tmp_path):
    path = make_video(tmp_path / "x.mp4", 250, 25, g="25")
    size = path.stat().st_size
    broken = bytearray(path.read_bytes())
    broken[size // 8 : size // 2] = bytes(size // 2 - size // 8)  # seconds 1 to 4
    (tmp_path / "y.mp4").write_bytes(broken)
    wanted = decode(path, [at(25)], 2.0, start=7)[0]
    assert numbers(wanted) == [n % 256 for n in range(175, 225)]
    assert torch.equal(decode(tmp_path / "y.mp4", [at(25)], 2.0, start=7)[0], wanted)
    with pytest.raises(InputError):
        decode(tmp_path / "y.mp4", [at(25)], 9.0)


def test_the_last_picture_may_be_held(tmp_path):
    path = make_video(tmp_path / "x.mp4", 50, 25)
    whole = decode(path, [at(25)], 2.0)[0]
    with pytest.raises(
        InputError, match=r"25 frames at 25 fps \(2.000 s\), wanted 26 \(1.04 s from"
    ):
        decode(path, [at(25)], 1.04, start=1)
    held = decode(path, [at(25)], 1.08, start=1, hold=0.08)[0]
    assert torch.equal(held, torch.cat([whole[25:], whole[-1:], whole[-1:]]))


def test_counts_are_exact_for_decimal_seconds():
    assert FrameStream(100, 8, "crop").count(0.29) == 29
    assert [CLIP_STREAM.count(8), SYNC_STREAM.count(8.0), CLIP_STREAM.count(1.28)] == [64, 200, 10]


def test_decoding_ends_when_enough_is_seen(tmp_path):
    whole = make_video(tmp_path / "x.mkv", 120, 25)
    data = whole.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    assert numbers(decode(cut, [at(25)], 1.0)[0]) == list(range(25))
    with pytest.raises(InputError, match=r"cut\.mkv: "):
        decode(cut, [at(25)], 4.8)
    assert len(decode(whole, [at(25)], 4.8)[0]) == 120


def test_the_colour_space_tag_is_honoured(tmp_path):
    import av

    y, cb, cr = 120, 90, 180

    def red(name: str, options: dict[str, str]) -> list[float]:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = SIDE
            stream.options = {"crf": "1", **options}
            for _ in range(5):
                planes = [np.full((SIDE, SIDE), y), np.full((SIDE // 2, SIDE // 2), cb)]
                planes.append(np.full((SIDE // 2, SIDE // 2), cr))
                flat = np.concatenate([p.ravel() for p in planes]).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(flat.reshape(-1, SIDE), format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return decode(tmp_path / name, [at(25)], 0.2)[0].float().mean(dim=(0, 2, 3)).tolist()

    luma = 255 / 219 * (y - 16)
    plain = [luma + 1.596 * (cr - 128), luma - 0.392 * (cb - 128) - 0.813 * (cr - 128)]
    tagged = [luma + 1.793 * (cr - 128), luma - 0.213 * (cb - 128) - 0.533 * (cr - 128)]
    assert red("plain.mp4", {})[:2] == pytest.approx(plain, abs=2)
    bt709 = {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"}
    assert red("bt709.mp4", bt709)[:2] == pytest.approx(tagged, abs=2)


@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [(360, 640, (224, 398)), (240, 320, (224, 298)), (300, 200, (336, 224)), (99, 50, (443, 224))],
)
def test_the_crop_of_known_sizes(height, width, scaled):
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    whole = interpolate(
        image.permute(2, 0, 1)[None].contiguous(), size=scaled, mode="bicubic", antialias=True
    )[0]
    top, left = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
    assert torch.equal(SYNC_STREAM.fit(image), whole[:, top : top + 224, left : left + 224])


@settings(max_examples=40)
@given(st.integers(5, 90), st.integers(5, 90), st.integers(4, 40), st.integers(0, 99))
def test_squash_is_torch_bicubic_on_uint8(height, width, size, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    whole = interpolate(
        image.permute(2, 0, 1)[None].contiguous(), size=(size, size), mode="bicubic", antialias=True
    )
    assert torch.equal(FrameStream(8, size, "squash").fit(image), whole[0])


def test_a_rotation_tag_is_named_and_not_applied(tmp_path):
    path = make_video(tmp_path / "x.mp4", 10, 25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upright = decode(path, [at(25)], 0.2)[0]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"x\.mp4: the rotation tag \(-?90 degrees\)"):
        assert torch.equal(decode(path, [at(25)], 0.2)[0], upright)


def test_what_is_no_video_is_named(tmp_path):
    import av

    make_video(tmp_path / "good.mp4", 10, 25)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:700])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "nothing.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "noframes.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = SIDE
        container.start_encoding()
    for name, reason in [
        ("missing.mp4", "no such file"),
        ("text.mp4", "not readable as video"),
        ("nothing.mp4", "not readable as video"),
        ("cut.mp4", "not readable as video"),
        ("sound.mp4", "no video stream, found audio"),
        ("noframes.avi", "no frames"),
    ]:
        with pytest.raises(InputError, match=reason) as caught:
            decode(tmp_path / name, [at(25)], 0.2)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no frame"):
        decode(tmp_path / "good.mp4", [at(8)], 0.1)
    with pytest.raises(ValueError, match="'fit'"):
        FrameStream(8, 32, "fit")
    assert math.isclose(len(decode(tmp_path / "good.mp4", [at(25)], 0.4)[0]), 10)
