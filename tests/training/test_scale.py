"""Many clips through `wavflow extract` and `wavflow generate`, killed on the way, as processes."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wavflow.config.load import load_config
from wavflow.systems.wavflow.build import build_model
from wavflow.toy.world import write_toy_world
from wavflow.training import checkpoint

psutil = pytest.importorskip("psutil")

CLIPS, SECONDS = 500, 1.0
SETTINGS = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    f"data.audio_duration={SECONDS}",
    "data.clip_seq_len=8",
    "data.sync_seq_len=24",
]
#: The least memory in the last quarter of a process's rows is at most so many times the most in the
#: second: each row may leave 40 KB behind, no more.
GROWTH = 1.01


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_toy_world(root, CLIPS, 7, heldout=0, seconds=SECONDS, workers=2)
    return root / "train.csv"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained network for clips of that length."""
    config = load_config("toy_8k", SETTINGS)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    state = build_model(config).state_dict()
    content = {"model": state, "optimizer": {}, "epoch": 1, "global_step": 1}
    checkpoint.save(path, {**content, "config": config.to_dict()})
    return path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Job:
    """A command that writes one file a row, `<folder>/<id><suffix>`."""

    def __init__(self, command: list[str], folder: Path, suffix: str) -> None:
        self.command = [sys.executable, "-m", "wavflow", *command]
        self.folder, self.suffix = folder, suffix
        self.said = folder.parent / "said.txt"

    def start(self) -> subprocess.Popen:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.said, "w") as said:
            return subprocess.Popen(self.command, env=env, stdout=said, stderr=said)

    def rows(self) -> int:
        return sum(entry.name.endswith(self.suffix) for entry in os.scandir(self.folder))

    def files(self) -> dict[str, tuple[int, int]]:
        """Inode and time of change of the file of every finished row, by id."""
        found = ((path, path.stat()) for path in self.folder.glob(f"*{self.suffix}"))
        return {path.stem: (stat.st_ino, stat.st_mtime_ns) for path, stat in found}

    def watch(self, child: subprocess.Popen) -> Iterator[int]:
        """The rows that are finished, many times a second, as long as the process lives."""
        deadline = time.monotonic() + 300
        while child.poll() is None:
            assert time.monotonic() < deadline
            yield self.rows()
            time.sleep(0.02)

    def kill_at(self, rows: int, delay: float) -> None:
        """Starts the job and kills it so many seconds after that many rows."""
        child = self.start()
        for finished in self.watch(child):
            if finished >= rows:
                break
        time.sleep(delay)
        assert child.poll() is None, self.said.read_text()
        child.send_signal(signal.SIGKILL)
        child.wait()

    def finish(self) -> dict[int, list[list[int]]]:
        """Runs the job to its end; bytes of memory, by process and quarter of its rows."""
        child, begun = self.start(), self.rows()
        memory: dict[int, list[list[int]]] = {}
        for finished in self.watch(child):
            if not begun < finished < CLIPS:  # it starts, or it ends and gives memory back
                continue
            quarter = 4 * (finished - begun) // (CLIPS - begun)
            for process, size in sizes(child.pid).items():
                memory.setdefault(process, [[], [], [], []])[quarter].append(size)
        assert child.returncode == 0, self.said.read_text()
        return memory


def sizes(pid: int) -> dict[int, int]:
    """Resident bytes of a process and of its descendants, without those that are just ending."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            found[process.pid] = process.memory_info().rss
    return {process: size for process, size in found.items() if size}


def interrupted(job: Job, dice: random.Random) -> set[str]:
    """Kills the job twice at a random row and moment, runs it to its end; ids done before."""
    for first, last in ((CLIPS // 20, CLIPS // 8), (CLIPS // 6, CLIPS // 4)):
        job.kill_at(dice.randrange(first, last), dice.random() * 0.1)
    before = job.files()
    assert 0 < len(before) < CLIPS
    memory = job.finish()
    after = job.files()
    assert len(after) == CLIPS and {id: after[id] for id in before} == before
    assert not list(job.folder.parent.rglob("*.tmp"))
    lasting = [quarters for quarters in memory.values() if all(quarters)]
    assert len(lasting) > 1  # the job and a process that decodes
    for _, second, _, last in lasting:
        assert min(last) <= GROWTH * max(second)
    return set(before)


def test_killed_twice_every_row_is_done_once(table, weights, tmp_path) -> None:
    dice, ids = random.Random(0), [row["id"] for row in read(table)]
    out = tmp_path / "features"
    command = ["extract", "--csv", str(table), "--out", str(out), "--seconds", str(SECONDS)]
    kept = interrupted(Job(command, out / "features", ".pth"), dice)
    report = read(out / "report.csv")
    assert [row["id"] for row in report] == [row["id"] for row in read(out / "train.csv")] == ids
    assert {row["id"] for row in report if row["status"] == "skipped"} == kept
    assert {row["id"] for row in report if row["status"] == "ok"} == set(ids) - kept

    out = tmp_path / "generated" / "sounds"
    command = ["generate", "--csv", str(table), "--out", str(out), "--checkpoint", str(weights)]
    command += ["--solver", "euler", "--steps", "2", "--ema", "none"]
    kept = interrupted(Job(command, out, ".wav"), dice)
    report = read(out / "report.csv")
    assert [row["id"] for row in report] == ids
    assert {row["status"] for row in report} == {"ok"}
    assert {row["id"] for row in report if row["reason"] == "was there"} == kept
    assert {path.stem for path in out.glob("*.json")} == set(ids)
