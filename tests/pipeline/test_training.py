"""WavFlow's objective, and `train` from a configuration to its files."""

from __future__ import annotations

import pytest
import torch
from support.tables import clips_of

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.seeding import Draw
from wavflow.config.load import load_config
from wavflow.config.schema import Config
from wavflow.flow.solvers import BEST
from wavflow.pipeline.train import try_out
from wavflow.sampling.plan import Plan
from wavflow.training import checkpoint
from wavflow.training.run_log import read_metrics

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
    from wavflow.features.extract import extract
    from wavflow.toy.world import write_toy_world

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
    losses = [x["loss"] for x in read_metrics(result.out / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    weights = checkpoint.read_weights(result.checkpoint, "ema1")
    assert weights.config["model"]["hidden_dim"] == 32
    assert (result.out / "report.csv").is_file()
    assert load_config(result.out / "config.yaml").experiment_id == "toy_8k"


def test_wavflow_leaves_samples(table, tmp_path, monkeypatch):
    import wavflow
    from wavflow.media.audio import load_audio

    more = ("training.epochs=2", "training.gen_train_freq=2")
    # A public file's way to sample has no part in it: the library's own is taken.
    public = ("eval.cfg=2.0", "sampling.num_steps=3", "sampling.method=heun")
    plans = []
    table_of = Plan.table
    monkeypatch.setattr(
        Plan, "table", lambda self, flow: plans.append(self) or table_of(self, flow)
    )
    result = wavflow.train("toy_8k", options(table, tmp_path, *more, *public))
    assert [(p.solver, p.steps, p.times, p.guidance_interval) for p in plans] == [BEST]
    assert plans[0].guidance == 2.0
    folder = result.out / "samples/epoch_2"
    made = sorted(folder.glob("gen_rank0_id_*.wav"))
    assert len(made) == 4 and len(list(folder.glob("*.wav"))) == 8
    for path in made:
        true = load_audio(folder / path.name.replace("gen_", "gt_"), 8000)
        assert load_audio(path, 8000).shape == true.shape == (16000,)
    # Sampling in between leaves the training as it is.
    plain = wavflow.train(
        "toy_8k", options(table, tmp_path / "plain", "training.epochs=2", *public)
    )
    one, two = (state_dict.load(r.checkpoint)["model"] for r in (result, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)


class Seen:
    """A model that notes what it is given and predicts half of x_t."""

    def __call__(self, x_t, clip, sync, text, t, *, has_video, has_text):
        self.x_t, self.t, self.has_video, self.has_text = x_t, t, has_video, has_text
        self.features = {"clip_features": clip, "sync_features": sync, "text_features": text}
        return 0.5 * x_t


def load(table, config: Config, indices, positions):

    draw = Draw(3, positions)
    return clips_of(table, config.data).load(indices, draw).batch, draw


def test_wavflow_objective_draws_and_drops(table):
    from wavflow.systems.wavflow.objective import WavflowObjective

    config = load_config("toy_8k", options(table, "x", "training.label_drop_prob=0.5"))
    objective, seen = WavflowObjective(config), Seen()
    batch, _ = load(table, config, range(10), range(10))
    assert bool(batch.present["video"].any()) and bool(batch.present["text"].any())
    dropped = []
    for first in range(0, 4000, 10):
        terms = objective.loss(seen, batch, Draw(3, range(first, first + 10)))
        assert terms.values.shape == terms.t.shape == (10,)
        assert not bool((seen.has_video & ~batch.present["video"]).any())
        assert not bool((seen.has_text & ~batch.present["text"]).any())
        both = batch.present["video"] & batch.present["text"]
        dropped.append(torch.stack((~seen.has_video[both], ~seen.has_text[both])))
    dropped = torch.cat(dropped, dim=1).float()
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.04)
    assert (dropped[0] * dropped[1]).mean().item() == pytest.approx(0.25, abs=0.04)
    # What an example draws does not depend on what else is in the batch.
    objective.loss(seen, batch, Draw(3, range(70, 80)))
    full = seen.x_t, seen.t, seen.has_video
    part, draw = load(table, config, [4, 5], [74, 75])
    objective.loss(seen, part, draw)
    assert torch.equal(seen.t, full[1][4:6]) and torch.equal(seen.has_video, full[2][4:6])
    assert torch.equal(seen.x_t, full[0][4:6])
    objective.loss(seen, part, Draw(3, [75, 76]))
    assert not torch.equal(seen.t, full[1][4:6])


def test_missing_features_are_the_networks_own(table):
    from wavflow.systems.wavflow.objective import WavflowObjective

    torch.manual_seed(0)
    config = load_config("toy_8k", options(table, "x"))
    model = WavflowObjective(config).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    x, t = torch.randn(3, 200, 80), torch.rand(3)
    given = [torch.randn(3, *shape) for shape in config.data.feature_shapes.values()]
    has_video, has_text = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    found = model(x, *given, t, has_video=has_video, has_text=has_text)
    empty = (
        model.get_empty_clip_sequence(3),
        model.get_empty_sync_sequence(3),
        model.get_empty_string_sequence(3),
    )
    mixed = [f.clone() for f in given]
    for value, instead in zip(mixed[:2], empty[:2], strict=True):
        value[1:] = instead[1:]
    mixed[2][2] = empty[2][2]
    assert torch.equal(found, model(x, *mixed, t))
    for name in ("has_video", "has_text"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), wanted \(3,\)"):
            model(x, *given, t, **{name: torch.ones(2, dtype=torch.bool)})


@pytest.mark.parametrize(("prediction", "kind"), [("x", "v"), ("x", "x"), ("v", "v"), ("v", "x")])
def test_wavflow_loss_by_hand(table, prediction, kind):
    import wavflow_kernels as kernels
    from wavflow.systems.wavflow.objective import WavflowObjective

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
    batch, draw = load(table, config, [4, 7, 1], [11, 12, 13])
    terms = WavflowObjective(config).loss(Seen(), batch, draw)

    gain = 0.33 / batch.wave.square().mean(1, keepdim=True).sqrt()
    peak = (batch.wave * gain).abs().amax(1)
    assert bool(((peak < 1) | (0.33 / peak < 0.3)).all())  # the peak rule does not apply
    x_1 = 3 * (batch.wave * gain).clamp(-1, 1).view(3, 200, 80)
    raw = torch.sigmoid(-0.5 + 0.7 * draw.normal("t")).float()
    t = (raw / (raw + 3 * (1 - raw)))[:, None, None]
    torch.testing.assert_close(terms.t, t.flatten())
    x_0 = kernels.philox_normal(draw.seeds, 200, 80, noise_scale=0.8)
    x_t = (1 - 0.99 * t) * x_0 + t * x_1
    pred = 0.5 * x_t
    error = {
        "xv": (pred - x_1) / (1 - t),
        "xx": pred - x_1,
        "vv": pred - (x_1 - 0.99 * x_0),
        "vx": x_t + (1 - t) * pred - x_1,
    }[prediction + kind]
    torch.testing.assert_close(terms.values, error.square().mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_pack_trains_as_its_files_do(table, tmp_path):
    import wavflow

    more = ("training.max_steps=5", "training.checkpoint_freq=100")
    store = f"data.store={tmp_path / 'pack'}"
    runs = [
        wavflow.train("toy_8k", options(table, tmp_path / "files", *more)),
        wavflow.train("toy_8k", options(table, tmp_path / "store", *more, store)),
        wavflow.train("toy_8k", options(tmp_path / "pack", tmp_path / "pack run", *more)),
    ]
    one, *others = (state_dict.load(run.checkpoint)["model"] for run in runs)
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_dry_run_and_overfit(table, tmp_path):
    import wavflow

    found = try_out("toy_8k", options(table, tmp_path, "training.overfit=3"), seconds=0.5)
    assert found.clips == 3 and found.step_clips == 4 and 0 < found.mfu < 1.5
    assert list(tmp_path.iterdir()) == []
    more = ("training.overfit=3", "training.max_steps=80", "training.lr=3e-3")
    result = wavflow.train("toy_8k", options(table, tmp_path, *more))
    assert result.out == tmp_path / "toy_8k_overfit_3"
    losses = [x["loss"] for x in read_metrics(result.out / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_validation_clips_are_read_from_their_own_table(table, tmp_path):
    import wavflow

    more = (f"data.val_csv_path={table}", "training.val_steps=2", "training.max_steps=4")
    result = wavflow.train("toy_8k", options(table, tmp_path, *more))
    lines = [x for x in read_metrics(result.out / "metrics.jsonl") if "val/loss" in x]
    assert [x["step"] for x in lines] == [2, 4]
    assert all(0 < x["val/loss_ema1"] < 10 for x in lines)


def test_train_refuses_before_the_first_step(table, tmp_path):
    import wavflow

    with pytest.raises(InputError, match=r"data\.csv_path is not set"):
        wavflow.train("toy_8k", TINY)
    with pytest.raises(InputError, match=r"model\.name is 'huge'; wanted one of"):
        wavflow.train("toy_8k", options(table, tmp_path, "model.name=huge"))
    with pytest.raises(InputError, match="no usable row"):
        wavflow.train("toy_8k", options(table, tmp_path, "data.clip_seq_len=8", "data.text_dim=8"))


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
    one, two = (state_dict.load(r.checkpoint) for r in (first, second))
    assert two["global_step"] == 1
    for key in ("model", "model_ema1"):
        for name, value in one["model"].items():
            torch.testing.assert_close(two[key][name], value, atol=1e-9, rtol=1e-6)
