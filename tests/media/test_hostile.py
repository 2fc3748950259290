"""Files that lie, break or kill what reads them: each is refused, and nothing else is lost."""

from __future__ import annotations

import csv
import io
import os
import pickle
import signal
import struct
import threading
import warnings
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support.payload import Payload

from wavflow.base.errors import InputError
from wavflow.base.files import check_id, write_json
from wavflow.base.processes import World
from wavflow.base.state_dict import load as load_checkpoint
from wavflow.cli.app import main
from wavflow.config.load import load_config
from wavflow.config.schema import DecodingConfig
from wavflow.data.recording import read_features
from wavflow.features.extract import extract
from wavflow.media import video, video_worker
from wavflow.media.audio import load_audio, save_wav
from wavflow.media.video import FrameStream
from wavflow.training import sharded_checkpoint

STREAMS = [FrameStream(8, 32, "squash"), FrameStream(25, 48, "crop")]


def jpeg(side: int) -> bytes:
    import av

    codec = av.CodecContext.create("mjpeg", "w")
    codec.width = codec.height = side
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame(side, side, "yuvj420p")
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.pts = 0
    return bytes([*codec.encode(frame), *codec.encode(None)][0])


def repeat(path: Path, picture: bytes, side: int, count: int, step: int = 40) -> Path:
    """The same JPEG `count` times, every `step` ms: a long decoding of a short writing."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = "yuvj420p"
        container.start_encoding()
        for i in range(count):
            packet = av.Packet(picture)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = i * step
            packet.is_keyframe = True
            container.mux(packet)
    return path


def encode(path: Path, codec: str, side: int = 64, form: str = "yuv420p", **options: str) -> Path:
    """50 pictures of noise at 25 a second."""
    import av

    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = form
        for _ in range(50):
            picture = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=form)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Good videos; `slow.mkv` takes seconds and hundreds of MB."""
    root = tmp_path_factory.mktemp("files")
    encode(root / "good.mp4", "libx264")
    encode(root / "streamed.mp4", "libx264", movflags="faststart")
    encode(root / "ffv1.mkv", "ffv1", 300)
    encode(root / "x.gif", "gif", form="rgb8")
    repeat(root / "slow.mkv", jpeg(5000), 5000, 60)
    return root


def refused(path: Path, *words: str, **limits: float) -> str:
    with pytest.raises(InputError) as caught:
        video_worker.decode(path, STREAMS, 1.0, DecodingConfig(**limits))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 1200
    for word in words:
        assert word in text
    return text


# The guard


def test_guarded_and_unguarded_frames_are_the_same(files):
    for name in ("good.mp4", "ffv1.mkv", "x.gif"):
        plain = video.decode(files / name, STREAMS, 2.0)
        for threads in (0, 1, 3):
            found = video_worker.decode(files / name, STREAMS, 2.0, threads=threads)
            assert [each.dtype for each in found] == [torch.uint8] * 2
            assert all(map(torch.equal, plain, found))
    with pytest.raises(ValueError, match="no frame"):
        video_worker.decode(files / "good.mp4", STREAMS, 0.01)


def test_paths_are_relative_to_the_callers_folder_and_never_protocols(files, tmp_path, monkeypatch):
    wanted = video_worker.decode(files / "good.mp4", STREAMS, 1.0)
    for name in ("concat:x.mp4", "data:x.mp4", "späße %d.mp4"):
        (tmp_path / name).write_bytes((files / "good.mp4").read_bytes())
        monkeypatch.chdir(tmp_path)
        assert all(map(torch.equal, wanted, video_worker.decode(name, STREAMS, 1.0)))


def test_many_threads_and_a_forked_process_decode_at_once(files):
    wanted = video.decode(files / "good.mp4", STREAMS, 2.0)
    same = []

    def work() -> None:
        for _ in range(5):
            found = video_worker.decode(files / "good.mp4", STREAMS, 2.0, threads=1)
            same.append(all(map(torch.equal, wanted, found)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if not video_worker.IDLE else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(torch.equal, wanted, video_worker.decode(files / "good.mp4", STREAMS, 2.0)))


def test_warnings_come_through(files, tmp_path):
    data = bytearray((files / "good.mp4").read_bytes())
    struct.pack_into(">5i", data, data.index(b"tkhd") + 44, 0, 1 << 16, 0, -(1 << 16), 0)
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.warns(UserWarning, match=r"x\.mp4: the rotation tag"):
        video_worker.decode(tmp_path / "x.mp4", STREAMS, 1.0)


# What files claim


def test_every_limit_is_named_with_what_was_found(files, tmp_path):
    slow, good = files / "slow.mkv", files / "good.mp4"
    size = good.stat().st_size / 1e9
    refused(good, f"the file has {size:.3g} GB", "decoding.file_gb allows 1e-05", file_gb=1e-5)
    refused(slow, "5000 x 5000", "decoding.megapixels allows 24.9", megapixels=24.9)
    refused(slow, "decoding.memory_gb allows 0.05", memory_gb=0.05)
    refused(slow, "decoding.memory_gb allows 0.15", memory_gb=0.15)
    refused(slow, "decoding.seconds allows 0.3", seconds=0.3)
    still = repeat(tmp_path / "still.mkv", jpeg(64), 64, 60, 0)
    refused(still, "51 packets", "decoding.idle_packets allows 50", idle_packets=50)
    assert len(video_worker.decode(good, STREAMS, 1.0, DecodingConfig(memory_gb=0.15))[1]) == 25
    # The worker that has just decoded holds more than this beside its frames.
    refused(good, "decoding.memory_gb allows 0.0001", memory_gb=1e-4)


def test_headers_that_claim_too_much(files, tmp_path):
    data = bytearray((files / "ffv1.mkv").read_bytes())
    struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, 1000 * 3600e3)  # in ms
    (tmp_path / "hours.mkv").write_bytes(data)
    refused(tmp_path / "hours.mkv", "claims 1000.0 hours", "decoding.hours allows 24")
    frames = video_worker.decode(tmp_path / "hours.mkv", STREAMS, 1.0, DecodingConfig(hours=1001.0))
    assert len(frames[1]) == 25

    for side, reason in ((10_000, "10000 x 10000 pixels, decoding.megapixels"), (65535, "")):
        data = (files / "ffv1.mkv").read_bytes()
        for element in (b"\xb0", b"\xba"):  # width and height, in two bytes
            held = element + b"\x82" + struct.pack(">H", 300)
            assert held in data
            data = data.replace(held, element + b"\x82" + struct.pack(">H", side))
        (tmp_path / "large.mkv").write_bytes(data)
        refused(tmp_path / "large.mkv", reason)
        data = bytearray((files / "x.gif").read_bytes())
        struct.pack_into("<HH", data, 6, side, side)
        (tmp_path / "large.gif").write_bytes(data)
        refused(tmp_path / "large.gif", reason)
    data = bytearray(jpeg(64))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65535, 65535)
    refused(repeat(tmp_path / "jpeg.mkv", bytes(data), 64, 30))


@pytest.mark.parametrize("name", ["good.mp4", "streamed.mp4"])
def test_files_cut_anywhere(files, tmp_path, name):
    whole = (files / name).read_bytes()
    wanted = video_worker.decode(files / name, STREAMS, 1.0)
    cut, kept = tmp_path / "cut.mp4", 0
    for size in np.linspace(0, len(whole) - 1, 40).astype(int):
        cut.write_bytes(whole[:size])
        try:
            found = video_worker.decode(cut, STREAMS, 1.0)
        except InputError as error:
            assert str(error).startswith(f"{cut}: ") and "\n" not in str(error)
        else:
            assert all(map(torch.equal, wanted, found))
            kept += 1
    # With its index at the end, a file is lost with a few bytes of it.
    assert 10 < kept < 30 if name == "streamed.mp4" else kept <= 1


def test_noise_and_flipped_bits(files, tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "x.mp4"
    for size in (1, 100, 10_000, 300_000):
        path.write_bytes(generator.bytes(size))
        refused(path, "not readable as video")
    whole = np.frombuffer((files / "streamed.mp4").read_bytes(), np.uint8)
    outcomes = []
    for _ in range(40):
        data = whole.copy()
        # Half of the flips go into the header, where the structure is.
        end = len(data) if len(outcomes) % 2 else 2000
        data[generator.integers(0, end, 12)] ^= np.uint8(1 << generator.integers(0, 8))
        path.write_bytes(data.tobytes())
        try:
            outcomes.append(len(video_worker.decode(path, STREAMS, 1.0)[1]) == 25)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes.append(None)
    assert None in outcomes and set(outcomes) <= {True, None}


def test_other_things_called_mp4(files, tmp_path, monkeypatch):
    import av

    (tmp_path / "real.mp4").write_bytes((files / "good.mp4").read_bytes())
    png = av.CodecContext.create("png", "w")
    png.width = png.height = 64
    png.pix_fmt, png.time_base = "rgb24", Fraction(1, 25)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nreal.mp4\n#EXT-X-ENDLIST\n"
    for name, data in {
        "picture": bytes(png.encode(av.VideoFrame(64, 64, "rgb24"))[0]),
        "text": b"a text\n" * 1000,
        "pickle": pickle.dumps(Payload(tmp_path / "ran")),
        "concat": b"ffconcat version 1.0\nfile real.mp4\n",
        "playlist": playlist.encode(),
        "empty": b"",
    }.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
        refused(tmp_path / f"{name}.mp4", "not readable as video")
        with pytest.raises(InputError, match="not readable as audio"):
            load_audio(tmp_path / f"{name}.mp4", 8000)
    os.mkfifo(tmp_path / "fifo.mp4")
    refused(tmp_path / "fifo.mp4", "no such file")
    refused(Path("/dev/zero"), "no such file")
    assert not (tmp_path / "ran").exists()


# What is not video


def test_pickles_do_not_run(tmp_path):
    ran, shapes = tmp_path / "ran", {"clip_features": (16, 64)}
    payload = {"clip_features": Payload(ran)}
    torch.save(payload, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(payload))
    torch.save(payload, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "plain.pth", "old.pth"):
        with pytest.raises(InputError, match=f"{name}: not a readable features file"):
            read_features(tmp_path / name, shapes)
        with pytest.raises(InputError, match=f"{name}: not a readable checkpoint"):
            load_checkpoint(tmp_path / name)
        assert not ran.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert ran.exists()  # it would have run


def test_features_that_unpack_to_more_than_they_are(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"clip_features": torch.zeros(1 << 20, 16)}, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    path.write_bytes(packed.getvalue())
    assert path.stat().st_size < 1 << 20
    for read in (lambda: read_features(path, {}), lambda: load_checkpoint(path)):
        with pytest.raises(InputError, match=r"x\.pth: .* unpacks to 671\d+ bytes"):
            read()
    torch.save({"clip_features": torch.zeros(1, 64).expand(1 << 40, 64)}, path)
    with pytest.raises(InputError, match="clip_features repeats its numbers"):
        read_features(path, {"clip_features": (1 << 40, 64)})


@pytest.mark.parametrize("length", [1 << 62, 1 << 30, 9])
def test_safetensors_with_a_lying_header(tmp_path, length):
    data = struct.pack("<Q", length) + b'{"x":{}}' + bytes(100)
    (tmp_path / "shard.safetensors").write_bytes(data)
    entry = {"shard.safetensors": [len(data), zlib.crc32(data)]}
    write_json(tmp_path / sharded_checkpoint.END_MARK, entry)
    with pytest.raises(InputError, match=r"shard\.safetensors: not a readable safetensors file"):
        sharded_checkpoint.check(tmp_path, World(0, 1, torch.device("cpu")))


def test_sound_files_with_lying_headers(tmp_path):
    import soundfile

    save_wav(tmp_path / "good.wav", torch.sin(torch.arange(8000) / 10), 8000)
    good = (tmp_path / "good.wav").read_bytes()

    def wav(form: str, place: int, value: int) -> Path:
        data = bytearray(good)
        struct.pack_into(form, data, place, value)
        (tmp_path / "x.wav").write_bytes(data)
        return tmp_path / "x.wav"

    data_size, rate, channels = good.index(b"data") + 4, 24, 22
    assert load_audio(wav("<I", data_size, 0xFFFFFFF0), 8000).shape == (8000,)
    for found in (1, 7, 999, 768_001):
        with pytest.raises(InputError, match=rf"x\.wav: {found} Hz, wanted 1000 to 768000"):
            load_audio(wav("<I", rate, found), 8000)
    for found in (0, 65535):
        with pytest.raises(InputError, match=r"x\.wav: not readable as audio"):
            load_audio(wav("<H", channels, found), 8000)
    assert load_audio(wav("<H", channels, 8), 8000).shape == (1000,)
    soundfile.write(tmp_path / "x.flac", np.zeros(8000), 8000)
    flac = bytearray((tmp_path / "x.flac").read_bytes())
    flac[21] |= 0x0F  # 36 bits that count the samples
    flac[22:26] = b"\xff" * 4
    (tmp_path / "x.flac").write_bytes(flac)
    with pytest.raises(InputError, match=r"x\.flac: not readable as audio"):
        load_audio(tmp_path / "x.flac", 8000)


def test_sound_files_that_go_on(tmp_path, monkeypatch):
    save_wav(tmp_path / "x.wav", torch.sin(torch.arange(80000) / 10), 8000)
    whole = load_audio(tmp_path / "x.wav", 8000)
    monkeypatch.setattr("wavflow.media.audio._BLOCK", 999)
    assert torch.equal(load_audio(tmp_path / "x.wav", 8000), whole)
    assert torch.equal(load_audio(tmp_path / "x.wav", 8000, 1.5), whole[:12000])
    monkeypatch.setattr("wavflow.media.audio.MAX_SAMPLES", 79_999)
    with pytest.raises(InputError, match=r"x\.wav: more than 79999 samples"):
        load_audio(tmp_path / "x.wav", 8000)
    assert torch.equal(load_audio(tmp_path / "x.wav", 8000, 1.5), whole[:12000])


# Batches


def table(path: Path, rows: list[tuple[str, Path]]) -> Path:
    save_wav(path.parent / "sound.wav", torch.zeros(100), 8000)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "audio_path", "video_path", "caption"))
        writer.writerows((id, "sound.wav", video, "a bell") for id, video in rows)
    return path


def report(result) -> dict[str, tuple[str, str]]:
    with open(result.report, encoding="utf-8", newline="") as file:
        return {row["id"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def test_ids_that_try_to_leave_the_folder(files, tmp_path):
    good = files / "good.mp4"
    bad = ["../up", "/tmp/absolute", "a\\b", "..", ".", ".hidden", "x" * 201, "CON", "nul.txt"]
    rows = [("good", good), *((id, good) for id in bad), ("last", good)]
    result = extract(table(tmp_path / "t.csv", rows), tmp_path / "out/a")
    found = report(result)
    assert (result.done, result.failed) == (2, len(bad))
    assert all(found[id][0] == "failed" and ", id " in found[id][1] for id in bad)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.pth")}
    assert written == {"out/a/features/good.pth", "out/a/features/last.pth"}
    for id in ("nul\0", "a\x7f", "aux", "Com1.x", "lpt9"):
        with pytest.raises(InputError, match="id "):
            check_id(id)
    assert [check_id(id) for id in ("console", "com10", "nully")] == ["console", "com10", "nully"]


@pytest.mark.parametrize(
    ("sent", "seconds", "reason"),
    [
        (signal.SIGKILL, 60, "was killed by SIGKILL; the machine may be short of memory"),
        (signal.SIGSEGV, 60, "was killed by SIGSEGV"),
        (signal.SIGSTOP, 3, "decoding was not done in time, decoding.seconds allows 3"),
    ],
)
def test_a_worker_that_dies_or_hangs_costs_one_row(files, tmp_path, sent, seconds, reason):
    import psutil

    while video_worker.IDLE:
        video_worker.IDLE.pop().end()
    rows = [("first", files / "good.mp4"), ("bad", files / "slow.mkv")]
    rows += [("last", files / "good.mp4")]
    hit = []

    def strike(done: int, total: int) -> None:
        if done == 1:
            children = psutil.Process().children()
            (worker,) = (each for each in children if video_worker.__name__ in str(each.cmdline()))
            begun = sum(worker.cpu_times()[:2])
            while sum(worker.cpu_times()[:2]) < begun + 0.1:  # it is at the slow video
                pass
            worker.send_signal(sent)
            hit.append(worker.pid)

    config = load_config("toy_8k", [f"decoding.seconds={seconds}"])
    path = table(tmp_path / "t.csv", rows)
    result = extract(path, tmp_path / "out", config=config, workers=1, progress=strike)
    found = report(result)
    assert hit and (result.done, result.failed) == (2, 1)
    assert found["first"][0] == found["last"][0] == "ok" and found["bad"][0] == "failed"
    assert found["bad"][1].startswith(f"row 3: {files / 'slow.mkv'}: ")
    assert found["bad"][1].endswith(reason)


def test_a_batch_of_the_worst(files, tmp_path, capsys):
    """Bad rows among good ones, through the command line, twice."""
    whole = (files / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(5000))
    repeat(tmp_path / "still.mkv", jpeg(64), 64, 1200, 0)
    bad = [tmp_path / name for name in ("cut.mp4", "noise.mp4", "still.mkv", "gone.mp4")]
    bad.append(files / "slow.mkv")
    rows = [("good0", files / "good.mp4")]
    for i, path in enumerate(bad):
        rows += [(f"bad{i}", path), (f"good{i + 1}", files / "good.mp4")]
    (tmp_path / "c.yaml").write_text("_base_: toy.yaml\ndecoding: {memory_gb: 0.05}\n")
    toy = Path(video.__file__).parents[1] / "config/presets/toy_8k.yaml"
    (tmp_path / "toy.yaml").write_text(toy.read_text())
    options = ["--config", str(tmp_path / "c.yaml"), "--workers", "2"]
    argv = ["extract", "--csv", str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "o")]
    for done in ("6 extracted, 0 kept, 5 failed", "0 extracted, 6 kept, 5 failed"):
        with pytest.raises(SystemExit) as caught:
            main(argv + options)
        assert caught.value.code == 1
        assert done in " ".join(capsys.readouterr().err.split())
    with open(tmp_path / "o/report.csv", newline="") as file:
        told = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert all(f": {path}" in told[f"bad{i}"] for i, path in enumerate(bad))
    words = ("not readable", "not readable", "idle_packets", "no such video", "memory_gb")
    assert all(word in told[f"bad{i}"] for i, word in enumerate(words))
    with open(tmp_path / "o/t.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"good{i}" for i in range(6)]
