"""Training in two real processes that torchrun starts, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.paths import PYTHONPATH, TESTS
from support.toy_task import ALONE, SETTINGS, Fit, Points, make_trainer

from wavflow.base import processes, state_dict
from wavflow.base.errors import InputError
from wavflow.base.processes import World
from wavflow.training import checkpoint, parallel, sharded_checkpoint
from wavflow.training.run_log import read_metrics
from wavflow.training.run_state import convert
from wavflow.training.trainer import Trainer


def start(processes: int, out: Path, *jobs: dict[str, object], restarts: int = 0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += [str(TESTS / "support/parallel_job.py"), str(out), json.dumps(jobs)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def torchrun(processes: int, out: Path, *jobs: dict[str, object], **options: int) -> None:
    child = start(processes, out, *jobs, **options)
    said = child.communicate(timeout=240)[1]
    assert child.returncode == 0, said


def left(folder: Path) -> dict[str, torch.Tensor]:
    """What the first process left of a job."""
    return torch.load(folder / "weights.pth", weights_only=True)


GRADIENTS = {"kind": "gradients", "batch_size": 3, "accumulation": 2}
STOPPED = {"kind": "train", "batch_size": 2, "max_steps": 13, "lr_schedule": "constant"}
OF_TWO = [
    *(
        {"name": f"gradients {strategy} {dtype}", "strategy": strategy, "dtype": dtype, **GRADIENTS}
        for strategy in ("ddp", "fsdp")
        for dtype in ("float64", "float32")
    ),
    *(
        {"name": f"whole {strategy}", "strategy": strategy, "kind": "train", "missing": [5]}
        | {"batch_size": 3, "accumulation": 2}
        for strategy in ("ddp", "fsdp")
    ),
    {"name": "shards", "kind": "train", "strategy": "fsdp", "batch_size": 2, "dtype": "float32"},
    *(
        {"name": name, "strategy": strategy, **STOPPED}
        for name, strategy in (
            ("fsdp to ddp", "fsdp"),
            ("ddp to fsdp", "ddp"),
            ("fsdp to fsdp", "fsdp"),
        )
    ),
]
OF_THREE = [
    {"name": "last step", "kind": "train", "batch_size": 7, "epochs": 1},
    {"name": "fsdp to fsdp", "strategy": "fsdp", **STOPPED, "max_steps": None},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of jobs that two processes did, and then three."""
    out = tmp_path_factory.mktemp("done")
    torchrun(2, out, *OF_TWO)
    assert (out / "fsdp to fsdp/run/checkpoint_latest").is_dir()
    torchrun(3, out, *OF_THREE)
    return out


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 difference of two sets of tensors."""
    assert list(found) == list(wanted)
    return max(((found[n] - w).norm() / w.norm()).item() for n, w in wanted.items())


def alone(
    out: Path, dtype: torch.dtype = torch.float64, world: World = ALONE, **settings: object
) -> Trainer:
    """A trainer in this process."""
    given = replace(SETTINGS, **settings)
    return make_trainer(out, given, Fit(dtype=dtype), Points(dtype=dtype), world)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters()}


def position(checkpoint_path: Path) -> tuple[int, int]:
    """Examples seen and steps taken."""
    folder = checkpoint_path.is_dir()
    meta = (
        sharded_checkpoint.read_meta(checkpoint_path)
        if folder
        else state_dict.load(checkpoint_path)
    )
    return meta["position"], meta["global_step"]


LATEST = {"ddp": checkpoint.LATEST, "fsdp": "checkpoint_latest"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_gradients_are_those_of_the_joint_batch(tmp_path, done, strategy, dtype, bound) -> None:
    """Two processes, two micro-batches of 3 each, against one batch of 12."""
    found = left(done / f"gradients {strategy} {dtype}")
    run = alone(tmp_path / "alone", getattr(torch, dtype), batch_size=12)
    run.train_step(run.batches())
    wanted = {name: p.grad for name, p in run.model.named_parameters()}
    assert distance(found, wanted) < bound


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_whole_runs_agree_with_one_process(tmp_path: Path, done: Path, strategy: str) -> None:
    """88 examples, 12 a step: the last step has 4 for four shares of 3. Clip 5 cannot be read."""
    there = done / f"whole {strategy}"
    found = left(there)
    run = make_trainer(
        tmp_path / "alone",
        replace(SETTINGS, batch_size=12),
        Fit(dtype=torch.float64),
        Points(missing=(5,), dtype=torch.float64),
        validation=Points(5, dtype=torch.float64),
    )
    assert run.run().steps == 8
    assert distance(found, weights(run)) < 1e-9
    one, two = (read_metrics(d / "metrics.jsonl") for d in (tmp_path / "alone", there / "run"))
    assert [x["step"] for x in one] == [x["step"] for x in two] == [3, 6, 8, 8]
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "grad_norm", "lr", "val/loss", "val/loss_ema1"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-9)


def test_a_last_step_without_examples_for_some(tmp_path: Path, done: Path) -> None:
    """One epoch of 22 examples, 21 a step: the second step has one, and two processes none."""
    run = alone(tmp_path / "alone", batch_size=21, epochs=1)
    assert run.run().steps == 2
    found = left(done / "last step")
    assert distance(found, weights(run)) < 1e-9
    run = alone(tmp_path / "one step", batch_size=42, epochs=1)
    assert run.run().steps == 1
    assert distance(found, weights(run)) > 1e-3


@pytest.mark.parametrize(("first", "second"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_one_process_goes_on(tmp_path: Path, done: Path, first: str, second: str) -> None:
    """Two processes stopped after 13 steps; one goes on, with the other strategy."""
    shutil.copytree(done / f"{first} to {second}", tmp_path, dirs_exist_ok=True)
    settings = {"batch_size": 4, "lr_schedule": "constant"}
    whole = alone(tmp_path / "alone", **settings)
    whole.run()
    assert (tmp_path / "run" / LATEST[first]).exists()
    with processes.join("cpu", group=True) as world:
        going = alone(tmp_path / "run", strategy=second, world=world, **settings)
        assert going.resume() and going.step == 13
        going.run()
        found = {n: parallel.whole(p.detach()) for n, p in going.model.named_parameters()}
        assert distance(found, weights(whole)) < 1e-9
    assert position(tmp_path / "run" / LATEST[second]) == (88, 13 + 36 // 4)


def test_three_processes_go_on_where_two_stopped(done: Path) -> None:
    assert position(done / "fsdp to fsdp/run" / LATEST["fsdp"]) == (88, 13 + 36 // 6)


def test_shards_become_the_public_file(tmp_path: Path, done: Path) -> None:
    shutil.copytree(done / "shards", tmp_path, dirs_exist_ok=True)
    out = tmp_path / "one.pth"
    convert(tmp_path / "run" / "checkpoint_latest", out)
    content = checkpoint.load_training(out)
    run = alone(tmp_path / "other", torch.float32)
    assert list(content["model"]) == list(run.model.state_dict())
    assert list(content["model_ema1"]) == [name for name, _ in run.model.named_parameters()]
    torch.optim.AdamW(run.optimizer.param_groups).load_state_dict(content["optimizer"])
    run.restore(out)
    assert (run.step, run.position) == (22, 88)
    reference = alone(tmp_path / "third", torch.float32)
    reference.run()
    other = state_dict.load(tmp_path / "third" / checkpoint.LATEST)
    for part in ("model", "model_ema1", "model_ema2"):
        assert distance(content[part], other[part]) < 1e-4
    for index, state in other["optimizer"]["state"].items():
        assert state["exp_avg"].shape == content["optimizer"]["state"][index]["exp_avg"].shape

    broken = tmp_path / "run" / "checkpoint_latest"
    shard = next(broken.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match="its bytes are not those that were written"):
        convert(broken, tmp_path / "two.pth")
    (broken / sharded_checkpoint.END_MARK).unlink()
    with pytest.raises(InputError, match="the checkpoint is not whole"):
        convert(broken, tmp_path / "two.pth")


def test_a_dying_process_ends_the_job_with_its_error(tmp_path: Path) -> None:
    child = start(2, tmp_path, {"kind": "dies", "name": "dies", "batch_size": 2})
    said = child.communicate(timeout=120)[1]
    assert child.returncode != 0
    assert "job: the disk of the second machine is gone" in said


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    job = {"kind": "train", "name": "long", "batch_size": 2, "epochs": 3000}
    child = start(2, tmp_path, job)
    metrics = tmp_path / "long/run/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[1]
    assert time.monotonic() - begun < 30
    assert said.count("SIGTERM at step") == 2  # of both processes
    run = alone(tmp_path / "long/run")
    assert run.resume() and run.step > 0


def test_one_process_needs_no_group() -> None:
    with processes.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    with processes.join("cpu", group=True) as world:
        assert torch.distributed.is_initialized() and world.gather(3) == [3]
    assert not torch.distributed.is_initialized()


def test_wavflow_in_two_processes_is_wavflow_in_one(tmp_path: Path) -> None:
    """`torchrun -m wavflow.train`: the same gradients as one process with the joint batch."""
    from wavflow.features.extract import extract
    from wavflow.toy.world import write_toy_world

    write_toy_world(tmp_path / "toy", 10, 5, heldout=0, workers=1)
    table = extract(tmp_path / "toy/train.csv", tmp_path / "features", workers=0).csv

    def losses(launcher: list[str], batch: int, strategy: str) -> list[dict]:
        out = tmp_path / f"{batch} {strategy}"
        command = [sys.executable, *launcher, "-m", "wavflow.train", "--config", "toy_8k"]
        command += ["model.hidden_dim=32", "model.depth=2", "model.fused_depth=1"]
        command += ["model.num_heads=1", f"training.batch_size={batch}", "training.max_steps=4"]
        command += ["training.log_freq=1", "training.dtype=float32", "training.num_workers=1"]
        command += [f"data.csv_path={table}", f"training.output_dir={out}"]
        command += [f"training.strategy={strategy}", "training.tensorboard=false"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(" steps, ") == 1  # one process speaks
        return read_metrics(out / "toy_8k/metrics.jsonl")

    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    wanted = losses([], 4, "ddp")
    for found in (losses(two, 2, "ddp"), losses(two, 2, "fsdp"), losses([], 4, "fsdp")):
        for one, both in zip(wanted, found, strict=True):
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_torchrun_starts_a_killed_process_anew(tmp_path: Path) -> None:
    """`--max-restarts`: the second process kills itself once; the run ends as if it had not."""
    there = tmp_path / "fell once"
    torchrun(2, tmp_path, {"kind": "falls once", "name": there.name, "batch_size": 2}, restarts=1)
    run = alone(tmp_path / "alone", batch_size=4)
    run.run()
    assert (there / "fell").exists() and distance(left(there), weights(run)) < 1e-9
