from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.networks import CPU, TINY, mixed, random_features, random_model, tiny_sampler
from support.paths import PYTHONPATH

import wavflow
from wavflow.base.errors import Cancelled, InputError
from wavflow.config.load import load_config
from wavflow.config.schema import Config
from wavflow.flow.solvers import BEST
from wavflow.flow.times import time_grid
from wavflow.media.audio import load_audio
from wavflow.media.sound import Sound
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import infer, infer_config, row_seed
from wavflow.systems.wavflow.config import WavflowDataConfig, WavflowModelConfig
from wavflow.systems.wavflow.footprint import clip_bytes
from wavflow.training import checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    wavflow.write_toy_world(root, 6, 1, heldout=4, workers=1)
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint_latest.pth"
    config = load_config("toy_8k", [*TINY, "sampling.num_steps=4"])
    model = random_model(config)
    state = model.state_dict()
    ema = dict(model.named_parameters())
    checkpoint.save(
        path,
        {
            "model": state,
            "optimizer": {},
            "epoch": 1,
            "global_step": 900,
            "ema_age": 900,
            "ema_decay": {"ema1": 0.9999, "ema2": 0.9996},
            "config": config.to_dict(),
            "model_ema1": {k: v.detach() for k, v in ema.items()},
            "model_ema2": {k: v.detach() * 0.5 for k, v in ema.items()},
        },
    )
    return path


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_batch_does_not_change_a_row(guidance):
    sampler, seeds = tiny_sampler(), [5, 2**62, 7, 0, 9]
    together = sampler.generate_features(mixed(), seeds, guidance=guidance, batch_size=5)
    by_two = sampler.generate_features(mixed(), seeds, guidance=guidance, batch_size=2)
    alone = sampler.generate_features(mixed()[2:3], [7], guidance=guidance)
    for a, b in zip(together, by_two, strict=True):
        torch.testing.assert_close(a.audio, b.audio, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(alone[0].audio, together[2].audio, atol=2e-5, rtol=1e-4)


def test_seed_and_conditions_matter():
    sampler = tiny_sampler()
    rows = [random_features(1), random_features(1), random_features(2), random_features(1)]
    a, b, c, d = (s.audio for s in sampler.generate_features(rows, [1, 2, 1, 1]))
    assert a.shape == (16000,) and a.dtype == torch.float32
    assert torch.equal(a, d)
    assert not torch.allclose(a, b, atol=1e-2)
    assert not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("guidance", "solver"), [(4.5, "euler"), (0.5, "heun"), (4.5, "2m")])
def test_agrees_with_the_drop_in_path(prediction, shift, guidance, solver):
    import wavflow_kernels as kernels
    from wavflow.flow.matching import FlowMatching

    sampler = tiny_sampler(prediction_type=prediction, noise_shift=shift, noise_scale=0.8)
    rows = [random_features(1), random_features(2)]
    made = sampler.generate_features(rows, [3, 4], guidance=guidance, solver=solver)
    model = sampler.field.network
    flow = FlowMatching(
        num_steps=4, prediction_type=prediction, noise_shift=shift, inference_mode=solver
    )
    conditions = model.preprocess_conditions(
        *(torch.stack([row[key] for row in rows]) for key in rows[0])
    )
    empty = model.get_empty_conditions(2)
    noise = kernels.philox_normal(torch.tensor([3, 4]), 200, 80, noise_scale=0.8)
    tokens = flow.to_data(lambda t, x: model.ode_wrapper(t, x, conditions, empty, guidance), noise)
    wave = (tokens / 3).flatten(1).clamp(-1, 1)
    torch.testing.assert_close(torch.stack([s.audio for s in made]), wave, atol=1e-5, rtol=1e-4)


def test_adaptive_agrees_with_many_euler_steps():
    sampler, rows = tiny_sampler(prediction_type="v"), [random_features(1)]
    fine = sampler.generate_features(rows, [3], steps=400, guidance=2.0)[0].audio
    adaptive = sampler.generate_features(rows, [3], solver="adaptive", guidance=2.0)[0].audio
    coarse = sampler.generate_features(rows, [3], steps=4, guidance=2.0)[0].audio
    assert (adaptive - fine).norm() < 0.02 * fine.norm()
    assert (adaptive - fine).norm() < (coarse - fine).norm()


def test_bfloat16_is_close_and_prepares_only_large_matrices():
    reference = tiny_sampler().generate_features(mixed(), range(5), guidance=2.0)
    sampler = tiny_sampler(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in sampler.field.network.parameters())
    left = {n for n, p in sampler.field.network.named_parameters() if p.ndim > 1}
    kept = ("t_embed.", "clip_cond_proj.", "text_cond_proj.", "empty_", "sync_pos_emb")
    assert left and all(name.startswith(kept) for name in left)
    made = sampler.generate_features(mixed(), range(5), guidance=2.0)
    for a, b in zip(made, reference, strict=True):
        assert a.audio.dtype == torch.float32
        assert (a.audio - b.audio).norm() < 0.1 * b.audio.norm()


def test_whole_tokens_or_the_configured_duration():
    config = load_config("toy_8k", [*TINY, "data.audio_duration=1.999"])
    sampler = Sampler(random_model(config), config, CPU, torch.float32)
    assert sampler.generate_features([{}], [1], steps=1)[0].audio.shape == (15992,)
    assert sampler.generate_features([{}], [1], steps=1, trim=False)[0].audio.shape == (16000,)


def test_from_files(saved, world, tmp_path):
    sampler = Sampler.load(saved, dtype="float32")
    rows = list(csv.DictReader(open(world / "heldout.csv")))
    video = world / rows[0]["video_path"]
    done = []
    sounds = sampler.generate(
        captions=["a bell rings", None, "a bell rings", None],
        videos=[None, video, video, None],
        seed=4,
        guidance=2.0,
        batch_size=3,
        progress=lambda *at: done.append(at),
    )
    assert done == [(3, 4), (4, 4)]
    assert len({tuple(s.audio[:50].tolist()) for s in sounds}) == 4
    again = sampler.generate(captions=["a bell rings"], seeds=[4], guidance=2.0)
    torch.testing.assert_close(again[0].audio, sounds[0].audio, atol=2e-5, rtol=1e-4)
    again[0].save(tmp_path / "a.wav")
    torch.testing.assert_close(
        load_audio(tmp_path / "a.wav", 8000), again[0].audio, atol=1e-4, rtol=0
    )
    other = Sampler.load(saved, dtype="float32", ema="ema2").generate(["a bell rings"], seeds=[4])
    assert not torch.allclose(other[0].audio, again[0].audio, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to generate"),
        ({"captions": "a bell"}, "captions is 'a bell'; wanted a list"),
        ({"captions": ["a"], "videos": [None, None]}, "1 captions and 2 videos"),
        ({"captions": ["a"], "seeds": [1, 2]}, "2 seeds for 1 rows"),
        ({"captions": ["a"], "solver": "rk9"}, "solver is 'rk9'; wanted one of euler, midpoint"),
        ({"captions": ["a"], "steps": 0}, "steps is 0"),
        ({"captions": ["a"], "times": "odd"}, "times is 'odd'; wanted one of even, sigmoid"),
        ({"captions": ["a"], "seconds": -1.0}, "row 0: seconds is -1.0; wanted more than 0"),
        ({"captions": ["a"], "seconds": [1.0, 2.0]}, "2 seconds for 1 rows"),
        ({"captions": ["a"], "seconds": 0.01}, "seconds is 0.01; its video has no frame"),
        ({"captions": ["a"], "negative_captions": "b"}, "negative_captions is 'b'; wanted a list"),
        ({"captions": ["a"], "negative_captions": []}, "0 negative_captions for 1 rows"),
        ({"captions": ["a"], "guidance_interval": (0.5, 0.2)}, "guidance_interval is 0.5 to 0.2"),
        ({"captions": ["a"], "guidance_rescale": 2.0}, "guidance_rescale is 2.0; wanted 0 to 1"),
        ({"captions": ["a"], "batch_size": 0}, "batch_size is 0"),
        ({"videos": ["gone.mp4"]}, "gone.mp4"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny_sampler().generate(**arguments)


def test_the_plan():
    sampler = tiny_sampler()
    plan = sampler.plan()
    assert (plan.solver, plan.steps, plan.times, plan.guidance_interval) == BEST
    assert plan.guidance == 4.0 and [plan.weight(t) for t in (0.0, 0.7, 0.71)] == [4.0, 4.0, 1.0]
    public = sampler.plan(solver="euler", guidance=0.5)
    # The configuration's steps, even times, guidance throughout.
    assert (public.steps, public.times, public.guidance_interval) == (4, "even", (0.0, 1.0))
    assert not public.guided and public.weight(0.5) == 1.0
    part = sampler.plan(guidance_interval=(0.2, 0.6), steps=9)
    assert (part.solver, part.steps) == (BEST.solver, 9)
    assert [part.weight(t) for t in (0.1, 0.2, 0.6, 0.7)] == [1.0, 4.0, 4.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_engine_agrees(dtype):
    config = load_config("toy_8k", TINY)
    wanted = Sampler(random_model(config), config, CPU, dtype).generate(["a bell"])[0].audio
    sampler = Sampler(random_model(config), config, CPU, dtype, "compile")
    made = sampler.generate(["a bell"])[0].audio
    assert sampler.engine.kind == "compile"
    assert (made - wanted).norm() < (1e-4 if dtype == torch.float32 else 0.1) * wanted.norm()


def test_lengths_are_mixed_and_rows_come_as_they_finish():
    sampler, seconds = tiny_sampler(), [2.0, 0.5, 2.0, 3.0, 0.5]
    captions = ["a bell", "a drum", None, "a bird", "a bell"]
    options = {"seeds": [1, 2, 3, 4, 5], "guidance": 2.0, "batch_size": 2, "steps": 3}
    done = []
    completed = sampler.as_completed(
        captions, seconds=seconds, progress=lambda *at: done.append(at), **options
    )
    assert not done
    row, first = next(completed)
    assert row == 0 and first.audio.shape == (16000,) and done == [(2, 5)]
    rest = dict(completed)
    assert list(rest) == [2, 1, 4, 3] and done == [(2, 5), (4, 5), (5, 5)]
    for at, sound in {0: first, **rest}.items():
        assert sound.audio.numel() == round(8000 * seconds[at])
        (alone,) = sampler.generate(
            [captions[at]], [None], seconds=seconds[at], **{**options, "seeds": [at + 1]}
        )
        torch.testing.assert_close(sound.audio, alone.audio, atol=2e-5, rtol=1e-4)


def test_guidance_outside_its_interval_runs_one_pass(monkeypatch):
    sampler, row = tiny_sampler(), [random_features(1)]
    rows = []
    transform = type(sampler.field.network)._transform
    monkeypatch.setattr(
        type(sampler.field.network),
        "_transform",
        lambda m, x, *a: rows.append(len(x)) or transform(m, x, *a),
    )
    options = {"solver": "euler", "steps": 4, "times": "sigmoid"}
    part = sampler.generate_features(row, [1], guidance_interval=(0.3, 0.7), **options)
    assert rows == [1, 1, 2, 1]  # t = 0, 0.07, 0.5, 0.93
    never = sampler.generate_features(row, [1], guidance_interval=(0.95, 1.0), **options)
    plain = sampler.generate_features(row, [1], guidance=1.0, **options)
    assert torch.equal(never[0].audio, plain[0].audio) and rows[4:] == [1] * 8
    whole = sampler.generate_features(row, [1], **options)
    assert not torch.allclose(part[0].audio, whole[0].audio, atol=1e-3)
    assert not torch.allclose(part[0].audio, plain[0].audio, atol=1e-3)


@pytest.mark.parametrize("solver", ["euler", "adaptive"])
def test_negative_captions_and_rescale_change_what_guidance_does(solver):
    sampler = tiny_sampler(prediction_type="v")
    call = lambda **options: sampler.generate(  # noqa: E731
        ["a bell", "a drum"], seeds=[1, 2], solver=solver, guidance=40.0, **options
    )
    plain, away = call(), call(negative_captions=[None, "a bird sings"])
    assert (plain[0].audio - away[0].audio).norm() < 1e-3 * plain[0].audio.norm()
    assert not torch.allclose(plain[1].audio, away[1].audio, atol=1e-3)
    rescaled = call(guidance_rescale=1.0)
    assert not torch.allclose(plain[0].audio, rescaled[0].audio, atol=1e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_steps_report_and_preview(prediction):
    sampler = tiny_sampler(prediction_type=prediction)
    seen, previews = [], []

    def on_step(step):
        seen.append((step.rows, step.done, step.total, round(step.t, 3)))
        previews.append(step.preview())

    options = {"solver": "euler", "guidance": 2.0, "batch_size": 2}
    sounds = sampler.generate_features(mixed()[:3], [1, 2, 3], on_step=on_step, **options)
    times = [round(float(t), 3) for t in time_grid(4, shift=10.0)[:4]]
    rows = [(0, 1)] * 4 + [(2,)] * 4
    assert seen == [(r, i % 4 + 1, 4, times[i % 4]) for i, r in enumerate(rows)]
    # Euler's last step ends on the data that it expects.
    for made, last in zip(sounds, [*previews[3], *previews[7]], strict=True):
        assert last.sample_rate == 8000 and made.audio.shape == last.audio.shape
        torch.testing.assert_close(made.audio, last.audio, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(previews[0][0].audio, sounds[0].audio, atol=1e-3)


def test_adaptive_steps_report_without_a_total():
    seen = []
    tiny_sampler(prediction_type="v").generate_features(
        [{}], [1], solver="adaptive", on_step=lambda s: seen.append((s.done, s.total))
    )
    assert seen == [(i + 1, None) for i in range(len(seen))] and len(seen) > 6


def test_cancelling():
    sampler, cancel, steps = tiny_sampler(), threading.Event(), []

    def on_step(step):
        steps.append(step.done)
        if len(steps) == 6:
            cancel.set()

    done = []
    with pytest.raises(Cancelled, match="cancelled after 2 steps"):
        sampler.generate_features(
            mixed(),
            range(5),
            solver="euler",
            batch_size=2,
            on_step=on_step,
            cancel=cancel,
            progress=lambda *at: done.append(at),
        )
    assert steps == [1, 2, 3, 4, 1, 2] and done == [(2, 5)]
    with pytest.raises(Cancelled, match="after 0 steps"):
        sampler.generate_features(mixed(), range(5), cancel=cancel)
    assert len(sampler.generate_features(mixed()[:1], [1], cancel=threading.Event())) == 1


def test_memory_splits_batches_and_refuses_what_cannot_fit(caplog):
    sampler = tiny_sampler()
    clip = clip_bytes(sampler.field.network.config, torch.float32, True, CPU)
    rows = []
    options = {"solver": "euler", "on_step": lambda s: s.done == 1 and rows.append(s.rows)}
    with caplog.at_level("INFO", "wavflow"):
        sampler.generate_features([{}] * 5, range(5), memory=int(2.5 * clip), **options)
    assert rows == [(0, 1), (2, 3), (4,)]
    assert f"2 at a time: about {2 * clip / 1e6:.0f} MB of {2.5 * clip / 1e6:.0f} MB" in caplog.text
    with pytest.raises(InputError, match=r"a clip of 2 s needs about \d+ MB, and generation may"):
        sampler.generate_features([{}], [1], memory=clip - 1)
    with pytest.raises(InputError, match=r"a clip of 2e\+06 s needs about .* fewer seconds"):
        sampler.generate(["a bell"], seconds=2e6, window=0)
    with pytest.raises(InputError, match=r"2e\+06 s take about .* fewer seconds, or stream them"):
        sampler.generate(["a bell"], seconds=2e6)


PEAK = """
import sys, torch
from support.networks import CPU, random_model
from wavflow.config.load import load_config
from wavflow.systems.wavflow.footprint import clip_bytes
from wavflow.pipeline.sampler import Sampler

torch.set_num_threads(1)
config = load_config("toy_8k")
dtype = getattr(torch, sys.argv[1])
sampler = Sampler(random_model(config), config, CPU, dtype)


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


sampler.generate_features([{}], [0], steps=2)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
sampler.generate_features([{}] * 48, range(48), steps=2, batch_size=48)
print((status("VmHWM") - before) / 48 / clip_bytes(sampler.field.network.config, dtype, True, CPU))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_below_the_estimate(dtype):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    child = subprocess.run(
        [sys.executable, "-c", PEAK, dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.3 < float(child.stdout) <= 1.0


def test_empty_conditions_are_made_once_for_a_length(monkeypatch):
    sampler = tiny_sampler()
    made = []
    empty = type(sampler.field.network).get_empty_conditions
    monkeypatch.setattr(
        type(sampler.field.network),
        "get_empty_conditions",
        lambda model, count, **options: made.append(count) or empty(model, count, **options),
    )
    for _ in range(2):
        sampler.generate(["a", "b"], seconds=[2.0, 1.0], steps=1)
    assert made == [1, 1]


def test_wrong_features():
    sampler, row = tiny_sampler(), random_features(1)
    with pytest.raises(
        InputError, match=r"row 1: clip_features is \(15, 64\); the model wants \(16, 64\)"
    ):
        bad = {**row, "clip_features": row["clip_features"][1:]}
        sampler.generate_features([row, bad], [1, 2])
    with pytest.raises(InputError, match="row 0: clip_features and sync_features go together"):
        sampler.generate_features([{"sync_features": row["sync_features"]}], [1])


def test_checkpoint_and_configuration_must_agree(saved, tmp_path):
    flat = tmp_path / "ema_epoch_1.pth"
    checkpoint.save(flat, checkpoint.read_weights(saved).state)
    with pytest.raises(InputError, match="carries no configuration"):
        Sampler.load(flat)
    config = load_config("toy_8k", TINY)
    assert Sampler.load(flat, config=config).sample_rate == 8000
    with pytest.raises(InputError, match=r"is \(32, 80, 7\); the model wants \(48, 80, 7\)"):
        Sampler.load(flat, config=replace(config, model=replace(config.model, hidden_dim=48)))
    with pytest.raises(
        InputError, match=r"trained with data\.target_sample_rate 8000; asked for 16000"
    ):
        Sampler.load(
            saved, config=replace(config, data=replace(config.data, target_sample_rate=16000))
        )
    with pytest.raises(InputError, match=r"device is 'abacus'"):
        Sampler.load(saved, device="abacus")
    with pytest.raises(InputError, match=r"dtype is 'int4'"):
        Sampler.load(saved, dtype="int4")


def test_encoders_of_another_width_are_refused():
    data = WavflowDataConfig(
        text_dim=32,
        target_sample_rate=8000,
        audio_duration=2.0,
        audio_dim=80,
        clip_seq_len=16,
        sync_seq_len=48,
        clip_dim=64,
        sync_dim=4,
    )
    model = WavflowModelConfig(
        name="toy_8k", hidden_dim=32, num_heads=1, depth=2, fused_depth=1, encoders="embedded"
    )
    config = Config(model=model, data=data)
    sampler = Sampler(random_model(config), config, CPU, torch.float32)
    with pytest.raises(
        InputError, match=r"text_features is \(77, 64\); the model wants \(77, 32\)"
    ):
        sampler.generate(captions=["x"])


def test_loudness():
    generator = torch.Generator().manual_seed(0)
    sound = Sound(0.01 * torch.randn(16000, generator=generator), 8000).loud(-23.0)
    import pyloudnorm

    meter = pyloudnorm.Meter(8000)
    assert meter.integrated_loudness(sound.audio.numpy()) == pytest.approx(-23, abs=0.1)


# Tables


def table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def report(path):
    return list(csv.DictReader(open(path, encoding="utf-8")))


def test_table_semantics(saved, world, tmp_path):
    sampler = Sampler.load(saved, dtype="float32")
    heldout = list(csv.DictReader(open(world / "heldout.csv")))
    videos = [world / row["video_path"] for row in heldout]
    rows = [
        {
            "video_path": videos[0],
            "caption": "a bell, struck twice",
            "video_exist": 1,
            "text_exist": 1,
            "id": "",
        },
        {
            "video_path": "not/there.mp4",
            "caption": "a drum",
            "video_exist": 0,
            "text_exist": 1,
            "id": "007",
        },
        {
            "video_path": videos[1],
            "caption": "ignored",
            "video_exist": 1,
            "text_exist": 0,
            "id": "mute",
        },
        {"video_path": "", "caption": "a bird", "video_exist": 0, "text_exist": 1, "id": ""},
    ]
    result = infer(
        sampler,
        table(tmp_path / "in.csv", rows),
        tmp_path / "out",
        seed=3,
        guidance=2.0,
        batch_size=3,
        loudness=None,
    )
    assert (result.done, result.failed) == (4, 0)
    ids = [videos[0].stem, "007", "mute", "row_00003"]
    assert sorted(p.name for p in result.out.iterdir()) == sorted(
        [*(f"{i}.wav" for i in ids), *(f"{i}.json" for i in ids), "report.csv", ".lock"]
    )
    assert [row["id"] for row in report(result.report)] == ids
    wanted = sampler.generate(
        captions=["a bell, struck twice", "a drum", None, "a bird"],
        videos=[videos[0], None, videos[1], None],
        seeds=[row_seed(3, id) for id in ids],
        guidance=2.0,
    )
    for id, sound in zip(ids, wanted, strict=True):
        held = load_audio(result.out / f"{id}.wav", 8000)
        torch.testing.assert_close(held, sound.audio, atol=1e-4, rtol=0)


def test_bad_rows_are_skipped_and_reported(saved, world, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 500)
    good = {
        "video_path": "",
        "caption": "a bell",
        "video_exist": "0",
        "text_exist": "1",
        "id": "ok",
    }
    rows = [
        {**good, "id": "a/b"},
        {**good, "id": "gone", "video_path": "gone.mp4", "video_exist": "1"},
        good,
        {**good, "id": "broken", "video_path": "broken.mp4", "video_exist": "1"},
        {**good, "id": "flag", "text_exist": "yes"},
        good,
    ]
    sampler = Sampler.load(saved)
    result = infer(sampler, table(tmp_path / "in.csv", rows), tmp_path / "out", steps=1)
    assert (result.done, result.failed) == (1, 5)
    lines = report(result.report)
    assert [x["status"] for x in lines] == [
        "skipped",
        "failed",
        "ok",
        "failed",
        "skipped",
        "skipped",
    ]
    for line, word in zip(
        lines, ("a/b", "gone.mp4", "", "broken.mp4", "yes", "already"), strict=True
    ):
        assert word in line["reason"]
    assert [p.name for p in sorted(result.out.glob("*.wav"))] == ["ok.wav"]


def test_infer_by_configuration(saved, tmp_path):
    rows = [{"video_path": "", "caption": "a bell", "video_exist": "0", "text_exist": "1"}]
    table(tmp_path / "in.csv", rows)
    (tmp_path / "x.yaml").write_text(
        f"model: {{name: toy_8k, encoders: embedded, hidden_dim: 32, depth: 2, fused_depth: 1,"
        f" num_heads: 1, ckpt_path: {saved}, use_ema: true}}\n"
        f"data: {{csv_path: {tmp_path / 'in.csv'}, target_sample_rate: 8000, audio_duration: 2.0,"
        " audio_dim: 80, clip_seq_len: 16, clip_dim: 64, sync_seq_len: 48, sync_dim: 4,"
        " text_dim: 64}\n"
        f"sampling: {{num_steps: 2}}\noutput: {{output_dir: {tmp_path}, loudness_norm: true}}\n"
        "experiment_id: mine\n"
    )
    result = infer_config(load_config(tmp_path / "x.yaml"))
    assert result.done == 1 and (tmp_path / "mine/row_00000.wav").is_file()
    with pytest.raises(InputError, match=r"model\.ckpt_path is not set"):
        infer_config(load_config(tmp_path / "x.yaml", ["model.ckpt_path=null"]))


def test_row_seeds():
    assert row_seed(1, "a") == row_seed(1, "a")
    assert len({row_seed(s, i) for s in range(20) for i in "abcdef"}) == 120
    assert all(0 <= row_seed(s, "x") < 2**63 for s in range(100))
