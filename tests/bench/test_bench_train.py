"""The benchmark of training: the plain way's step is ours, and what a row holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.golden_weights import relative_error
from torch import Tensor

from bench import machine, plain, train
from bench.data import clips, write_clips
from wavflow.base.seeding import Draw
from wavflow.systems.wavflow.objective import WavflowObjective
from wavflow_kernels import philox_normal

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path: Path) -> train.Job:
    return train.Job("toy_8k", 2, "cpu", "float32", tmp_path)


def test_the_plain_training_step_is_ours(job: train.Job) -> None:
    """Loss and gradients, on the same noise and times."""
    config = job.config(label_drop_prob=0.0)
    batch, model = clips(config.data, 2, CPU), train.network(config, CPU)
    draw = Draw(0, [0, 1])
    terms = WavflowObjective(config).loss(model, batch, draw)
    terms.values.sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    noise = philox_normal(draw.seeds, config.data.latent_seq_len, config.data.audio_dim)
    values = plain.loss(model, config, batch, terms.t, noise)
    torch.testing.assert_close(values, terms.values, rtol=1e-4, atol=0)
    values.sum().backward()
    theirs = [p.grad for p in model.parameters() if p.requires_grad]
    assert relative_error(flat(ours), flat(theirs)) < 1e-4


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_steps_of_both_ways_move_the_weights(job: train.Job) -> None:
    config = job.config()
    batch = clips(config.data, 2, CPU)
    step, trainer = train.our_step(job, batch)
    ours, usual = trainer.model, train.network(config, CPU)
    before = flat(list(usual.parameters()))
    assert torch.equal(flat(list(ours.parameters())), before)
    step()
    plain.training_step(usual, config, batch, torch.float32)()
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert rate > 0
    for model, most in ((ours, rate), (usual, config.training.peak_lr())):
        moved = (flat(list(model.parameters())) - before).abs()
        assert 0 < moved.max() < 2 * most


def test_losses_that_disagree_end_the_benchmark(
    job: train.Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job.config()
    given = train.network(config, CPU), clips(config.data, 2, CPU)
    losses = train.compare(job, *given).losses
    assert losses["ours"] == pytest.approx(losses["float32"], rel=1e-4)
    usual = plain.loss
    monkeypatch.setattr(plain, "loss", lambda *args: 1.01 * usual(*args))
    with pytest.raises(SystemExit):
        train.compare(job, *given)
    assert "the loss is" in capsys.readouterr().err


def test_the_loader_is_part_of_the_trainers_time(job: train.Job, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = write_clips(tmp_path / "data", job.config().data, 4)
    found = train.loading(job, table, 2)
    assert found["clips"] == 4 and found["workers"] == 2
    assert 0 <= found["waited"] <= 1 and found["clips_a_second"] > 0


@pytest.mark.slow
def test_train_measures_a_step_against_another_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    train.main(
        model="toy_8k",
        device="cpu",
        dtype="float32",
        batch=2,
        seconds=0.001,
        compiled=False,
        against=machine.ROOT,
        data=None,
        json_path=out,
    )
    row = json.loads(out.read_text())
    other = str(machine.ROOT)
    assert set(row["seconds"]) == set(row["mfu"]) == {"ours", "plain", other}
    for way in ("plain", other, "float32"):
        assert row["losses"][way] == pytest.approx(row["losses"]["ours"], rel=1e-4)
    assert all(0 < share < 2 for share in row["mfu"].values())
    assert row["flops"] > 1e9 and row["memory"].keys() == {"ours", "plain"}
    printed = capsys.readouterr().out
    assert "clips/s" in printed and "GFLOP a step" in printed


def test_train_refuses_what_it_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, job: train.Job
) -> None:
    for options, message in (
        ({"model": "huge"}, "--model is 'huge'"),
        ({"dtype": "float16"}, "--dtype is 'float16', wanted bfloat16 or float32"),
        ({"device": "tpu"}, "--device tpu cannot be used"),
        ({"against": Path("/nowhere")}, "it has no folder wavflow"),
        ({"data": Path("/nowhere")}, "no such file or folder"),
    ):
        with pytest.raises(SystemExit):
            train.main(**options)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(train, "free_memory", lambda device: 10**6)
    with pytest.raises(SystemExit):
        train.check_memory(job, 2)
    assert "2 ways of 3 M parameters need 0 GB" in capsys.readouterr().err
