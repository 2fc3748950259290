"""The profile of a training and of a sampling step."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import profile
from bench.stages import PARTS
from bench.train import Job


@dataclass
class Event:
    key: str
    count: int
    cpu_time_total: float
    self_cpu_time_total: float
    is_user_annotation: bool = False


def test_parts_and_operations_are_of_one_step() -> None:
    """Two steps of 1 s: 0.6 s of a part's operation, 0.3 s of backward, the rest Python."""
    backward = "autograd::engine::evaluate_function: MulBackward0"
    events = [
        Event("step", 2, 2e6, 0.15e6, is_user_annotation=True),
        Event(PARTS[0], 4, 1.2e6, 0.05e6, is_user_annotation=True),
        Event("aten::mm", 8, 1.15e6, 1.15e6),
        Event(backward, 2, 0.6e6, 0.6e6),
    ]
    found = profile.lines(events, 2, "cpu_time_total", "self_cpu_time_total")
    parts = {line.name: line for line in found["parts"]}
    assert [*parts] == [PARTS[0], "backward", "the rest"]
    assert parts[PARTS[0]] == profile.Line(PARTS[0], 0.6, 0.6, 2)
    assert parts["the rest"].seconds == pytest.approx(0.1)
    ops = {line.name: line.seconds for line in found["operations"]}
    assert [*ops] == ["aten::mm", backward, profile.PYTHON]
    assert ops == pytest.approx({"aten::mm": 0.575, backward: 0.3, profile.PYTHON: 0.1})


def test_both_steps_are_profiled(tmp_path: Path) -> None:
    job = Job("toy_8k", 1, "cpu", "float32", tmp_path)
    wanted = {"train": {*PARTS, "backward", "optimizer"}, "sample": {*PARTS}}
    ops = {"train": "wavflow::flow_loss_backward", "sample": "wavflow::rope_attention"}
    for name, made in (("train", profile.training(job)), ("sample", profile.sampling(job, 4.5))):
        trace = tmp_path / f"{name}.json.gz"
        found = profile.profiled(*made, 1, trace)
        assert {line.name for line in found["parts"]} == wanted[name] | {"the rest"}
        assert sum(line.share for line in found["parts"]) == pytest.approx(1, abs=0.01)
        # Every moment of a step is one operation's: nothing is counted twice.
        assert sum(line.share for line in found["operations"]) == pytest.approx(1, abs=0.05)
        assert ops[name] in {line.name for line in found["operations"]}
        names = {
            event.get("name")
            for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        }
        assert {profile.STEP, *PARTS} <= names


def test_what_cannot_be_profiled_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        profile.main(model="small_16k")
    assert "--model is 'small_16k', wanted one of" in capsys.readouterr().err
