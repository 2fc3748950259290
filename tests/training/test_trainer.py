"""The trainer, with a task that trains in milliseconds."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.toy_task import SETTINGS, Fit, Points, make_trainer
from torch import nn

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.training import checkpoint, run_log
from wavflow.training.dry_run import dry_run
from wavflow.training.ema import Ema
from wavflow.training.optimizer import make_optimizer
from wavflow.training.run_log import read_metrics
from wavflow.training.step_figures import Pace
from wavflow.training.trainer import Trainer, loss_text


def at_step(step: int, do: Callable[[], None]) -> Fit:
    """The task, which does something while step number `step` takes its loss."""
    first = step * SETTINGS.batch_size
    return Fit(lambda draw: do() if draw.positions[0] == first and draw.seed else None)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def metrics(out: Path) -> list[dict]:
    timing = ("clips_per_second", "data_wait", "memory_gb", "seconds", "mfu")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(out)]


def all_metrics(out: Path) -> list[dict]:
    return metrics(out / "metrics.jsonl")


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, averages, optimiser and metrics are equal to the bit."""
    a, b = (state_dict.load(out / checkpoint.LATEST) for out in (one, two))
    for key in ("model", "model_ema1", "model_ema2"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for index, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name])
    assert all_metrics(one) == all_metrics(two)


def test_a_run_learns_and_leaves_its_files(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=60, checkpoint_save_epoch=20, ema_checkpoint_save_epoch=30)
    objective = Fit()
    trainer = make_trainer(tmp_path, settings, objective)
    result = trainer.run()
    assert (result.steps, result.epochs, result.parameters) == (330, 60, 41)
    assert result.loss < 0.1 * objective.losses[1].mean()
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint_latest.pth",
        "checkpoint_previous.pth",
        "checkpoint_epoch_20.pth",
        "checkpoint_epoch_40.pth",
        "checkpoint_epoch_60.pth",
        "ema_epoch_30.pth",
        "ema_epoch_60.pth",
        "training.log",
        "metrics.jsonl",
    }
    content = state_dict.load(result.checkpoint)
    assert {"model", "optimizer", "epoch", "global_step", "model_ema1", "model_ema2"} <= set(
        content
    )
    assert (content["epoch"], content["global_step"], content["ema_age"]) == (60, 330, 330)
    assert list(content["model_ema1"]) == [n for n, _ in trainer.model.named_parameters()]
    flat = checkpoint.read_weights(tmp_path / "ema_epoch_60.pth")
    state_dict.load_into(objective.build(), flat.state, "x")
    assert torch.equal(flat.state["blocks.0.weight"], content["model_ema1"]["blocks.0.weight"])
    lines = all_metrics(tmp_path)
    assert [x["step"] for x in lines] == list(range(3, 331, 3))
    assert all(any(key.startswith("loss_by_t/") for key in line) for line in lines)
    said = (tmp_path / "training.log").read_text()
    assert "41 parameters, 22 clips, 4 a step (batch 4, 1 processes, 1 accumulated)" in said


@pytest.mark.parametrize("stop", [1, 5, 7, 13])
def test_resume_is_exact_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole, broken, second = Fit(), at_step(stop, send(signal.SIGINT)), Fit()
    make_trainer(tmp_path / "whole", objective=whole).run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "broken", objective=broken).run()
    assert state_dict.load(tmp_path / "broken/checkpoint_latest.pth")["global_step"] == stop + 1
    run = make_trainer(tmp_path / "broken", objective=second)
    assert run.resume() and run.step == stop + 1
    run.run()
    # Each trainer takes the loss of one clip first, to count its operations.
    losses = [*broken.losses[1:], *second.losses[1:]]
    assert len(losses) == len(whole.losses[1:]) == 22
    assert all(torch.equal(a, b) for a, b in zip(losses, whole.losses[1:], strict=True))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_epochs_go_over_into_each_other(tmp_path: Path) -> None:
    seen = []
    make_trainer(tmp_path, objective=Fit(lambda draw: seen.extend(draw.positions))).run()
    assert seen[1:] == list(range(4 * 22))


def test_accumulation_changes_rounding_only(tmp_path: Path) -> None:
    weights = []
    for batch, accumulation in ((6, 1), (2, 3)):
        settings = replace(SETTINGS, batch_size=batch, accumulation=accumulation)
        objective = Fit(dtype=torch.float64)
        dataset = Points(dtype=torch.float64)
        run = make_trainer(tmp_path / str(batch), settings, objective, dataset)
        assert run.run().steps == 15
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert (weights[0] - weights[1]).norm() < 1e-10 * weights[0].norm()


def test_loader_threads_change_nothing(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 3):
        runs.append(Fit())
        make_trainer(
            tmp_path / str(workers), replace(SETTINGS, num_workers=workers), runs[-1]
        ).run()
    for a, b in zip(runs[0].losses, runs[1].losses, strict=True):
        assert torch.equal(a, b)


def test_signals_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_saves_and_leaves_with_143(tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    with pytest.raises(SystemExit) as caught:
        make_trainer(tmp_path, objective=at_step(4, twice)).run()
    assert caught.value.code == 143
    assert state_dict.load(tmp_path / checkpoint.LATEST)["global_step"] == 5


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as at a terminal: jobs in the background are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        noting = signal.getsignal(signal.SIGINT)
        send(signal.SIGINT)()
        while signal.getsignal(signal.SIGINT) == noting:  # two that come at once are one
            time.sleep(0.001)
        send(signal.SIGINT)()
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, objective=at_step(2, twice)).run()
    assert not (tmp_path / checkpoint.LATEST).exists()


def test_runs_in_a_thread(tmp_path: Path) -> None:
    steps = []
    worker = threading.Thread(target=lambda: steps.append(make_trainer(tmp_path).run().steps))
    worker.start()
    worker.join(60)
    assert steps == [22]


# What is not finite, what cannot be read


def test_steps_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=2)
    run = make_trainer(tmp_path, settings, dataset=Points(broken=(13, 17)))
    kept = {}

    def watch(position: int) -> None:
        kept[position] = [p.detach().clone() for p in run.model.parameters()]

    run.objective.each_step = lambda draw: watch(draw.positions[0])
    run.run()
    lines = [json.loads(x) for x in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line["clips"]} == {"clip13", "clip17"}
    assert 4 <= len(lines) <= 8 and all_metrics(tmp_path)[-1]["skipped_steps"] == len(lines)
    for line in lines:
        before, after = kept[2 * line["step"]], kept.get(2 * line["step"] + 2)
        if after is not None:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    good = 44 - len(lines)
    states = run.optimizer.state.values()
    assert all(state["step"].item() == good for state in states)
    assert all(line["loss"] is not None for line in all_metrics(tmp_path))


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    class Steep(Fit):
        def loss(self, model, batch, draw):
            terms = super().loss(model, batch, draw)
            return replace(terms, values=torch.sqrt(terms.values * 0))

    settings = replace(SETTINGS, max_bad_steps=5)
    with pytest.raises(InputError, match=r"the last 6 steps were not finite; .*bad_steps.jsonl"):
        make_trainer(tmp_path, settings, Steep()).run()
    lines = [json.loads(x) for x in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    # The gradient alone is infinite: no clip's loss is.
    assert [x["step"] for x in lines] == list(range(6)) and not any(x["clips"] for x in lines)


def test_bad_steps_in_a_row_are_counted_over_a_resume(tmp_path: Path) -> None:
    class Late(Fit):
        def loss(self, model, batch, draw):
            terms = super().loss(model, batch, draw)
            bad = float("nan") if draw.positions[0] >= 16 else 1.0
            return replace(terms, values=terms.values * bad)

    settings = replace(SETTINGS, max_bad_steps=4, max_steps=6)
    make_trainer(tmp_path, settings, Late()).run()
    run = make_trainer(tmp_path, replace(settings, max_steps=20), Late())
    assert run.resume() and run.recent.in_a_row == 2
    with pytest.raises(InputError, match="the last 5 steps"):
        run.run()


def test_clips_that_cannot_be_read_are_left_out(tmp_path: Path, caplog) -> None:
    class Without(Points):
        """Has no clip 5 in the first place: its draws and those of others stay as they are."""

        def load(self, indices, draw):
            loaded = super().load(indices, draw)
            loaded.batch.y[[i == 5 for i in indices]] = 1e6
            return replace(loaded, problems={p: "gone" for p, i in enumerate(indices) if i == 5})

    make_trainer(tmp_path / "a", dataset=Points(missing=(5,))).run()
    make_trainer(tmp_path / "b", dataset=Without()).run()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    said = [r.message for r in caplog.records if "clip5" in r.message]
    assert said == [
        "clip5 cannot be read any more and is left out: it is gone",
        "clip5 cannot be read any more and is left out: gone",
    ]
    assert all_metrics(tmp_path / "a")[-1]["unreadable_clips"] == 1


# Length and schedule


def test_lengths_of_a_run(tmp_path: Path) -> None:
    assert make_trainer(tmp_path / "a", replace(SETTINGS, max_steps=7)).run().steps == 7
    slow = Fit(lambda draw: time.sleep(0.02))
    settings = replace(SETTINGS, epochs=10**6, max_seconds=0.6, min_lr=1e-5)
    run = make_trainer(tmp_path / "b", settings, slow)
    result = run.run()
    assert 0.6 <= result.seconds < 1.5
    assert 5 <= result.steps <= 30
    assert run.learning_rate() == pytest.approx(1e-5)
    rates = [x["lr"] for x in all_metrics(tmp_path / "b")]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3 * SETTINGS.lr


def test_lines_hold_a_loss_once_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = []
    monkeypatch.setattr(run_log.RunLog, "progress", lambda self, *at: lines.append(at[-1]))
    caplog.set_level("INFO", "wavflow")
    result = make_trainer(tmp_path, replace(SETTINGS, max_steps=7)).run()
    known = ["loss" in line for line in lines]
    assert known == [False] * 2 + [True] * 5  # the first are told with step 3
    assert lines[0].startswith("step 1, ") and f"loss {result.loss:.4f}" in lines[-1]
    assert "nan" not in " ".join(lines) + caplog.text
    assert loss_text(float("nan")) == "" and loss_text(0.25) == ", loss 0.2500"


def test_learning_rate_schedules(tmp_path: Path) -> None:
    def rates(steps: int, **settings) -> list[float]:
        run = make_trainer(tmp_path, replace(SETTINGS, lr=1.0, **settings))
        found = []
        for _ in range(steps):
            found.append(run.learning_rate())
            run.step, run.position = run.step + 1, run.position + 4
        return found

    constant = rates(6, warmup_steps=4, lr_schedule="constant")
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = rates(23, warmup_steps=0, min_lr=0.2)
    assert (
        cosine[0] == 1.0 and cosine[11] == pytest.approx(0.6) and cosine[22] == pytest.approx(0.2)
    )
    steps = {"lr_schedule": "step", "lr_schedule_steps": [2, 3], "lr_schedule_gamma": 0.1}
    by_epoch = rates(22, warmup_steps=0, **steps)
    # An epoch has 22 clips, a step 4.
    assert by_epoch == pytest.approx([1.0] * 11 + [0.1] * 6 + [0.01] * 5)
    per_256 = replace(SETTINGS, lr=None, blr=0.64, batch_size=4, accumulation=2)
    assert per_256.peak_lr(processes=8) == pytest.approx(0.64 * 64 / 256)


def test_ema_follows_its_recursion() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    wanted = model.weight.detach().clone()
    for age in range(100):
        with torch.no_grad():
            model.weight.add_(0.1)
        ema.update(model, age)
        decay = min(0.9, (1 + age) / (10 + age))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.values["weight"], wanted)
    assert decay == 0.9


def test_optimizer_decays_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    flat, matrices = make_optimizer(model, replace(SETTINGS, weight_decay=0.3)).param_groups
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert (flat["weight_decay"], matrices["weight_decay"]) == (0, 0.3)
    assert len(flat["params"]) == 2 and matrices["betas"] == (0.9, 0.95)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    class Frozen(Fit):
        def build(self):
            model = super().build()
            model.blocks[0].requires_grad_(False)
            return model

    run = make_trainer(tmp_path, objective=Frozen())
    before = [p.detach().clone() for p in run.model.parameters()]
    run.run()
    same = [torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert same == [True, True, False, False]
    again = make_trainer(tmp_path, objective=Frozen())
    assert again.resume() and again.step == 22


# Randomness


def test_draws_depend_on_seed_and_position_alone() -> None:
    a = Draw(1, [3, 9])
    b = Draw(1, [9, 4, 3])
    for name in ("seeds", "t", "u"):
        one, two = (
            d.seeds if name == "seeds" else getattr(d, {"t": "normal", "u": "uniform"}[name])(name)
            for d in (a, b)
        )
        assert torch.equal(two[[2, 0]], one)
    many = torch.cat([Draw(s, range(1000)).seeds for s in range(3)])
    assert len(set(many.tolist())) == 3000 and bool((many >= 0).all())
    assert not torch.equal(a.uniform("x"), a.uniform("y"))


def test_draws_have_their_distributions() -> None:
    draw = Draw(5, range(20000))
    uniform, normal = draw.uniform("a"), draw.normal("b")
    assert bool(((uniform > 0) & (uniform < 1)).all())
    counts = torch.histc(uniform, 20, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 45  # chi-squared, 19 degrees: 0.9993
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack((draw.normal("a"), normal)))[0, 1]) < 0.03


# Checkpoints that do not fit or are not whole


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    whole = (tmp_path / checkpoint.LATEST).read_bytes()
    wide = make_trainer(tmp_path, objective=Fit(hidden=9))
    with pytest.raises(InputError, match=r"0\.weight is \(8, 3\); the model wants \(9, 3\)"):
        wide.resume()
    assert (tmp_path / checkpoint.LATEST).read_bytes() == whole


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another file"])
def test_a_broken_latest_gives_way_to_a_whole_previous(tmp_path: Path, damage, caplog) -> None:
    make_trainer(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", objective=at_step(12, send(signal.SIGINT))).run()
    latest = tmp_path / "run" / checkpoint.LATEST
    raw = bytearray(latest.read_bytes())
    raw[len(raw) // 2] ^= 4
    broken = {
        "truncated": bytes(raw[:-2000]),
        "flipped": bytes(raw),
        "empty": b"",
        "another file": b"not a checkpoint " * 1000,
    }[damage]
    latest.write_bytes(broken)
    run = make_trainer(tmp_path / "run")
    assert run.resume() and run.step < 13
    assert "not a whole checkpoint" in caplog.text
    assert (tmp_path / "run/checkpoint_latest.broken.pth").read_bytes() == broken
    run.run()
    assert_same_run(tmp_path / "whole", tmp_path / "run")

    previous = tmp_path / "run" / checkpoint.PREVIOUS
    latest.write_bytes(broken)
    previous.write_bytes(broken)
    with pytest.raises(InputError, match=r"checkpoint_previous\.pth: not a whole checkpoint"):
        make_trainer(tmp_path / "run").resume()
    assert latest.read_bytes() == previous.read_bytes() == broken
    previous.unlink()
    with pytest.raises(InputError, match=r"checkpoint_latest\.pth: not a whole checkpoint"):
        make_trainer(tmp_path / "run").resume()
    assert latest.read_bytes() == broken


def test_previous_on_request(tmp_path: Path) -> None:
    make_trainer(tmp_path, replace(SETTINGS, max_steps=13)).run()
    run = make_trainer(tmp_path, replace(SETTINGS, resume="previous"))
    assert run.resume() and run.step == 11  # after the second epoch's last whole step
    (tmp_path / checkpoint.PREVIOUS).unlink()
    with pytest.raises(InputError, match=r"no checkpoint_previous\.pth"):
        make_trainer(tmp_path, replace(SETTINGS, resume="previous")).resume()


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path, monkeypatch) -> None:
    run = make_trainer(tmp_path, replace(SETTINGS, epochs=40))
    room = [10**9] * 3 + [100] * 100
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: _Disk(room.pop(0)))
    with pytest.raises(InputError, match=r"a checkpoint takes .* GB are free; nothing was over"):
        run.run()
    again = make_trainer(tmp_path)
    assert again.resume() and again.step == 11


class _Disk:
    def __init__(self, free: int) -> None:
        self.free = free


def test_changed_data_is_said(tmp_path: Path, caplog) -> None:
    make_trainer(tmp_path, replace(SETTINGS, max_steps=7)).run()
    run = make_trainer(tmp_path, dataset=Points(30))
    assert run.resume()
    assert "the usable clips have changed" in caplog.text
    assert (run.step, run.position) == (7, 30)


def test_foreign_checkpoint_resumes(tmp_path: Path) -> None:
    make_trainer(tmp_path, replace(SETTINGS, epochs=1)).run()
    path = tmp_path / checkpoint.LATEST
    content = state_dict.load(path)
    keys = ("model", "optimizer", "epoch", "global_step", "model_ema1", "model_ema2")
    checkpoint.save(path, {key: content[key] for key in keys})
    run = make_trainer(tmp_path)
    assert run.resume()
    assert (run.epoch, run.step, run.ema_age, run.position) == (1, 6, 6, 22)
    assert run.run().steps == 6 + 17


def test_changed_settings_are_said(tmp_path: Path, caplog) -> None:
    def run(lr: float) -> Trainer:
        config = {"training": {"lr": lr, "seed": 7}}
        return make_trainer(tmp_path, replace(SETTINGS, max_steps=2), config=config)

    run(0.1).run()
    run(0.1).resume()
    assert "other settings" not in caplog.text
    run(0.2).resume()
    assert "made with other settings: training.lr 0.1 -> 0.2" in caplog.text


# What a run shows


def test_warnings_reach_the_log_file(tmp_path: Path) -> None:
    say = logging.getLogger("wavflow").debug
    make_trainer(tmp_path, objective=Fit(lambda draw: say("at %d", draw.positions[0]))).run()
    assert "at 84" in (tmp_path / "training.log").read_text()


def test_validation_is_the_same_at_any_time_and_changes_nothing(tmp_path: Path) -> None:
    held_out = Points(7)
    settings = replace(SETTINGS, val_steps=5, epochs=20)
    run = make_trainer(tmp_path / "a", settings, validation=held_out)
    before = run.validate()
    assert before == run.validate() and before["val/loss"] == before["val/loss_ema1"]
    run.run()
    after = run.validate()
    assert after["val/loss"] < 0.5 * before["val/loss"]
    lines = [line for line in all_metrics(tmp_path / "a") if "val/loss" in line]
    assert [line["step"] for line in lines] == [*range(5, 110, 5), 110]
    make_trainer(tmp_path / "b", settings).run()
    one, two = (state_dict.load(tmp_path / n / checkpoint.LATEST)["model"] for n in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_samples_are_written_and_change_nothing(tmp_path: Path) -> None:
    settings = replace(SETTINGS, gen_train_freq=2)
    make_trainer(tmp_path / "a", settings).run()
    make_trainer(tmp_path / "b").run()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    for epoch in (2, 4):
        names = {p.name for p in (tmp_path / f"a/samples/epoch_{epoch}").iterdir()}
        assert {"gen_rank0_id_first.wav", "gt_rank0_id_first.wav"} <= names


def test_dry_run_writes_nothing_and_tells(tmp_path: Path) -> None:
    found = dry_run(make_trainer(tmp_path / "run"), seconds=0.2)
    assert not (tmp_path / "run").exists()
    assert (found.parameters, found.clips, found.step_clips, found.total_steps) == (41, 22, 4, 22)
    assert 0 < found.seconds < 1 and 0 < found.run_seconds < 22
    assert found.checkpoint_bytes == 5 * 41 * 4 + 4 * 4  # model, averages, moments; steps
    assert found.memory_bytes > 10**7 and 0 <= found.data_wait < 1 and found.loss > 0
    for word in ("41 parameters", "22 clips", "GB a checkpoint", "22 steps from step 0"):
        assert word.replace("41 parameters", "0.0 M parameters") in str(found)


def test_pace() -> None:
    pace = Pace()
    assert pace.clips_per_second == pace.waited == 0.0
    for _ in range(50):
        time.sleep(0.002)
        pace.add(4, 0.001)
    assert 400 < pace.clips_per_second < 2000 and 0.1 < pace.waited < 0.5
