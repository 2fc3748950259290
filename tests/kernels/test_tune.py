"""Tuning's logic, with a made-up op and clock: what is tried, kept, left out and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wavflow_kernels import _tuned
from wavflow_kernels.tools import tune
from wavflow_kernels.tools.timing import Timing, interleaved

CPU = torch.device("cpu")
ABOUT = {"device": "gpu", "torch": "2.13", "triton": "3.9"}
COSTS = {"library": 50.0, 16: 70.0, 32: 30.0, 64: 40.0, 128: 90.0}  # by tile size


class Doubling:
    """An op that doubles; its tile size decides what the fake timer reads."""

    name = "doubling"
    supported = {
        "triton": {"cpu": frozenset({torch.float32}), "cuda": frozenset({torch.float32})},
        "library": {"cpu": frozenset({torch.float32})},
    }
    workloads: Mapping[str, Any] = {
        "short": lambda device, dtype: (torch.ones(8, device=device, dtype=dtype),),
        "long": lambda device, dtype: (torch.ones(12, device=device, dtype=dtype),),
    }

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def first(self, args: Any) -> Tensor:
        return args[0]

    def __call__(self, x: Tensor) -> Tensor:
        row = _tuned.lookup(self.name, x.device, "16 elements")
        tile = "library"
        if row["backend"] == "triton":
            tile = _tuned.lookup(self.name, x.device, f"launcher {len(x)}")["config"]["tile"]
        self.ran.append(tile)
        if tile == 256:
            raise RuntimeError("out of shared memory\nmore")
        return x * (2 if tile != 512 else 3)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    op = Doubling()
    monkeypatch.setattr(tune._backend, "unavailable", lambda *_: "")
    tiles = (16, 32, 64, 128, 256, 512)
    monkeypatch.setattr(tune, "candidates_of", lambda _: lambda x: [{"tile": t} for t in tiles])
    return op


def timer_of(op: Doubling, costs: Mapping[Any, float] = COSTS) -> tune.Timer:
    def timer(calls: Mapping[str, Callable[[], object]], _: float) -> dict[str, Timing]:
        found = {}
        for name, call in calls.items():
            call()
            cost = costs[op.ran[-1]] * 1e-6
            found[name] = Timing(cost, cost, cost)
        return found

    return timer


def test_the_fastest_configuration_wins_and_broken_ones_are_left_out(
    op: Doubling, tmp_path: Path
) -> None:
    path = tmp_path / "tuned" / "gpu.json"
    todo = tune.tasks([op], [torch.float32])
    assert [task.workload for task in todo] == ["short", "long"]
    done = list(tune.tune(todo, CPU, path, ABOUT, timer_of(op), seconds=60))
    for _, found in done:
        assert (found.tried, found.offered) == (4, 6)
        assert len(found.notes) == 2
        assert "out of shared memory" in found.notes[0] and "\n" not in found.notes[0]
        assert "wrong result, off by 0.5" in found.notes[1]
        assert tune.LIBRARY in found.seconds and len(found.seconds) == 3
    written = json.loads(path.read_text())
    wanted = {"backend": "triton", "us": {"triton": 30.0, "library": 50.0}, "config": {"tile": 32}}
    assert {name: written[name] for name in ABOUT} == ABOUT
    assert written["ops"] == {
        "doubling": {"16 elements": wanted, "launcher 12": wanted, "launcher 8": wanted}
    }
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]
    assert not _tuned._trial and not _tuned._asked


def test_a_library_that_wins_leaves_the_best_configuration_for_those_who_ask(
    op: Doubling, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    todo = tune.tasks([op], [torch.float32])[:1]
    list(tune.tune(todo, CPU, path, ABOUT, timer_of(op, {**COSTS, "library": 1.0}), seconds=60))
    row = json.loads(path.read_text())["ops"]["doubling"]["16 elements"]
    assert row["backend"] == "library" and row["config"] == {"tile": 32}


def test_workloads_that_share_a_key_share_the_choice() -> None:
    def way(tile: int) -> str:
        return json.dumps({"backend": "triton", "config": {"tile": tile}})

    first = tune.Measured(seconds={way(16): 1.0, way(32): 1.2, tune.LIBRARY: 9.0})
    second = tune.Measured(seconds={way(16): 4.0, way(32): 2.0, tune.LIBRARY: 9.0, way(64): 1.9})
    assert tune.winner([first])["config"] == {"tile": 16}
    assert tune.winner([first, second])["config"] == {"tile": 32}


def test_the_budget_ends_it_and_says_so(op: Doubling, tmp_path: Path) -> None:
    now = iter(range(0, 1000, 5))
    todo = tune.tasks([op], [torch.float32])
    done = list(
        tune.tune(todo, CPU, tmp_path / "gpu.json", ABOUT, timer_of(op), 30, lambda: next(now))
    )
    assert 1 <= done[0][1].tried < 4
    assert done[1][1] is None
    assert tune._line(*done[1]) == "doubling, long, float32: skipped, the time was up"
    assert (tmp_path / "gpu.json").exists()


def test_rows_of_the_same_versions_are_kept_and_others_dropped(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tune.write(path, ABOUT, {"a": {"x": {"backend": "triton"}}})
    tune.write(path, ABOUT, {"a": {"y": {"backend": "library"}}, "b": {}})
    assert json.loads(path.read_text())["ops"]["a"] == {
        "x": {"backend": "triton"},
        "y": {"backend": "library"},
    }
    tune.write(path, {**ABOUT, "triton": "4.0"}, {"a": {"z": {"backend": "triton"}}})
    assert list(json.loads(path.read_text())["ops"]["a"]) == ["z"]


def test_the_package_reads_what_tuning_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    _tuned.table.cache_clear()
    row = {"backend": "triton", "config": {"tile": 32}}
    tune.write(tmp_path / "nvidia-h100-80gb-hbm3.json", ABOUT, {"doubling": {"16": row}})
    try:
        assert _tuned.lookup("doubling", torch.device("cuda", 0), "16") == row
        assert _tuned.lookup("doubling", torch.device("cuda", 0), "32") == {}
        assert _tuned.lookup("doubling", CPU, "16") == {}
    finally:
        _tuned.table.cache_clear()


def test_every_tunable_op_offers_configurations_for_its_workloads() -> None:
    pytest.importorskip("triton")
    for task in tune.tasks(list(tune.REGISTRY.values()), [torch.bfloat16]):
        args = task.op.workloads[task.workload](torch.device("meta"), task.dtype)
        offered = tune.candidates_of(task.op)(*args)
        assert len(offered) > 1, f"{task}: nothing to choose from"
        assert json.loads(json.dumps(offered)) == offered


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ops": ["nix"]}, "no op 'nix'; there are "),
        ({"dtype": ["int8"]}, "--dtype is 'int8', wanted bfloat16, float16 or float32"),
        ({"device": "cpu"}, "--device is 'cpu', wanted cuda or cuda:N"),
        ({"device": "gpu7"}, "--device: "),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        tune.main(**{"ops": None, "dtype": None, "device": "cuda", "seconds": 1.0, **arguments})
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.startswith(f"wavflow_kernels.tools.tune: {message}")
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        tune.main(device="cuda", seconds=1.0)
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert "CUDA" in said or "triton is not installed" in said


def test_calls_take_turns_and_reset_is_not_timed() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, CPU, 0.0, warmup=1, rounds=3, reset=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 1 + "-a-b" * 3
    assert set(times) == {"a", "b"}
    assert all(t.low <= t.median <= t.high for t in times.values())


def test_tables_of_other_gpus_can_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"backend": "triton", "config": {"BLOCK": 64}}
    for name, capability in (("h100", [9, 0]), ("a100", [8, 0])):
        table = {"device": name, "capability": capability, "ops": {"op": {"key": row}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    (rows,) = _tuned.tables((9, 0))
    meta = torch.device("meta")
    with _tuned.pretending(rows):
        assert _tuned.lookup("op", meta, "key") == row
        assert _tuned.lookup("op", meta, "other") == {}
    assert _tuned.lookup("op", meta, "key") == {}
    assert _tuned.tables((10, 0)) == []
