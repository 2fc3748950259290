"""Training in two real processes that torchrun starts, over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_task import SETTINGS, Fit, Points, make_trainer

from wavflow import checkpoint, parallel, sharded
from wavflow.errors import InputError
from wavflow.runlog import read_metrics
from wavflow.state import convert

HERE = Path(__file__).parent
DOUBLE = Points(dtype=torch.float64)


def start(
    processes: int, out: Path, job: str, restarts: int = 0, **options: object
) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += [str(HERE / "parallel_job.py"), str(out), job]
    command += [f"{key}={value}" for key, value in options.items()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def torchrun(processes: int, out: Path, job: str, **options: object) -> dict[str, torch.Tensor]:
    """What the first process left."""
    child = start(processes, out, job, **options)
    said = child.communicate(timeout=240)[1]
    assert child.returncode == 0, said
    return torch.load(out / f"{job}.pth", weights_only=True)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 difference of two sets of tensors."""
    assert list(found) == list(wanted)
    return max(((found[n] - w).norm() / w.norm()).item() for n, w in wanted.items())


def alone(out: Path, dtype: torch.dtype = torch.float64, **settings: object):
    """A trainer in this process."""
    given = replace(SETTINGS, **settings)
    return make_trainer(out, given, Fit(dtype=dtype), Points(dtype=dtype))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_gradients_are_those_of_the_joint_batch(tmp_path, strategy, dtype, bound) -> None:
    """Two processes, two micro-batches of 3 each, against one batch of 12."""
    options = {"strategy": strategy, "dtype": dtype, "batch_size": 3, "accumulation": 2}
    found = torchrun(2, tmp_path, "gradients", **options)
    run = alone(tmp_path / "alone", getattr(torch, dtype), batch_size=12)
    run.train_step(run.batches())
    wanted = {name: p.grad for name, p in run.model.named_parameters()}
    assert distance(found, wanted) < bound


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_whole_runs_agree_with_one_process(tmp_path: Path, strategy: str) -> None:
    """88 examples, 12 a step: the last step has 4 for four shares of 3. Clip 5 cannot be read."""
    found = torchrun(
        2, tmp_path, "train", strategy=strategy, batch_size=3, accumulation=2, missing=[5]
    )
    run = make_trainer(
        tmp_path / "alone",
        replace(SETTINGS, batch_size=12),
        Fit(dtype=torch.float64),
        Points(missing=(5,), dtype=torch.float64),
        validation=Points(5, dtype=torch.float64),
    )
    assert run.run().steps == 8
    wanted = {name: p.detach() for name, p in run.model.named_parameters()}
    assert distance(found, wanted) < 1e-9
    one, two = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("alone", "run"))
    assert [x["step"] for x in one] == [x["step"] for x in two] == [3, 6, 8, 8]
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "grad_norm", "lr", "val/loss", "val/loss_ema1"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-9)


def test_a_last_step_without_examples_for_some(tmp_path: Path) -> None:
    """One epoch of 22 examples, 21 a step: the second step has one, and one process none."""
    options = {"batch_size": 7, "accumulation": 3, "epochs": 1}
    run = alone(tmp_path / "alone", **(options | {"batch_size": 21, "accumulation": 1}))
    assert run.run().steps == 2
    wanted = {name: p.detach() for name, p in run.model.named_parameters()}
    found = torchrun(2, tmp_path, "train", **(options | {"batch_size": 21, "accumulation": 1}))
    assert distance(found, wanted) > 1e-3  # 42 a step: one step of 22
    (tmp_path / "run" / "checkpoint_latest.pth").unlink()
    found = torchrun(3, tmp_path, "train", **options | {"accumulation": 1})
    assert distance(found, wanted) < 1e-9


@pytest.mark.parametrize(("first", "second"), [("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")])
def test_runs_go_on_in_another_number_of_processes(tmp_path, first: str, second: str) -> None:
    """Two processes stop after 13 steps; one goes on, with the other strategy too."""
    if first == second:
        stopped, going = (2, {"batch_size": 2}), (3, {"batch_size": 2, "accumulation": 1})
        whole = alone(tmp_path / "alone", batch_size=4, epochs=4)
    else:
        stopped, going = (2, {"batch_size": 2}), (1, {"batch_size": 4})
        whole = alone(tmp_path / "alone", batch_size=4)
    constant = {"lr_schedule": "constant"}
    whole.settings = replace(whole.settings, **constant)
    torchrun(stopped[0], tmp_path, "train", strategy=first, max_steps=13, **stopped[1], **constant)
    left = tmp_path / "run" / ("checkpoint_latest" + ".pth" * (first == "ddp"))
    assert left.exists()
    found = torchrun(going[0], tmp_path, "train", strategy=second, **going[1], **constant)
    if going[0] == 1:
        whole.run()
        wanted = {name: p.detach() for name, p in whole.model.named_parameters()}
        assert distance(found, wanted) < 1e-9
    last = tmp_path / "run" / ("checkpoint_latest" + ".pth" * (second == "ddp"))
    meta = sharded.read_meta(last) if last.is_dir() else checkpoint.load(last)
    assert meta["position"] == 88 and meta["global_step"] == 13 + -(
        -36 // (4 if going[0] == 1 else 6)
    )


def test_shards_become_the_public_file(tmp_path: Path) -> None:
    torchrun(2, tmp_path, "train", strategy="fsdp", batch_size=2, dtype="float32")
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
    other = checkpoint.load(tmp_path / "third" / checkpoint.LATEST)
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
    (broken / sharded.WHOLE).unlink()
    with pytest.raises(InputError, match="the checkpoint is not whole"):
        convert(broken, tmp_path / "two.pth")


def test_a_dying_process_ends_the_job_with_its_error(tmp_path: Path) -> None:
    child = start(2, tmp_path, "dies", batch_size=2)
    said = child.communicate(timeout=120)[1]
    assert child.returncode != 0
    assert "job: the disk of the second machine is gone" in said


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    options = {"batch_size": 2, "epochs": 3000}
    child = start(2, tmp_path, "train", **options)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[1]
    assert time.monotonic() - begun < 30
    assert said.count("SIGTERM at step") == 2  # of both processes
    run = make_trainer(tmp_path / "run", SETTINGS, Fit(dtype=torch.float64), DOUBLE)
    assert run.resume() and run.step > 0


def test_one_process_needs_no_group() -> None:
    with parallel.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    with parallel.join("cpu", group=True) as world:
        assert torch.distributed.is_initialized() and world.gather(3) == [3]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_wavflow_in_two_processes_is_wavflow_in_one(tmp_path: Path, strategy: str) -> None:
    """`torchrun -m wavflow.train`: the same gradients as one process with the joint batch."""
    from wavflow.data.toy import write_toy_world
    from wavflow.features.extract import extract

    write_toy_world(tmp_path / "toy", 10, 5, heldout=0, workers=1)
    table = extract(tmp_path / "toy/train.csv", tmp_path / "features", workers=0).csv
    rates = {}
    for processes, batch in ((1, 4), (2, 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "wavflow.train", "--config", "toy_8k"]
        command += ["model.hidden_dim=32", "model.depth=2", "model.fused_depth=1"]
        command += ["model.num_heads=1", f"training.batch_size={batch}", "training.max_steps=4"]
        command += ["training.log_freq=1", "training.dtype=float32", "training.num_workers=1"]
        command += [f"data.csv_path={table}", f"training.output_dir={tmp_path / str(processes)}"]
        command += [f"training.strategy={strategy}", "training.tensorboard=false"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(" steps, ") == 1  # one process speaks
        rates[processes] = read_metrics(tmp_path / str(processes) / "toy_8k/metrics.jsonl")
    for one, two in zip(rates[1], rates[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_torchrun_starts_a_killed_process_anew(tmp_path: Path) -> None:
    """`--max-restarts`: the second process kills itself once; the run ends as if it had not."""
    found = torchrun(2, tmp_path, "falls once", restarts=1, batch_size=2)
    run = alone(tmp_path / "alone", batch_size=4)
    run.run()
    wanted = {name: p.detach() for name, p in run.model.named_parameters()}
    assert (tmp_path / "fell").exists() and distance(found, wanted) < 1e-9
