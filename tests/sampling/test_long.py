"""Sounds longer than the network's clips: windows, what they are made from, in which order."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import wave as wave_files
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_features, random_model, tiny_sampler
from support.videos import make_video

import wavflow
import wavflow_kernels as kernels
from wavflow.base.errors import Cancelled, InputError
from wavflow.cli.app import main
from wavflow.config.load import load_config
from wavflow.features.encode import encode_video, load_encoders
from wavflow.flow.guidance import mix_guidance
from wavflow.flow.solvers import solve
from wavflow.media.audio import load_audio, save_wav
from wavflow.sampling.batched import Budget
from wavflow.sampling.field import Size
from wavflow.sampling.windowed import Denoising
from wavflow.sampling.windows import Windows
from wavflow.systems.wavflow.scenes import film, stored
from wavflow.training import checkpoint

pytest.importorskip("omegaconf")
TOY = load_config("toy_8k").data
PUBLIC = load_config("medium_16k").data


def size_of(data):
    """The size of a clip."""
    return Size(data.audio_duration, data.target_sample_rate, data.audio_dim)


CLIP = size_of(TOY)
CAPTION = {k: v for k, v in random_features(1).items() if k == "text_features"}


# Where windows lie.


@given(
    seconds=st.floats(0.05, 60),
    overlap=st.one_of(st.none(), st.floats(0, 1.9)),
    grid=st.sampled_from([Fraction(1, 25), Fraction(8, 25), Fraction(1, 8)]),
    loop=st.booleans(),
)
def test_windows_cover_a_sound(seconds, overlap, grid, loop):
    if grid == Fraction(8, 25) and overlap is not None and overlap > 1.6:
        overlap = 1.6
    windows = Windows.cover(seconds, CLIP, overlap=overlap, grid=grid, loop=loop)
    rate = Fraction(TOY.target_sample_rate, TOY.audio_dim)
    assert windows.times[0] == 0 and list(windows.times) == sorted(set(windows.times))
    for time_, start in zip(windows.times, windows.starts, strict=True):
        assert time_ % grid == 0 and abs(start - time_ * rate) <= Fraction(1, 2)
    weights = torch.zeros(windows.tokens)
    for window in range(len(windows)):
        for mine, its in windows.places(window):
            assert mine.stop - mine.start == its.stop - its.start
            weights[its] += windows.weight(window)[mine]
    assert (weights > 0).all()
    if loop:
        assert windows.tokens == max(1, round(Fraction(seconds) * rate))
    else:
        assert windows.tokens >= seconds * rate
        assert windows.tokens - seconds * rate < grid * rate + windows.size * (seconds < 2) + 2
        for k, start in enumerate(windows.starts):
            after = windows.starts[k + windows.reach + 1 :]
            assert all(other >= start + windows.size for other in after)
    hop = max((b - a for a, b in zip(windows.times, windows.times[1:], strict=False)), default=0)
    wanted = Fraction(2, 5) if overlap is None else Fraction(overlap).limit_denominator(10**6)
    assert hop <= 2 - wanted + (0 if loop or len(windows) < 3 else grid)


def test_a_loop_of_no_whole_steps_has_no_hole():
    windows = Windows.cover(13.8125, CLIP, overlap=0, loop=True)
    reached = torch.zeros(windows.tokens, dtype=torch.bool)
    for window in range(len(windows)):
        for _, its in windows.places(window):
            reached[its] = True
    assert windows.tokens == 1381 and reached.all()


def test_windows_at_44_khz_begin_at_the_nearest_token():
    windows = Windows.cover(60, size_of(load_config("medium_44k").data), grid=Fraction(8, 25))
    rate = Fraction(44_100, 200)
    apart = [abs(s - t * rate) for t, s in zip(windows.times, windows.starts, strict=True)]
    assert windows.size == 1764 and 0 < max(apart) <= Fraction(1, 2)  # of 4.5 ms
    assert all(time % Fraction(8, 25) == 0 for time in windows.times)


def test_windows_of_the_public_model():
    windows = Windows.cover(60, size_of(PUBLIC), grid=Fraction(8, 25))
    assert windows.size == 640 and windows.reach == 1
    assert max(b - a for a, b in zip(windows.times, windows.times[1:], strict=False)) <= 6.4
    assert windows.starts[-1] + 640 == windows.tokens == 4813  # 52.16 + 8 s, from 60 s
    with pytest.raises(InputError, match=r"overlap is 7.8 s; wanted 0 to 7.68 s"):
        Windows.cover(60, size_of(PUBLIC), overlap=7.8, grid=Fraction(8, 25))


# What is computed.


def by_hand(sampler, windows, plan, seed, features):
    """All windows at every step, blended, through ``solvers.solve``."""
    noise = kernels.philox_normal(torch.tensor([seed]), windows.tokens, 80)
    weights = [windows.weight(k)[:, None] for k in range(len(windows))]

    def blended(network):
        def predict(t, x):
            sums, total = torch.zeros_like(x[0]), torch.zeros(windows.tokens, 1)
            for k, weight in enumerate(weights):
                at = (windows.starts[k] + torch.arange(windows.size)) % windows.tokens
                sums.index_add_(0, at, weight * network(t, x[:, at])[0])
                total.index_add_(0, at, weight)
            return (sums / total)[None]

        return predict

    field = sampler.field
    with torch.inference_mode():
        conditions = field.conditions([features], CLIP)
        empty = field.empty([features], CLIP)
        guided = blended(
            lambda t, x: mix_guidance(field.predict_pair(t, x, conditions, empty), plan.guidance)
        )
        plain = blended(lambda t, x: field.predict(t, x, conditions))
        tokens = solve(
            lambda t, x: (guided if plan.weight(float(t)) > 1 else plain)(t, x),
            noise,
            plan.table(sampler.config.sampling),
        )
    return sampler.generator.sounds(tokens)[0].audio


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("solver", ["euler", "2m", "rk4"])
def test_windows_share_noise_and_are_blended_at_every_step(prediction, solver):
    sampler = tiny_sampler(prediction_type=prediction)
    options = {"solver": solver, "steps": 3, "guidance": 2.0, "guidance_interval": (0.0, 0.6)}
    wanted = by_hand(sampler, Windows.cover(5.3, CLIP), sampler.plan(**options), 7, CAPTION)
    (made,) = sampler.generate_features([CAPTION], [7], seconds=5.3, **options)
    assert made.audio.numel() == 42400
    torch.testing.assert_close(made.audio, wanted[:42400], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("solver", ["euler", "2m", "heun"])
def test_parts_are_those_of_the_whole(batch, solver):
    sampler = tiny_sampler()
    options = {"solver": solver, "steps": 3, "guidance": 2.0, "seconds": 9.3}
    (whole,) = sampler.generate(["a bell"], seed=5, **options)
    parts = list(sampler.stream("a bell", seed=5, batch_size=batch, **options))
    assert len(parts) > 1 and sum(len(part.audio) for part in parts) == 74400
    made = torch.cat([part.audio for part in parts])
    torch.testing.assert_close(made, whole.audio, atol=3e-5, rtol=1e-4)


@settings(max_examples=15)
@given(
    seconds=st.floats(2.1, 9),
    overlap=st.floats(0, 1.9),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**62),
)
def test_property_parts_are_those_of_the_whole(seconds, overlap, batch, seed):
    """Also where more than two windows share a token."""
    sampler = tiny_sampler()
    options = {"steps": 2, "guidance": 1.0, "seconds": seconds, "overlap": overlap, "seed": seed}
    (whole,) = sampler.generate(["a bell"], **options)
    made = torch.cat([p.audio for p in sampler.stream("a bell", batch_size=batch, **options)])
    torch.testing.assert_close(made, whole.audio, atol=3e-5, rtol=1e-4)


def test_replayed_windows_have_one_batch_size(graphs):
    sampler = tiny_sampler()
    options = {"seconds": 11.0, "steps": 3, "guidance": 2.0, "seed": 4}
    wanted = torch.cat([part.audio for part in sampler.stream("a bell", batch_size=3, **options)])
    sampler.generator.engine, recorder = graphs(sampler.field.network)
    made = torch.cat([part.audio for part in sampler.stream("a bell", batch_size=3, **options)])
    torch.testing.assert_close(made, wanted, atol=3e-5, rtol=1e-4)
    assert recorder.captured == 2  # with guidance and without


def test_attention_settings_may_differ_from_the_trainings(saved):
    given = {"attention_window": 0.5, "rope_scaling": "linear", "dtype": "float32"}
    sampler, plain = wavflow.load(saved, **given), wavflow.load(saved, dtype="float32")
    options = {"seconds": 5.0, "window": 0, "seed": 1, "loudness": None}
    made, other = (s("a bell", **options).audio for s in (sampler, plain))
    assert made.shape == other.shape and (made - other).norm() > 0.01 * other.norm()
    assert sampler.field.network.config.attention_window == 50
    with pytest.raises(InputError, match=r"model.rope_scaling is 'cubic'; wanted one of none"):
        wavflow.load(saved, rope_scaling="cubic")
    with pytest.raises(InputError, match=r"model.attention_window is -1.0; wanted > 0"):
        wavflow.load(saved, attention_window=-1.0)


def test_one_window_is_the_clip():
    sampler = tiny_sampler()
    for options in ({}, {"solver": "2m", "steps": 5}):
        clip = sampler("a bell", seed=3, loudness=None, **options)
        (part,) = sampler.stream("a bell", seed=3, **options)
        torch.testing.assert_close(part.audio, clip.audio, atol=2e-5, rtol=1e-4)


def test_what_is_far_away_changes_nothing():
    """The beginning of a sound hears as many windows on as there are evaluations."""
    sampler = tiny_sampler()
    short, long = (
        sampler("a bell", seconds=s, seed=1, steps=2, loudness=None).audio for s in (10.0, 18.0)
    )
    times = [Windows.cover(s, CLIP).times for s in (10.0, 18.0)]
    assert times[0] == times[1][:6] and times[0][1] == Fraction(8, 5)
    # The last of 6 windows lacks a neighbour: the 5th hears of it at once, the 4th a step later.
    near = int(times[0][4] * 8000)
    torch.testing.assert_close(short[:near], long[:near], atol=3e-5, rtol=1e-4)
    assert (short[near:] - long[near : len(short)]).norm() > 0.1 * short[near:].norm()


def test_memory_does_not_grow_with_the_sound():
    sampler = tiny_sampler()

    def longest(seconds):
        plan, budget = sampler.plan(steps=3), Budget(2)
        features = sampler.encode("a bell")
        sound = sampler.generator.long(features, seconds, 0, plan, 2.0, budget=budget)
        run = Denoising(sound, Now(), None)
        return max(run.state.shape[1] + len(run.conditions) * 200 for _ in run.parts(2))

    held = [longest(seconds) for seconds in (30.0, 60.0, 120.0)]
    assert max(held) < 1.02 * min(held)


class Now:
    """An executor that does at once what it is given."""

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


# What it is made from.


def test_a_window_of_a_video_is_encoded_from_its_own_frames(tmp_path):
    encoders = load_encoders(load_config("toy_8k").model)
    path = make_video(tmp_path / "x.mp4", 150, 25)
    scene = film(encoders, path, CAPTION, 5.9, 2.0)
    assert scene.grid == Fraction(1, 25)
    at = scene.window(Fraction(33, 25))
    cut = encode_video(encoders, path, 2.0, start=Fraction(33, 25))
    assert all(torch.equal(at[key], cut[key]) for key in cut)
    assert torch.equal(at["text_features"], CAPTION["text_features"])
    last = scene.window(Fraction(101, 25))  # to 6.04 s: its last frames are held
    assert last["clip_features"].shape == (16, 64) and last["sync_features"].shape == (48, 4)
    with pytest.raises(InputError, match=r"x.mp4: 0 frames at 25 fps .* from 6.4 s on"):
        film(encoders, path, {}, 6.45, 2.0)


def test_windows_of_stored_features():
    segments = replace(TOY, sync_layout="segments")
    clip = torch.arange(98.0)[:, None].expand(-1, 64)
    sync = torch.arange(8.0 * 37)[:, None].expand(-1, 4)
    scene = stored({"clip_features": clip, "sync_features": sync}, segments)
    assert scene.grid == Fraction(8, 25)
    window = scene.window(Fraction(8 * 5, 25))
    assert window["sync_features"][:, 0].tolist() == list(range(40, 88))
    assert window["clip_features"][:, 0].tolist() == list(range(13, 29))  # from 1.6 s
    window = scene.window(Fraction(8 * 33, 25))
    wanted = [*range(264, 296), *range(288, 296), *range(288, 296)]  # the last segment again
    assert window["sync_features"][:, 0].tolist() == wanted
    assert window["clip_features"][-3:, 0].tolist() == [97, 97, 97]

    even = stored({"clip_features": clip, "sync_features": sync}, TOY)
    assert even.grid == Fraction(1, 8)
    window = even.window(Fraction(95, 8))
    assert window["sync_features"][[0, 10, 11, -1], 0].tolist() == [285, 295, 295, 295]
    still = stored(CAPTION, TOY)
    assert still.window(Fraction(0)) is still.window(Fraction(3))


def test_long_videos_from_the_file_and_from_their_features(tmp_path):
    """Windows at whole seconds see the same frames, but for the change to the first one."""
    sampler = tiny_sampler()
    path = make_video(tmp_path / "x.mp4", 150, 25)
    options = {"seconds": 6.0, "steps": 2, "guidance": 1.0, "overlap": 1.0}
    sound = sampler("a bell", path, seed=2, loudness=None, **options)
    features = sampler.encode("a bell", path, 6.0, window=0)
    (other,) = sampler.generate_features([features], [2], **options)
    assert sound.audio.shape == other.audio.shape == (48000,)
    still = sampler("a bell", seed=2, loudness=None, **options).audio
    apart = (sound.audio - other.audio).norm()
    assert 0 < apart < 0.1 * (sound.audio - still).norm()
    short = {k: v[:-8] for k, v in features.items()}
    with pytest.raises(
        InputError, match=r"row 0: clip_features is \(40, 64\); .* wants \(48, 64\)"
    ):
        sampler.generate_features([short], [2], **options)


def test_a_video_that_is_too_short_is_found_before_the_first_step(tmp_path):
    steps, sampler = [], tiny_sampler()
    path = make_video(tmp_path / "x.mp4", 100, 25)
    with pytest.raises(InputError, match=r"x.mp4: 0 frames at 25 fps \(4.000 s\), wanted 1"):
        sampler("a bell", path, seconds=5.0, on_step=steps.append)
    assert not steps


# Recordings and loops.


def chime(seconds=3.0, rate=8000):
    t = torch.arange(int(seconds * rate)) / rate
    return 0.1 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-t)


def test_a_recording_goes_on():
    sampler, wave = tiny_sampler(), chime()
    made = sampler.complete(wave, "a bell", seconds=7.0, seed=4)
    assert made.audio.shape == (56000,) and torch.equal(made.audio[:24000], wave)
    assert made.audio[24000:].std() > 0.01
    other = sampler.complete(chime() * 0.5, "a bell", seconds=7.0, seed=4)
    # The same sound at half the level: what goes on follows the recording's.
    torch.testing.assert_close(other.audio, made.audio / 2, atol=1e-4, rtol=1e-3)
    away = sampler("a bell", seconds=7.0, seed=4, loudness=None)
    assert (made.audio[24000:32000] - away.audio[24000:32000]).norm() > 0


def test_a_gap_is_filled(tmp_path):
    sampler, wave = tiny_sampler(), chime()
    save_wav(tmp_path / "x.wav", wave, 8000)
    wave = load_audio(tmp_path / "x.wav", 8000)
    made = sampler.complete(tmp_path / "x.wav", gap=(1.004, 1.5), seed=4).audio
    # 1.004 s is in token 100, which is generated whole; 1.5 s is where token 150 begins.
    assert torch.equal(made[:8000], wave[:8000]) and torch.equal(made[12000:], wave[12000:])
    assert not torch.equal(made[8000:12000], wave[8000:12000])


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("solver", ["euler", "2m", "heun"])
def test_kept_tokens_are_the_noised_truth_at_every_step(solver, prediction):
    sampler = tiny_sampler(prediction_type=prediction)
    plan = sampler.plan(solver=solver, steps=4)
    sound = sampler.generator.long(sampler.encode("a bell"), 4.0, 0, plan, 2.0)
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
    kept = torch.ones(16000, dtype=torch.bool)
    given, _ = sampler.maker.known(wave, kept, sound.windows.tokens)
    noise = kernels.philox_normal(torch.tensor([0]), 200, 80)[0]
    times = sound.table[1:, 0].tolist()

    def check(evaluation):
        t = times.pop(0) if times else 1.0
        wanted = (1 - t) * noise + t * given.tokens[:200]
        torch.testing.assert_close(run.state[0, :200], wanted, atol=2e-5, rtol=1e-4)

    run = Denoising(replace(sound, known=given), Now(), check)
    with torch.inference_mode():
        (tokens,) = run.parts(None)
    assert not times and tokens.shape == (400, 80)


@pytest.mark.parametrize("seconds", [0.7, 2.0, 5.3])
def test_a_loop_is_a_ring_of_windows(seconds):
    sampler = tiny_sampler()
    options = {"steps": 3, "guidance": 2.0, "guidance_interval": (0.0, 1.0)}
    windows = Windows.cover(seconds, CLIP, loop=True)
    wanted = by_hand(sampler, windows, sampler.plan(**options), 7, sampler.encode("a bell"))
    made = sampler.loop("a bell", seconds=seconds, seed=7, **options)
    assert made.audio.numel() == round(seconds * 100) * 80
    torch.testing.assert_close(made.audio, wanted, atol=3e-5, rtol=1e-4)


# What can go wrong.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: s.generate(["a"], seconds=5, overlap=2.0),
            r"overlap is 2 s; wanted 0 to 1.96 s",
        ),
        (
            lambda s: s.generate(["a"], seconds=5, overlap=-0.1),
            "overlap is -0.1; wanted seconds, 0 or more",
        ),
        (
            lambda s: s.generate(["a"], seconds=5, window=-1),
            "window is -1; wanted seconds, 0 or more",
        ),
        (
            lambda s: s.generate(["a"], seconds=5, solver="adaptive"),
            "made of windows; wanted a sol",
        ),
        (lambda s: s.complete(chime()), "nothing to generate: the recording has 3 s"),
        (lambda s: s.complete(chime(), gap=(0, 3)), "the gap is all of the recording's 3 s"),
        (lambda s: s.complete(chime(), gap=(2, 1)), "gap is 2 to 1 s; wanted two times in order"),
        (lambda s: s.stream(seconds=4), "nothing to generate: give a caption, a video or both"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny_sampler())


def test_cancelling_and_progress():
    from threading import Event

    sampler, cancel, seen = tiny_sampler(), Event(), []

    def watch(step):
        seen.append((step.rows, step.done, step.total))
        (sound,) = step.preview()
        assert sound.audio.numel() % 80 == 0 and sound.audio.abs().max() <= 1
        if step.rows == (1,) and step.done >= 10:
            cancel.set()

    with pytest.raises(Cancelled, match="cancelled after 10 of 20 evaluations"):
        sampler.generate(["a", "b"], seconds=[2.0, 8.4], steps=4, on_step=watch, cancel=cancel)
    assert seen[-2:] == [((1,), 5, 20), ((1,), 10, 20)]
    assert [s[0] for s in seen[:4]] == [(0,)] * 4


def test_another_sound_may_be_made_between_parts():
    sampler = tiny_sampler()
    options = {"seconds": 9.0, "steps": 3, "batch_size": 1}
    wanted = torch.cat([part.audio for part in sampler.stream("a bell", **options)])
    made = []
    for part in sampler.stream("a bell", **options):
        made.append(part.audio)
        sampler("a drum", seconds=0.6)
    assert torch.equal(torch.cat(made), wanted)


# Several processes and the command line.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint_latest.pth"
    config = load_config("toy_8k", ["model.hidden_dim=32", "model.depth=2", "model.fused_depth=1"])
    config = replace(config, model=replace(config.model, num_heads=1))
    model = random_model(config)
    state = {"model": model.state_dict(), "config": config.to_dict(), "global_step": 1}
    ema = {k: v.detach() for k, v in model.named_parameters()}
    state |= {"model_ema1": ema, "model_ema2": ema, "optimizer": {}, "epoch": 0}
    state |= {"ema_age": 9, "ema_decay": {"ema1": 0.9, "ema2": 0.9}}
    checkpoint.save(path, state)
    return path


def cli(*arguments):
    """Exit code of `wavflow generate`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in ["generate", *arguments]])
    return caught.value.code or 0


def start(*arguments):
    root = Path(wavflow.__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("processes, options", [(2, ["--seconds", 9.3]), (3, ["--window", 0])])
def test_processes_make_the_sound_of_one(saved, tmp_path, processes, options):
    """They share the windows of a long sound, or the tokens of one in one piece."""
    options = ["--checkpoint", saved, "--caption", "a bell", "--seconds", 3.7, *options]
    options += ["--dtype", "float32", "--keep-loudness", "--device", "cpu", "--out"]
    assert cli(*options, tmp_path / "one.wav") == 0
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    child = start(*launcher, "-m", "wavflow", "generate", *options, tmp_path / "more.wav")
    assert child.wait(timeout=240) == 0, child.stderr.read()
    one, more = (load_audio(tmp_path / f"{name}.wav", 8000) for name in ("one", "more"))
    torch.testing.assert_close(one, more, atol=1e-4, rtol=0)
    assert one.numel() == 8000 * (9.3 if processes == 2 else 3.7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["more.wav", "one.wav"]


def test_a_killed_stream_leaves_a_valid_file(saved, tmp_path):
    options = ["--checkpoint", saved, "--caption", "a bell", "--stream", "--out"]
    out = tmp_path / "x.wav"
    assert cli(*options, tmp_path / "all.wav", "--seconds", "34") == 0
    child = start("wavflow", "generate", *options, out, "--seconds", "3000.4")
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 300_000):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with wave_files.open(str(out)) as file:
        assert file.getframerate() == 8000 and file.getnframes() > 100_000
        count = file.getnframes()
    found = load_audio(out, 8000)
    assert found.numel() == count and torch.isfinite(found).all()
    whole = load_audio(tmp_path / "all.wav", 8000)
    near = 16_000  # far from the shorter sound's end they are the same
    torch.testing.assert_close(found[:near], whole[:near], atol=0.01, rtol=0)


PEAK = """
import sys
import torch, wavflow
from wavflow.base.memory import used_memory
torch.set_num_threads(1)
pipe = wavflow.load(sys.argv[1], dtype="float32")
sound = pipe.stream("a bell", seconds=float(sys.argv[2]), steps=2, guidance=1.0, batch_size=4)
samples = sum(len(part.audio) for part in sound)
print(samples, used_memory(torch.device("cpu")))
"""


def test_ten_minutes_take_the_memory_of_one(saved):
    root = Path(wavflow.__file__).parents[1]
    peaks = {}
    for seconds in (30, 600):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(saved), str(seconds)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        samples, peaks[seconds] = map(int, done.stdout.split())
        assert samples == seconds * 8000
    assert peaks[600] < 1.05 * peaks[30] and peaks[600] < 2e9, peaks


def test_the_command_line(saved, tmp_path, capsys):
    def generate(*arguments):
        cli("--checkpoint", saved, *arguments)
        return " ".join(capsys.readouterr().err.split())

    save_wav(tmp_path / "in.wav", chime(), 8000)
    said = generate("--recording", tmp_path / "in.wav", "--seconds", 5, "--out", tmp_path / "a.wav")
    assert "5.00 s at 8000 Hz" in said
    made = load_audio(tmp_path / "a.wav", 8000)
    assert torch.equal(made[:24000], load_audio(tmp_path / "in.wav", 8000))
    generate("--caption", "x", "--loop", "--seconds", 3, "--out", tmp_path / "b.wav")
    gap = ["--gap", 1, 2, "--out", tmp_path / "c.flac"]
    generate("--recording", tmp_path / "in.wav", *gap)
    make_video(tmp_path / "v.mp4", 150, 25)
    (tmp_path / "t.csv").write_text(f"id,video_path,caption\nr,{tmp_path / 'v.mp4'},x\n")
    table = ["--csv", tmp_path / "t.csv", "--seconds", 5, "--out", tmp_path / "o"]
    generate(*table, "--overlap", 0.5)
    assert json.loads((tmp_path / "o/r.json").read_text())["overlap"] == 0.5
    for wrong, message in (
        (["--caption", "x", "--loop", "--stream"], "stream and loop do not go together"),
        (["--caption", "x", "--gap", 1, 2], "gap wants a recording"),
        (["--loop", "--video", "v.mp4"], "loop wants a caption, and no video"),
        (["--stream", "--csv", "t.csv"], "--csv and --stream do not go together"),
    ):
        assert message in generate(*wrong, "--out", tmp_path / "d.wav")
    said = generate("--caption", "x", "--stream", "--out", tmp_path / "d.flac")
    assert "wanted a .wav file with --stream" in said
