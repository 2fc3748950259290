"""The page's server, as its clients meet it: a process of its own that is asked over HTTP."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import save_tiny

from wavflow.cli.app import main
from wavflow.media.sound import Sound
from wavflow.pipeline.sampler import Sampler
from wavflow.sampling.plan import Step
from wavflow.serve.studio import PREVIEWS, Form, Limits, Studio, Watch

av = pytest.importorskip("av")
pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'wavflow[serve]'")
pytest.importorskip("matplotlib")
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

ASKED = {
    "caption": "a bell rings",
    "video": None,
    "seconds": 2,
    "seed": 7,
    "random_seed": False,
    "negative_caption": "",
    "guidance": 4.0,
    "solver": "default",
    "steps": 14,
}
#: Takes seconds, also on a fast machine.
LONG = {"seconds": 20, "solver": "rk4", "steps": 200}
WAIT = 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "checkpoint.pth")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "noise.mp4"
    write_video(path, "libx264")
    return path


def write_video(path: Path, codec: str) -> None:
    """Two seconds of noise."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        random = np.random.default_rng(0)
        for _ in range(50):
            picture = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode(None))


@dataclass
class Server:
    """A running `wavflow serve`."""

    process: subprocess.Popen
    port: int
    folder: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> gradio_client.Client:
        return gradio_client.Client(self.url, verbose=False, analytics_enabled=False)

    def said(self, pattern: str) -> re.Match:
        """Waits until the log has `pattern`."""
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            if found := re.search(pattern, self.log.read_text(encoding="utf-8")):
                return found
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in\n{self.log.read_text(encoding='utf-8')}")


@contextmanager
def serving(saved: Path, folder: Path, **environment: str) -> Iterator[Server]:
    (folder / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--ema", "none", "--max-seconds", "20", "--max-upload-mb", "1"]
    command = [sys.executable, "-m", "wavflow", "serve", "--checkpoint", str(saved)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, **ONE_THREAD, "TMPDIR": str(folder / "tmp")},
        )
    server = Server(process, port, folder / "tmp", folder / "log")
    try:
        server.said(r"Ctrl-C ends it")
        yield server
    finally:
        process.kill()
        process.wait()


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trap() -> Iterator[socket.socket]:
    """What all traffic to other hosts would go through."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.fixture(scope="module")
def server(saved: Path, trap: socket.socket, tmp_path_factory) -> Iterator[Server]:
    proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
    environment = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1,localhost"}
    with serving(saved, tmp_path_factory.mktemp("server"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> gradio_client.Client:
    return server.client()


def ask(client: gradio_client.Client, **asked: object) -> tuple:
    """(progress, sound, spectrogram, video, seed) of a finished request."""
    return client.predict(**{**ASKED, **asked}, api_name="/generate")


def start(client: gradio_client.Client, **asked: object) -> gradio_client.client.Job:
    return client.submit(**{**ASKED, **asked}, api_name="/generate")


def test_an_adaptive_solver_has_previews_along_its_path() -> None:
    news = []
    watch = Watch(news.append)
    sound = Sound(torch.zeros(8), 8000)
    for done in range(1, 41):
        watch(Step((0,), done, None, (done - 1) / 40, lambda: [sound]))
    assert [each.text for each in news[:2]] == ["step 1", "step 2"]
    assert [each.done for each in news if each.preview is sound] == [8, 15, 21, 28, 35]


def test_a_studio_that_closes_ends_its_work(saved, tmp_path) -> None:
    studio = Studio(Sampler.load(saved, dtype="float32", ema="none"), tmp_path, Limits())
    views = studio.generate(Form("a bell", "", None, 20.0, 1, 4.0, 200, "rk4"))
    next(views)
    studio.close()
    assert list(views)[-1].text.startswith("cancelled ")


def test_a_caption_sounds_as_on_the_command_line(server, client, saved, tmp_path) -> None:
    progress, sound, picture, video, seed = ask(client, negative_caption="a drum")
    assert "2.00 s at 8000 Hz by 14 euler steps" in progress and (video, seed) == (None, 7)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    options = ["--dtype", "float32", "--ema", "none", "--seed", "7", "--guidance", "4"]
    options += ["--caption", "a bell rings", "--negative-caption", "a drum"]
    command = [sys.executable, "-m", "wavflow", "generate", "--checkpoint", str(saved), *options]
    subprocess.run(
        [*command, "--out", str(tmp_path / "a.wav")],
        check=True,
        capture_output=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert Path(sound).read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert Path(ask(client, negative_caption="")[1]).read_bytes() != Path(sound).read_bytes()


def test_a_video_comes_back_with_the_sound(client, video) -> None:
    progress, sound, _, muxed, _ = ask(client, video=gradio_client.handle_file(video), caption="")
    assert "no video" not in progress
    with av.open(str(video)) as given, av.open(muxed) as container:
        pictures = [bytes(packet) for packet in given.demux(video=0) if packet.size]
        assert [bytes(packet) for packet in container.demux(video=0) if packet.size] == pictures
    with av.open(muxed) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
    assert abs(heard - 16000) <= 1024
    alone = ask(client)[1]
    assert Path(alone).read_bytes() != Path(sound).read_bytes()


def test_a_video_that_cannot_take_the_sound_is_said(client, tmp_path) -> None:
    path = tmp_path / "old.webm"
    write_video(path, "libvpx")
    progress, sound, _, muxed, _ = ask(client, video=gradio_client.handle_file(path))
    assert "no video: old.webm: cannot be muxed" in progress
    assert sound is not None and muxed is None


def test_previews_arrive_before_the_end(client) -> None:
    seen = list(start(client, steps=40, seconds=4))
    sounds = [Path(each[1]) for each in seen if each[1] is not None]
    names = list(dict.fromkeys(path.name for path in sounds))
    previews = [name for name in names if name.startswith("preview-")]
    assert 1 <= len(previews) <= PREVIEWS and names[-1] == "wavflow-7.wav"
    assert len({path.read_bytes() for path in sounds}) == len(names)
    steps = [int(n) for each in seen for n in re.findall(r"step (\d+) of 120", each[0])]
    assert steps == sorted(steps) and steps[0] < 60  # of 3 windows, 40 each


def test_a_drawn_seed_is_shown_and_gives_the_sound_again(client) -> None:
    first, second = (ask(client, random_seed=True) for _ in range(2))
    assert first[4] != second[4]
    again = ask(client, seed=first[4])
    assert Path(again[1]).read_bytes() == Path(first[1]).read_bytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"caption": " "}, "nothing to generate: give a caption, a video or both"),
        ({"caption": "x" * 1001}, "caption has 1001 characters; wanted at most 1000"),
        ({"caption": 5}, "caption is 5; wanted text"),
        ({"seconds": 21}, "seconds is 21; wanted 0.1 to 20"),
        ({"seconds": "long"}, "seconds is 'long'; wanted 0.1 to 20"),
        ({"steps": 201}, "steps is 201; wanted a whole number from 1 to 200"),
        ({"steps": 2.5}, "steps is 2.5; wanted a whole number from 1 to 200"),
        ({"seed": -1}, "seed is -1; wanted a whole number from 0 to 9007199254740991"),
        ({"guidance": 21}, "guidance is 21; wanted 0 to 20"),
        ({"solver": "warp"}, "solver is 'warp'; wanted one of euler"),
    ],
)
def test_bad_requests_are_told_why(client, asked, message) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=re.escape(message)):
        ask(client, **asked)


def test_a_bad_video_is_named_without_its_folder(server, client, tmp_path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        ask(client, video=gradio_client.handle_file(bad))
    assert str(caught.value).startswith("bad.mp4: not readable as video")
    assert str(server.folder) not in str(caught.value)
    assert ask(client)[1] is not None


def test_uploads_and_requests_have_a_size(server, video) -> None:
    upload = f"{server.url}/gradio_api/upload"
    large = {"files": ("a.mp4", b"0" * 1_200_000)}
    assert httpx.post(upload, files=large).status_code == 413
    many = [("files", (f"{n}.mp4", b"0" * 300_000)) for n in range(4)]
    assert httpx.post(upload, files=many).status_code == 413
    assert httpx.post(upload, content=iter([b"0"])).status_code == 411
    call = f"{server.url}/gradio_api/call/generate"
    assert httpx.post(call, json={"data": ["x" * 300_000]}).status_code == 413
    assert httpx.post(upload, files={"files": ("a.mp4", video.read_bytes())}).status_code == 200


def test_nothing_outside_the_folder_can_be_had(server, video) -> None:
    secret = server.log
    fetch = f"{server.url}/gradio_api/file="
    for path in (secret, "/etc/passwd", f"{server.folder}/../log", Path(__file__), "."):
        answer = httpx.get(fetch + str(path))
        # It says no more of this machine than was asked.
        said = answer.text.replace(str(path), "").replace(os.path.normpath(path), "")
        assert answer.status_code == 403 and "wavflow" not in said and "/" not in said, said
    for path in ("file=http://127.0.0.1:1/", "proxy=http://127.0.0.1:1/"):
        assert httpx.get(f"{server.url}/gradio_api/{path}").status_code == 403
    for path in (str(secret), str(video), "http://127.0.0.1:1/a.mp4", f"{server.folder}/../log"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = [given if name == "video" else value for name, value in ASKED.items()]
        answer = httpx.post(f"{server.url}/gradio_api/call/generate", json={"data": data})
        assert answer.status_code == 403, path
    (found,) = httpx.post(
        f"{server.url}/gradio_api/upload", files={"files": ("a.mp4", video.read_bytes())}
    ).json()
    assert httpx.get(fetch + found).content == video.read_bytes()


def test_two_requests_are_served_one_after_the_other(server) -> None:
    first = start(server.client(), seconds=6, steps=60, seed=201)
    next(iter(first))
    second = start(server.client(), seed=202)
    ranks = set()
    while not first.done():
        ranks.add(second.status().rank)
        time.sleep(0.01)
    assert second.result(WAIT)[4] == 202
    assert 0 in ranks
    ends = re.findall(r"seed (20[12]): \S+ s at", server.log.read_text(encoding="utf-8"))
    assert ends == ["201", "202"]


def test_a_cancelled_request_ends(server, client) -> None:
    job = start(client, **LONG, seed=101)
    next(iter(job))
    job.cancel()
    found = server.said(r"seed 101: cancelled after (\d+) of (\d+) evaluations")
    assert int(found[1]) < int(found[2])
    assert ask(client)[1] is not None


def test_a_request_ends_when_its_browser_goes(server, client) -> None:
    call = f"{server.url}/gradio_api/call/generate"
    data = list({**ASKED, **LONG, "seed": 102}.values())
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    with httpx.stream("GET", f"{call}/{event}", timeout=WAIT) as stream:
        for line in stream.iter_lines():
            if "step" in line:
                break
    found = server.said(r"seed 102: cancelled after (\d+) of (\d+) evaluations")
    assert int(found[1]) < int(found[2])


def test_only_this_machine_is_listened_to(server) -> None:
    psutil = pytest.importorskip("psutil")
    found = psutil.Process(server.process.pid).net_connections(kind="inet")
    listening = {tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", server.port)}


def test_the_page_needs_no_other_host(server, trap) -> None:
    page = httpx.get(server.url).text
    style = httpx.get(f"{server.url}/theme.css").text
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", page) == []
    assert re.findall(r"@import|url\([\"']?(?:https?:)?//", style) == []
    with pytest.raises(BlockingIOError):  # nobody has come
        trap.accept()


def test_an_interrupted_server_leaves_nothing(saved, tmp_path) -> None:
    with serving(saved, tmp_path) as server:
        job = start(server.client(), **LONG, seed=103)
        next(iter(job))
        assert list(server.folder.glob("wavflow-serve-*"))
        call, data = f"{server.url}/gradio_api/call/generate", list({**ASKED, **LONG}.values())
        waiting = [httpx.post(call, json={"data": data}) for _ in range(Limits().waiting + 2)]
        assert [each.status_code for each in waiting] == [200] * Limits().waiting + [503] * 2
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(WAIT) == 0
        assert list(server.folder.iterdir()) == []
        said = server.log.read_text(encoding="utf-8")
        assert "seed 103: cancelled after" in said and "Traceback" not in said


def test_a_taken_port_is_one_line(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            main(["serve", "--checkpoint", "gone.pth", "--port", str(port)])
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: host 127.0.0.1, port {port}: ")


def test_gradio_that_is_missing_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "wavflow.serve.page", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--checkpoint", "gone.pth"])
    assert caught.value.code == 2
    assert "pip install 'wavflow[serve]'" in capsys.readouterr().err
