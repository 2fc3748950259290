from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wavflow import checkpoint
from wavflow.config import TrainingConfig, load_config
from wavflow.draw import Draw
from wavflow.ema import Ema
from wavflow.errors import InputError
from wavflow.trainer import Trainer, make_optimizer

SETTINGS = TrainingConfig(
    epochs=4,
    batch_size=4,
    lr=1e-2,
    warmup_steps=3,
    log_freq=3,
    num_workers=0,
    lr_schedule="cosine",
    weight_decay=0.01,
    seed=7,
)


class Points:
    """Noisy samples of a line; `broken` items are NaN."""

    def __init__(self, items=22, broken=()):
        self.x = torch.randn(items, 3, generator=torch.Generator().manual_seed(1))
        self.y = self.x.sum(1, keepdim=True)
        self.x[list(broken)] = float("nan")

    def __len__(self):
        return len(self.x)

    def id(self, index):
        return f"clip{index}"

    def batch(self, indices):
        return self.x[list(indices)], self.y[list(indices)]

    def fingerprint(self):
        return str(len(self.x))


class Fit:
    """Regression under noise that comes from the draw."""

    def __init__(self, each_step=lambda step: None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.each_step = each_step
        self.losses = []

    def loss(self, batch, draw):
        self.each_step(draw.step)
        x, y = batch
        noise = torch.stack(
            [torch.randn(3, generator=torch.Generator().manual_seed(int(s))) for s in draw.seeds]
        )
        scale = torch.rand(len(x), 1, generator=draw.generator())
        losses = (self.model(x + 0.1 * scale * noise) - y).square().mean(1)
        self.losses.append(losses.detach().clone())
        return losses


def trainer(out, settings=SETTINGS, objective=None, dataset=None):
    return Trainer(
        objective or Fit(),
        dataset or Points(),
        settings,
        out,
        config={},
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def metrics(out):
    lines = [json.loads(x) for x in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: x[k] for k in ("step", "epoch", "loss", "grad_norm", "lr")} for x in lines]


def test_a_run_learns_and_leaves_its_files(tmp_path):
    settings = replace(SETTINGS, epochs=60, checkpoint_save_epoch=20, ema_checkpoint_save_epoch=30)
    objective = Fit()
    result = trainer(tmp_path, settings, objective).run()
    assert (result.steps, result.epochs, result.parameters) == (300, 60, 41)
    assert result.loss < 0.1 * objective.losses[0].mean()
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint_latest.pth",
        "checkpoint_epoch_20.pth",
        "checkpoint_epoch_40.pth",
        "checkpoint_epoch_60.pth",
        "ema_epoch_30.pth",
        "ema_epoch_60.pth",
        "training.log",
        "metrics.jsonl",
    }
    content = checkpoint.load(result.checkpoint)
    assert {"model", "optimizer", "epoch", "global_step", "model_ema1", "model_ema2"} <= set(
        content
    )
    assert (content["epoch"], content["global_step"], content["ema_age"]) == (60, 300, 300)
    assert list(content["model_ema1"]) == [n for n, _ in objective.model.named_parameters()]
    flat = checkpoint.read_weights(tmp_path / "ema_epoch_60.pth")
    checkpoint.load_into(Fit().model, flat.state, "x")
    assert torch.equal(flat.state["0.weight"], content["model_ema1"]["0.weight"])
    lines = metrics(tmp_path)
    assert [x["step"] for x in lines] == list(range(3, 301, 3))
    assert "41 parameters, 22 clips, batch 4" in (tmp_path / "training.log").read_text()


@pytest.mark.parametrize("stop", [1, 5, 7, 13])
def test_resume_is_exact_to_the_bit(tmp_path, stop):
    whole = Fit()
    trainer(tmp_path / "whole", objective=whole).run()

    def interrupt(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    broken = Fit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "broken", objective=broken).run()
    assert checkpoint.load(tmp_path / "broken/checkpoint_latest.pth")["global_step"] == stop + 1
    second = Fit()
    run = trainer(tmp_path / "broken", objective=second)
    assert run.resume() and run.step == stop + 1
    run.run()

    losses = [*broken.losses, *second.losses]
    assert len(losses) == len(whole.losses) == 20
    assert all(torch.equal(a, b) for a, b in zip(losses, whole.losses, strict=True))
    one = checkpoint.load(tmp_path / "whole/checkpoint_latest.pth")
    two = checkpoint.load(tmp_path / "broken/checkpoint_latest.pth")
    for key in ("model", "model_ema1", "model_ema2"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
    for index, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][index][name])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")


def test_loader_threads_change_nothing(tmp_path):
    runs = []
    for workers in (0, 3):
        runs.append(Fit())
        trainer(tmp_path / str(workers), replace(SETTINGS, num_workers=workers), runs[-1]).run()
    for a, b in zip(runs[0].losses, runs[1].losses, strict=True):
        assert torch.equal(a, b)


def test_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_saves_and_leaves_with_143(tmp_path):
    def interrupt(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        trainer(tmp_path, objective=Fit(interrupt)).run()
    assert caught.value.code == 143
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["global_step"] == 5


def test_runs_in_a_thread(tmp_path):
    steps = []
    worker = threading.Thread(target=lambda: steps.append(trainer(tmp_path).run().steps))
    worker.start()
    worker.join(60)
    assert steps == [20]


def test_nan_stops_with_the_ids(tmp_path):
    objective = Fit()
    with pytest.raises(
        InputError, match=r"step \d+: the loss is not finite; clips: clip1[37]"
    ) as e:
        trainer(tmp_path, objective=objective, dataset=Points(broken=(13, 17))).run()
    step = int(str(e.value).split()[1].rstrip(":"))
    assert len(objective.losses) == step + 1
    assert all(torch.isfinite(p).all() for p in objective.model.parameters())


def test_infinite_gradient_stops(tmp_path):
    class Steep(Fit):
        def loss(self, batch, draw):
            return torch.sqrt(super().loss(batch, draw) * 0)

    with pytest.raises(InputError, match="step 0: the gradient is not finite; clips: clip"):
        trainer(tmp_path, objective=Steep()).run()


def test_lengths_of_a_run(tmp_path):
    assert trainer(tmp_path / "a", replace(SETTINGS, max_steps=7)).run().steps == 7
    slow = Fit(lambda step: time.sleep(0.02))
    settings = replace(SETTINGS, epochs=10**6, max_seconds=0.6, min_lr=1e-5)
    run = trainer(tmp_path / "b", settings, slow)
    result = run.run()
    assert 0.6 <= result.seconds < 1.5
    assert 5 <= result.steps <= 30
    assert run.learning_rate() == pytest.approx(1e-5)
    rates = [x["lr"] for x in metrics(tmp_path / "b")]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3 * SETTINGS.lr


def test_learning_rate_schedules(tmp_path):
    run = trainer(tmp_path, replace(SETTINGS, lr=1.0, warmup_steps=4, lr_schedule="constant"))
    rates = []
    for run.step in range(6):
        rates.append(run.learning_rate())
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    run = trainer(tmp_path, replace(SETTINGS, lr=1.0, warmup_steps=0, min_lr=0.2))
    assert run.learning_rate() == 1.0
    run.step = run.total_steps // 2
    assert run.learning_rate() == pytest.approx(0.6)
    run.step = run.total_steps
    assert run.learning_rate() == pytest.approx(0.2)
    steps = replace(
        SETTINGS,
        lr=1.0,
        warmup_steps=0,
        lr_schedule="step",
        lr_schedule_steps=[2, 5],
        lr_schedule_gamma=0.1,
    )
    run = trainer(tmp_path, steps)
    rates = []
    for run.epoch in range(7):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_ema_follows_its_recursion():
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


def test_optimizer_decays_matrices_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    flat, matrices = make_optimizer(model, replace(SETTINGS, weight_decay=0.3)).param_groups
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert (flat["weight_decay"], matrices["weight_decay"]) == (0, 0.3)
    assert len(flat["params"]) == 2 and matrices["betas"] == (0.9, 0.95)


def test_draws_depend_on_seed_step_and_item_alone():
    a = Draw(1, 5, [3, 9])
    assert torch.equal(Draw(1, 5, [9, 4, 3]).seeds[[2, 0]], a.seeds)
    many = torch.cat([Draw(s, t, list(range(50))).seeds for s in range(3) for t in range(20)])
    assert len(set(many.tolist())) == 3000 and bool((many >= 0).all())
    one, two = torch.rand(3, generator=a.generator()), torch.rand(3, generator=a.generator())
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(3, generator=Draw(1, 6, [3, 9]).generator()))


def test_resume_refuses_what_does_not_fit(tmp_path):
    trainer(tmp_path).run()
    path = tmp_path / checkpoint.LATEST
    whole = path.read_bytes()

    class Wide(Fit):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1))

    with pytest.raises(InputError, match=r"0\.weight is \(8, 3\); the model wants \(9, 3\)"):
        trainer(tmp_path, objective=Wide()).resume()
    path.write_bytes(whole[:-2000])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        trainer(tmp_path).resume()
    assert path.read_bytes() == whole[:-2000]


def test_changed_data_is_said(tmp_path, caplog):
    trainer(tmp_path, replace(SETTINGS, max_steps=7)).run()
    run = trainer(tmp_path, dataset=Points(30))
    assert run.resume()
    assert "the usable clips have changed" in caplog.text
    assert (run.step, run.step_in_epoch) == (7, 0)


def test_foreign_checkpoint_resumes(tmp_path):
    trainer(tmp_path, replace(SETTINGS, epochs=1)).run()
    path = tmp_path / checkpoint.LATEST
    content = checkpoint.load(path)
    keys = ("model", "optimizer", "epoch", "global_step", "model_ema1", "model_ema2")
    checkpoint.save(path, {key: content[key] for key in keys})
    run = trainer(tmp_path)
    assert run.resume()
    assert (run.epoch, run.step, run.ema_age) == (1, 5, 5)
    assert run.run().steps == 20


def test_changed_settings_are_said(tmp_path, caplog):
    def run(lr):
        return Trainer(
            Fit(),
            Points(),
            replace(SETTINGS, max_steps=2),
            tmp_path,
            config={"training": {"lr": lr, "seed": 7}},
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    run(0.1).run()
    run(0.1).resume()
    assert "other settings" not in caplog.text
    run(0.2).resume()
    assert "made with other settings: training.lr 0.1 -> 0.2" in caplog.text


def test_warnings_reach_the_log_file(tmp_path):
    run = trainer(tmp_path, objective=Fit(lambda s: logging.getLogger("wavflow").debug("at %d", s)))
    run.run()
    assert "at 19" in (tmp_path / "training.log").read_text()


# WavFlow itself


TINY = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "training.batch_size=4",
    "training.warmup_steps=2",
    "training.log_freq=1",
    "training.num_workers=1",
    "training.dtype=float32",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    from wavflow.data.toy import write_toy_world
    from wavflow.features.extract import extract

    root = tmp_path_factory.mktemp("toy")
    write_toy_world(root / "toy", 10, 5, heldout=0, workers=1)
    return extract(root / "toy/train.csv", root / "features", workers=0).csv


def options(table, out, *more):
    return [*TINY, f"data.csv_path={table}", f"training.output_dir={out}", *more]


def test_wavflow_loss_falls_and_averages_are_usable(table, tmp_path):
    import wavflow

    result = wavflow.train(
        "toy_8k", options(table, tmp_path, "training.max_steps=60", "training.lr=3e-3")
    )
    losses = [x["loss"] for x in metrics(result.out)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    weights = checkpoint.read_weights(result.checkpoint, "ema1")
    assert weights.config["model"]["hidden_dim"] == 32
    assert (result.out / "report.csv").is_file()
    assert load_config(result.out / "config.yaml").experiment_id == "toy_8k"


def test_wavflow_leaves_samples(table, tmp_path):
    import wavflow
    from wavflow.audio import load_audio

    more = ("training.epochs=2", "training.gen_train_freq=2", "eval.num_sampling_steps=2")
    result = wavflow.train("toy_8k", options(table, tmp_path, *more))
    folder = result.out / "samples/epoch_2"
    made = sorted(folder.glob("gen_rank0_id_*.wav"))
    assert len(made) == 4 and len(list(folder.iterdir())) == 8
    for path in made:
        true = load_audio(folder / path.name.replace("gen_", "gt_"), 8000)
        assert load_audio(path, 8000).shape == true.shape == (16000,)
    # Sampling in between leaves the training as it is.
    plain = wavflow.train("toy_8k", options(table, tmp_path / "plain", "training.epochs=2"))
    one, two = (checkpoint.load(r.checkpoint)["model"] for r in (result, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_wavflow_objective_draws_and_drops(table):
    from wavflow.build import build_model
    from wavflow.data.dataset import ClipDataset
    from wavflow.training import WavflowObjective

    config = load_config("toy_8k", options(table, "x", "training.label_drop_prob=0.5"))
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    seen = {}

    def forward(x_t, clip, sync, text, t):
        seen.update(x_t=x_t, clip=clip, sync=sync, text=text, t=t)
        return x_t * 0

    objective = WavflowObjective(model, config)
    objective.forward = forward
    data = ClipDataset(table, config.data)
    batch = data.batch(range(10))
    dropped = []
    for step in range(200):
        losses = objective.loss(batch, Draw(3, step, list(range(10))))
        assert losses.shape == (10,)
        empty = (seen["clip"] - model.get_empty_clip_sequence(10)).abs().amax((1, 2)) == 0
        assert torch.equal(
            empty, (seen["sync"] - model.get_empty_sync_sequence(10)).abs().amax((1, 2)) == 0
        )
        assert bool(empty[~batch.has_video].all())
        no_text = (seen["text"] - model.get_empty_string_sequence(10)).abs().amax((1, 2)) == 0
        assert bool(no_text[~batch.has_text].all())
        both = batch.has_video & batch.has_text
        dropped.append(torch.stack((empty[both], no_text[both])))
    dropped = torch.cat(dropped, dim=1).float()
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.04)
    assert (dropped[0] * dropped[1]).mean().item() == pytest.approx(0.25, abs=0.04)
    # An item's noise does not depend on what else is in the batch.
    objective.loss(batch, Draw(3, 7, list(range(10))))
    full = seen["x_t"], seen["t"]
    objective.config = replace(config, training=replace(config.training, label_drop_prob=0.0))
    objective.loss(data.batch([0, 1, 2]), Draw(3, 7, [0, 1, 2]))
    assert torch.equal(seen["t"], full[1][:3])
    assert torch.equal(seen["x_t"], full[0][:3])
    objective.loss(data.batch([0, 1, 2]), Draw(3, 8, [0, 1, 2]))
    assert not torch.equal(seen["t"], full[1][:3])


@pytest.mark.parametrize(("prediction", "kind"), [("x", "v"), ("x", "x"), ("v", "v"), ("v", "x")])
def test_wavflow_loss_by_hand(table, prediction, kind):
    import wavflow_kernels as kernels
    from wavflow.build import build_model
    from wavflow.data.dataset import ClipDataset
    from wavflow.training import WavflowObjective

    more = (
        f"sampling.prediction_type={prediction}",
        f"training.loss_type={kind}",
        "sampling.noise_shift=3.0",
        "sampling.mean=-0.5",
        "sampling.scale=0.7",
        "sampling.noise_scale=0.8",
        "sampling.min_sigma=0.01",
    )
    config = load_config("toy_8k", options(table, "x", *more))
    objective = WavflowObjective(build_model(config), config)
    objective.forward = lambda x_t, clip, sync, text, t: 0.5 * x_t
    batch, draw = ClipDataset(table, config.data).batch([4, 7, 1]), Draw(2, 11, [4, 7, 1])
    losses = objective.loss(batch, draw)

    gain = 0.33 / batch.wave.square().mean(1, keepdim=True).sqrt()
    peak = (batch.wave * gain).abs().amax(1)
    assert bool(((peak < 1) | (0.33 / peak < 0.3)).all())  # the peak rule does not apply
    x_1 = 3 * (batch.wave * gain).clamp(-1, 1).view(3, 200, 80)
    raw = torch.sigmoid(-0.5 + 0.7 * torch.randn(3, generator=draw.generator()))
    t = (raw / (raw + 3 * (1 - raw)))[:, None, None]
    x_0 = kernels.philox_normal(draw.seeds, 200, 80, noise_scale=0.8)
    x_t = (1 - 0.99 * t) * x_0 + t * x_1
    pred = 0.5 * x_t
    error = {
        "xv": (pred - x_1) / (1 - t),
        "xx": pred - x_1,
        "vv": pred - (x_1 - 0.99 * x_0),
        "vx": x_t + (1 - t) * pred - x_1,
    }[prediction + kind]
    torch.testing.assert_close(losses, error.square().mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_wavflow_resume_is_exact_in_a_real_process(table, tmp_path):
    command = [
        sys.executable,
        "-m",
        "wavflow.train",
        "--config",
        "toy_8k",
        *options(table, tmp_path / "a", "training.max_steps=14"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "a/toy_8k"
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stderr = child.communicate(timeout=300)[1]
    assert child.returncode == 130, stderr
    assert "Traceback" not in stderr
    stopped = checkpoint.load(out / checkpoint.LATEST)["global_step"]
    assert 1 <= stopped < 14
    for command[-2] in (
        f"training.output_dir={tmp_path / 'a'}",
        f"training.output_dir={tmp_path / 'b'}",
    ):
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=100)
    one = checkpoint.load(out / checkpoint.LATEST)
    two = checkpoint.load(tmp_path / "b/toy_8k" / checkpoint.LATEST)
    for key in ("model", "model_ema1", "model_ema2"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
    assert metrics(out) == metrics(tmp_path / "b/toy_8k")


def test_train_refuses_before_the_first_step(table, tmp_path, monkeypatch):
    import wavflow

    with pytest.raises(InputError, match=r"data\.csv_path is not set"):
        wavflow.train("toy_8k", TINY)
    with pytest.raises(InputError, match=r"model\.name is 'huge'; wanted one of"):
        wavflow.train("toy_8k", options(table, tmp_path, "model.name=huge"))
    with pytest.raises(InputError, match="no usable row"):
        wavflow.train("toy_8k", options(table, tmp_path, "data.clip_seq_len=8", "data.text_dim=8"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="single process"):
        wavflow.train("toy_8k", options(table, tmp_path))


def test_start_from_weights(table, tmp_path):
    import wavflow

    first = wavflow.train("toy_8k", options(table, tmp_path / "a", "training.max_steps=3"))
    second = wavflow.train(
        "toy_8k",
        options(
            table,
            tmp_path / "b",
            "training.max_steps=1",
            "training.lr=1e-12",
            f"checkpoint.initial_load_path={first.checkpoint}",
        ),
    )
    one, two = (checkpoint.load(r.checkpoint) for r in (first, second))
    assert two["global_step"] == 1
    for key in ("model", "model_ema1"):
        for name, value in one["model"].items():
            torch.testing.assert_close(two[key][name], value, atol=1e-9, rtol=1e-6)
