"""Fetching of public files, from a real HTTP server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.paths import ROOT

from wavflow.base.errors import InputError
from wavflow.base.files import locked
from wavflow.features import weights
from wavflow.features.weights import WeightFile, cache_dir, fetch, given_file

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every path.

    Attributes:
        asked: the Range header of every request, None without.
        cuts: bytes after which the next connections break; connections after them do not.
        going: while it is not set, nothing follows a body's first 64 KiB.
        status: what it answers to everything, if it refuses.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges = CONTENT, True
        self.going = threading.Event()
        self.going.set()
        self.status: int | None = None
        self.asked: list[str | None] = []
        self.cuts: list[int] = []

    def handle_error(self, request: object, client: object) -> None:
        """A client that was killed is part of the tests."""

    def file(self, **changes: object) -> WeightFile:
        facts = {
            "name": "weights.pth",
            "url": f"http://127.0.0.1:{self.server_port}/weights.pth",
            "size": len(CONTENT),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
        }
        return WeightFile(**facts | changes)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.status is not None:
            self.send_error(server.status)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and server.ranges else 0
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(body)
        for at in range(0, cut, 65536):
            self.wfile.write(body[at : min(at + 65536, cut)])
            server.going.wait()

    def log_message(self, *args: object) -> None:
        """The server is quiet."""


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.going.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVFLOW_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVFLOW_OFFLINE", raising=False)
    monkeypatch.setattr(weights, "PAUSE", 0.01)
    return tmp_path / "cache"


def files(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once(server, cache, caplog):
    caplog.set_level(logging.INFO, logger="wavflow")
    assert fetch(server.file()) == cache / "weights.pth"
    assert (cache / "weights.pth").read_bytes() == CONTENT
    assert files(cache) == ["weights.pth"] and server.asked == [None]
    assert f"fetching 1.0 MB from {server.file().url}" in caplog.text
    assert re.search(r"weights\.pth: 1\.0 of 1\.0 MB, \d+\.\d MB/s, 0:00 left", caplog.text)
    fetch(server.file())
    assert server.asked == [None]


def test_a_cut_connection_goes_on_where_it_broke(server, cache, caplog):
    caplog.set_level(logging.INFO, logger="wavflow")
    server.cuts = [300_000, 0, 500_000]
    assert fetch(server.file()).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300000-", "bytes=800000-"]
    assert "ended at byte 300000; going on" in caplog.text


def test_a_server_without_ranges_sends_the_file_anew(server, cache):
    server.cuts, server.ranges = [300_000], False
    assert fetch(server.file()).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_connections_that_bring_nothing_end_in_an_error(server, cache):
    server.cuts = [300_000] + [0] * weights.ATTEMPTS
    with pytest.raises(InputError, match="300000 of 1048576 bytes are in .*weights.pth.part"):
        fetch(server.file())
    assert files(cache) == ["weights.pth.part"]
    assert fetch(server.file()).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=300000-" and len(server.asked) == 2 + weights.ATTEMPTS


def test_refusals_are_not_repeated(server, cache):
    server.status = 404
    with pytest.raises(InputError, match=f"{server.file().url}: HTTP Error 404: Not Found"):
        fetch(server.file())
    assert server.asked == [None]
    server.status = 503
    with pytest.raises(InputError, match="HTTP Error 503"):
        fetch(server.file())
    assert server.asked == [None] * (1 + weights.ATTEMPTS)


def test_nobody_listening_is_an_error(server):
    file = server.file(url="http://127.0.0.1:9/weights.pth")
    with pytest.raises(InputError, match="127.0.0.1:9/.*refused.*0 of 1048576 bytes"):
        fetch(file)


def test_another_file_under_the_url_is_refused_before_it_is_fetched(server, cache):
    server.content = b"<html>not here</html>"
    with pytest.raises(InputError, match="21 bytes; wanted 1048576"):
        fetch(server.file())
    assert files(cache) == []


def test_a_wrong_checksum_keeps_the_file_aside(server, cache):
    server.content = CONTENT[:-1] + b"\x00"
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(InputError, match=f"weights.pth.bad: 1048576 bytes of sha256 {found}; wan"):
        fetch(server.file())
    assert files(cache) == ["weights.pth.bad"]
    assert (cache / "weights.pth.bad").read_bytes() == server.content
    server.content = CONTENT
    assert fetch(server.file()).read_bytes() == CONTENT


@pytest.mark.parametrize("damaged", [CONTENT[:-9], CONTENT + b"\x00", CONTENT[:-1] + b"\x00"])
def test_a_damaged_file_in_the_cache_is_found(server, cache, damaged):
    cache.mkdir()
    (cache / "weights.pth").write_bytes(damaged)
    with pytest.raises(InputError, match=f"weights.pth.bad: {len(damaged)} bytes of sha256"):
        fetch(server.file())
    assert server.asked == [] and files(cache) == ["weights.pth.bad"]


def test_offline_says_where_the_file_is_expected(server, cache, monkeypatch):
    monkeypatch.setenv("WAVFLOW_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        fetch(server.file())
    assert str(caught.value) == (
        f"{cache / 'weights.pth'}: no such file, and WAVFLOW_OFFLINE=1 forbids to fetch it from "
        f"{server.file().url}"
    )
    cache.mkdir()
    (cache / "weights.pth").write_bytes(CONTENT)
    assert fetch(server.file()) == cache / "weights.pth"
    assert server.asked == []
    monkeypatch.setenv("WAVFLOW_OFFLINE", "yes")
    with pytest.raises(InputError, match="WAVFLOW_OFFLINE is 'yes'; wanted 0 or 1"):
        weights.offline()


def fetching(server):
    """A process that fetches the server's file, says its size and shows the log."""
    code = f"""
import logging
from wavflow.features import weights
from wavflow.features.weights import WeightFile
logging.basicConfig(level=logging.INFO, format="%(message)s")
weights.CONNECTION_TIMEOUT = 300
print(weights.fetch({server.file()!r}).stat().st_size)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_process_waits_for_the_first(server, cache):
    server.going.clear()
    first = fetching(server)
    until((cache / "weights.pth.part").is_file)
    second = fetching(server)
    assert "another process is making it; waiting" in second.stderr.readline()
    server.going.set()
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{len(CONTENT)}\n"), err
    assert server.asked == [None] and files(cache) == ["weights.pth"]


def test_a_killed_process_leaves_what_it_got_and_no_lock(server, cache):
    server.going.clear()
    part = cache / "weights.pth.part"
    first = fetching(server)
    until(lambda: part.is_file() and part.stat().st_size)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    server.going.set()
    got = part.stat().st_size
    assert 0 < got < len(CONTENT)
    assert fetch(server.file()).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={got}-"]


def test_no_room_is_said_before_anything_is_fetched(server, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(InputError, match="1000 bytes are free; weights.pth takes 1048576"):
        fetch(server.file())
    assert server.asked == []


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WAVFLOW_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="file/cache: cannot be written to .*WAVFLOW_CACHE_DIR"):
        fetch(server.file())


def test_the_cache_is_in_the_home_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("WAVFLOW_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "wavflow"


def test_a_given_file_is_never_fetched(tmp_path):
    with pytest.raises(InputError, match="gone.pth: no such file, named by model.some_ckpt"):
        given_file(tmp_path / "gone.pth", "model.some_ckpt")
    (tmp_path / "here.pth").write_bytes(b"")
    assert given_file(str(tmp_path / "here.pth"), "model.some_ckpt") == tmp_path / "here.pth"


def test_a_lock_is_released_by_an_error(cache):
    with pytest.raises(RuntimeError, match="inside"), locked(cache / "x"):
        raise RuntimeError("inside")
    with locked(cache / "x"):
        assert (cache / "x.lock").exists()
