"""`wavflow train` in real processes that are killed, run out of disk, or are told to stop."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.forked import Command

from wavflow.base import state_dict
from wavflow.training import checkpoint
from wavflow.training.run_log import read_metrics

TIMING = ("clips_per_second", "data_wait", "memory_gb", "seconds", "mfu")
STEPS = 24
SETTINGS = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "training.batch_size=4",
    "training.accumulation=2",
    "training.warmup_steps=2",
    "training.log_freq=1",
    "training.num_workers=1",
    "training.epochs=1000",
    f"training.max_steps={STEPS}",
    "training.checkpoint_freq=2",
    "training.val_steps=5",
    "training.tensorboard=false",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    from wavflow.features.extract import extract
    from wavflow.toy.world import write_toy_world

    root = tmp_path_factory.mktemp("toy")
    write_toy_world(root / "toy", 10, 5, heldout=0, workers=1)
    return extract(root / "toy/train.csv", root / "features", workers=0).csv


def arguments(table: Path, out: Path) -> list[str]:
    given = ["train", "--config", "toy_8k", *SETTINGS]
    given += [f"data.csv_path={table}", f"data.val_csv_path={table}"]
    return [*given, f"training.output_dir={out}"]


def start(table: Path, out: Path, limit: int | None = None) -> Command:
    return Command(arguments(table, out), out / "said.txt", limit)


def finish(child: Command, code: int = 0) -> str:
    found, said = child.wait(), child.said.read_text()
    assert found == code, said
    return said


@pytest.fixture(scope="module")
def unbroken(table: Path, tmp_path_factory) -> Path:
    """`python -m wavflow` as people start it."""
    out = tmp_path_factory.mktemp("unbroken")
    command = [sys.executable, "-m", "wavflow", *arguments(table, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / "toy_8k"


def assert_same(run: Path, wanted: Path) -> None:
    """The whole loss sequence, and all weights, averages and moments, bit for bit."""
    one, two = (state_dict.load(folder / checkpoint.LATEST) for folder in (run, wanted))
    for part in ("model", "model_ema1", "model_ema2"):
        assert all(torch.equal(one[part][name], value) for name, value in two[part].items())
    for index, state in two["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(one["optimizer"]["state"][index][key], value)
    lines = (
        [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(path)]
        for path in (run / "metrics.jsonl", wanted / "metrics.jsonl")
    )
    assert next(lines) == next(lines)


def wait_for(child: Command, ready: Callable[[], bool], poll: float = 0.002) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert child.running() and time.monotonic() < deadline, child.said.read_text()
        time.sleep(poll)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_at_random_steps_it_ends_as_if_unbroken(table, unbroken, tmp_path) -> None:
    """Three kills, at steps drawn by a generator; the same command goes on each time."""
    run = tmp_path / "toy_8k"
    kills = sorted(random.Random(3).sample(range(1, STEPS), 3))
    for step in kills:
        child = start(table, tmp_path)
        wait_for(child, lambda step=step: steps(run) >= step)
        time.sleep(random.Random(step).random() * 0.1)
        child.send(signal.SIGKILL)
        child.wait()
    said = finish(start(table, tmp_path))
    assert "resumed" in said
    assert_same(run, unbroken)


def test_killed_while_it_writes_a_checkpoint(table, unbroken, tmp_path) -> None:
    run = tmp_path / "toy_8k"
    torn: set[Path] = set()

    def half_written() -> set[Path]:
        return {p for p in run.glob(".*.tmp") if p not in torn and p.stat().st_size > 10_000}

    for _ in range(8):
        child = start(table, tmp_path)
        try:
            wait_for(child, half_written, poll=0)
        except FileNotFoundError:  # renamed between two looks at it
            pass
        child.send(signal.SIGKILL)
        child.wait()
        torn |= half_written()
        if len(torn) == 2:
            break
    assert len(torn) == 2, "no kill hit the write of a checkpoint"
    finish(start(table, tmp_path))
    assert not any(run.glob(".*.tmp"))
    assert_same(run, unbroken)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_within_seconds(table, unbroken, tmp_path, signum) -> None:
    run = tmp_path / "toy_8k"
    child = start(table, tmp_path)
    wait_for(child, lambda: steps(run) >= 5)
    begun = time.monotonic()
    child.send(signum)
    said = finish(child, 128 + signum)
    assert time.monotonic() - begun < 10
    assert "Traceback" not in said and "the same command goes on" in said
    assert 5 <= state_dict.load(run / checkpoint.LATEST)["global_step"] < STEPS
    finish(start(table, tmp_path))
    assert_same(run, unbroken)


def test_a_full_disk_leaves_the_last_checkpoint(table, unbroken, tmp_path) -> None:
    """The second half of a checkpoint does not fit: no file may grow beyond a limit."""
    run = tmp_path / "toy_8k"
    child = start(table, tmp_path)
    wait_for(child, (run / checkpoint.LATEST).exists)
    child.send(signal.SIGKILL)
    child.wait()
    before = (run / checkpoint.LATEST).read_bytes()
    said = finish(start(table, tmp_path, limit=len(before) // 2), 2)
    assert "checkpoint_latest.pth: not written, nothing was changed" in said
    assert "Traceback" not in said
    assert (run / checkpoint.LATEST).read_bytes() == before
    finish(start(table, tmp_path))
    assert_same(run, unbroken)
