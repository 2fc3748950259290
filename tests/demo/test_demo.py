"""The demo: its figures on sounds with known answers, its report's links, and a tiny whole run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from support.networks import save_tiny

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.config.load import config_from_dict, load_config
from wavflow.demo import score, ship
from wavflow.demo.page import write_page
from wavflow.demo.report import draw_pictures, spectrogram
from wavflow.demo.run import HELDOUT_CLIPS, run_demo
from wavflow.demo.score import CONTROLS, FULL, JUDGED, MODES, QUICK, SHIPPED, recompute
from wavflow.demo.sounds import BATCH, generate, jobs_of, other_conditions, read_heldout
from wavflow.evaluation.toy import (
    KindClassifier,
    Matches,
    kind_features,
    match,
    onset_figures,
    onsets,
    share,
)
from wavflow.features.extract import extract
from wavflow.media.audio import load_audio
from wavflow.pipeline.sampler import Sampler
from wavflow.toy.scene import KINDS, make_scene
from wavflow.toy.sound import synthesize
from wavflow.toy.world import write_split, write_toy_world
from wavflow.training import checkpoint
from wavflow_kernels import lift_patchify, unpatchify

RATE = 8000


def scenes(split: str, count: int):
    return [make_scene(11, split, index, 2.0) for index in range(count)]


def sound(scene) -> np.ndarray:
    return synthesize(scene, 2.0, RATE) / 32768.0


def with_noise(wave: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    return wave + 10 ** (-snr / 20) * wave.std() * rng.standard_normal(wave.size)


def lifted(wave: np.ndarray) -> np.ndarray:
    tokens = lift_patchify(torch.tensor(wave[None]).float(), token_size=80, tokens=200)
    return unpatchify(tokens, samples=wave.size)[0].numpy()


def figures(clips, waves) -> Matches:
    pairs = zip(clips, waves, strict=True)
    return sum((match(onsets(w, RATE), clip.times) for clip, w in pairs), Matches())


@pytest.fixture(scope="module")
def true():
    clips = scenes("heldout", 48)
    return clips, [sound(clip) for clip in clips]


@pytest.fixture(scope="module")
def classifier() -> KindClassifier:
    clips = scenes("train", 160)
    return KindClassifier(RATE).fit([sound(c) for c in clips], [c.kind for c in clips])


def test_onsets_of_true_sounds_are_the_events(true) -> None:
    clips, waves = true
    found = figures(clips, waves)
    assert (found.recall, found.precision) == (1.0, 1.0)
    for clip, wave in zip(clips, waves, strict=True):
        assert np.abs(onsets(wave, RATE) - clip.times).max() < 0.008


@pytest.mark.parametrize("snr", [20, 10, 3])
def test_onsets_survive_hiss_and_the_clamp_of_the_lift(true, snr: float) -> None:
    clips, waves = true
    rng = np.random.default_rng(0)
    found = figures(clips, [with_noise(lifted(wave), snr, rng) for wave in waves])
    assert found.recall > 0.97 and found.precision > 0.97


def test_onsets_do_not_depend_on_loudness(true) -> None:
    for wave in true[1][:8]:
        assert np.allclose(onsets(wave * 0.01, RATE), onsets(wave, RATE), atol=1e-3)


def test_shifted_sounds_lose_their_events(true) -> None:
    clips, waves = true

    def shifted(seconds: float) -> Matches:
        signs = np.random.default_rng(0).choice([-1, 1], len(waves))
        moved = [
            np.roll(wave, int(sign * seconds * RATE))
            for wave, sign in zip(waves, signs, strict=True)
        ]
        return figures(clips, moved)

    assert shifted(0.02).recall > 0.97
    assert shifted(0.15).recall < 0.1
    others = figures(clips, waves[5:] + waves[:5])
    assert 0.02 < others.recall < 0.35


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(16000),
        np.full(16000, 0.3),
        np.random.default_rng(0).standard_normal(16000) * 0.1,
        0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / RATE),
        np.zeros(5),
        np.zeros(1),
    ],
    ids=["silence", "offset", "hiss", "hum", "short", "one sample"],
)
def test_steady_sounds_have_no_onsets(wave: np.ndarray) -> None:
    assert onsets(wave, RATE).size == 0
    assert np.isfinite(kind_features(wave, RATE)).all()


def test_onsets_refuse_another_shape() -> None:
    with pytest.raises(ValueError, match="wanted \\(t,\\)"):
        onsets(np.zeros((2, 100)), RATE)


def test_quick_repeats_are_one_onset() -> None:
    wave = np.zeros(16000)
    for start in (4000, 4400):  # 50 ms apart
        wave[start : start + 2000] += np.exp(-np.arange(2000) / 300) * 0.4
    assert len(onsets(wave, RATE)) == 1


def test_match_pairs_one_to_one() -> None:
    assert match([], []) == Matches(0, 0, 0)
    assert match([1.0], []) == Matches(0, 0, 1)
    assert match([], [1.0]) == Matches(0, 1, 0)
    assert match([1.0, 1.02], [1.01]) == Matches(1, 1, 2)
    assert match([1.05], [1.0]).matched == 1
    assert match([1.051], [1.0]).matched == 0
    # The nearest event of both onsets is the same one; two pairs are possible all the same.
    assert match([0.97, 1.03], [0.93, 1.0]).matched == 2
    assert Matches().recall == Matches().precision == 0.0


times = st.lists(st.integers(0, 40), max_size=6).map(lambda ticks: [t / 20 for t in ticks])


@given(times, times)
def test_match_finds_as_many_pairs_as_there_are(heard: list[float], events: list[float]) -> None:
    def most(heard: list[float], events: list[float]) -> int:
        if not heard:
            return 0
        best = most(heard[1:], events)
        for i, event in enumerate(events):
            if abs(heard[0] - event) <= 0.05 + 1e-9:
                best = max(best, 1 + most(heard[1:], events[:i] + events[i + 1 :]))
        return best

    assert match(heard, events).matched == most(heard, events)
    assert match(events, heard).matched == match(heard, events).matched


def test_classifier_knows_unseen_true_sounds_and_noisy_ones(true, classifier) -> None:
    clips, waves = true
    rng = np.random.default_rng(1)

    def accuracy(waves) -> float:
        said = classifier.predict(waves)
        return float(np.mean([a == clip.kind for a, clip in zip(said, clips, strict=True)]))

    assert accuracy(waves) == 1.0
    assert accuracy([lifted(wave) for wave in waves]) > 0.97
    assert accuracy([0.05 * wave for wave in waves]) == 1.0
    assert accuracy([with_noise(lifted(wave), 10, rng) for wave in waves]) > 0.95
    assert accuracy([np.zeros(16000)] * len(waves)) < 0.4
    assert accuracy([rng.standard_normal(16000) for _ in waves]) < 0.4


def test_other_conditions_are_a_derangement_of_other_kinds() -> None:
    kinds = [KINDS[i % 4] for i in range(64)]
    others = other_conditions(kinds, 3)
    assert sorted(others) == list(range(64))
    assert all(kinds[i] != kinds[other] for i, other in enumerate(others))
    assert others == other_conditions(kinds, 3) != other_conditions(kinds, 4)
    same = other_conditions(["bell"] * 5, 0)
    assert all(i != other for i, other in enumerate(same))


# A folder as a run leaves it, with true sounds in the place of generated ones.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_toy_world(out / "toy", 64, 5, heldout=16, workers=1)
    import soundfile

    world = json.loads((out / "toy" / "events.json").read_text())
    ids = [id for id, scene in world.items() if scene["split"] == "heldout"]
    others = other_conditions([world[id]["kind"] for id in ids], 0)
    entries = []
    for series in (SHIPPED, *CONTROLS, QUICK):
        for mode in MODES:
            for index, id in enumerate(ids):
                source = ids[others[index]] if series == "shuffled" else id
                path = out / "wav" / series / mode / f"{id}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                if series in ("untrained", QUICK):
                    soundfile.write(path, np.zeros(16000), RATE)
                else:
                    shutil.copy(out / "toy" / "audio" / f"{source}.wav", path)
                entries.append(
                    {
                        "id": id,
                        "mode": mode,
                        "series": series,
                        "kind": world[id]["kind"],
                        "events": world[id]["times"],
                        "caption": 'a "bell" <rings> & stops',
                        "generated": path.relative_to(out).as_posix(),
                        "true": f"toy/audio/{id}.wav",
                    }
                )
    (out / "events.json").write_text(json.dumps(entries))
    return out


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict:
    return {
        "seconds_total": 61.0,
        "reused": ["train clips"],
        "weights": {"file": "<toy>.safetensors", "steps": 1500, "parameters": 3_000_000},
        "training": {
            "how": QUICK,
            "steps": 100,
            "seconds": 30.0,
            "loss": 0.5,
            "parameters": 1_000_000,
        },
        "dtype": "float32",
        "device_name": "<cpu>",
        "threads": 1,
        "seed": 0,
        **recompute(finished),
    }


def test_recompute_scores_the_files(finished: Path, metrics: dict) -> None:
    for mode in ("vt2a", "v2a"):
        assert metrics[SHIPPED][mode] == dict.fromkeys(score.WANTED[mode], 1.0)
        for silent in ("untrained", QUICK):
            assert metrics[silent][mode]["onset_recall"] == 0.0
        assert metrics["shuffled"][mode]["onset_recall"] < 0.5
    assert metrics[SHIPPED]["t2a"] == {"class_accuracy": 1.0}
    assert metrics["shuffled"]["t2a"] == {"class_accuracy": 0.0}
    assert metrics["ceiling"] == metrics[SHIPPED]["vt2a"]
    assert 0.02 < metrics["chance"]["onset_recall"] < 0.35
    assert 0.1 < metrics["chance"]["class_accuracy"] < 0.3
    bars = metrics["bars"]
    assert {name.partition(".")[0] for name in bars} == {SHIPPED, *CONTROLS}
    assert {"shipped.t2a.class_accuracy", "shuffled.v2a.onset_precision"} <= set(bars)
    assert all(type(bar["passed"]) is bool for bar in bars.values())
    found = {"value": 1.0, "wanted": ">= 0.9", "passed": True}
    assert bars["shipped.vt2a.onset_recall"] == found


def test_a_full_training_has_the_bars_of_the_packaged_network(metrics: dict) -> None:
    judged = score.bars({**metrics, FULL: metrics[QUICK]})
    assert QUICK not in JUDGED
    for mode, wanted in score.WANTED.items():
        for name, least in wanted.items():
            assert judged[f"full.{mode}.{name}"]["wanted"] == f">= {least:g}"
    assert not judged["full.vt2a.onset_recall"]["passed"]


def test_a_changed_wav_changes_the_figures(finished: Path, metrics: dict, tmp_path: Path) -> None:
    import soundfile

    copy = shutil.copytree(finished, tmp_path / "copy")
    for path in sorted((copy / "wav" / SHIPPED / "v2a").iterdir())[:8]:
        soundfile.write(path, np.zeros(16000), RATE)
    changed = recompute(copy)
    assert changed[SHIPPED]["v2a"]["onset_recall"] < 0.8
    assert changed[SHIPPED]["vt2a"] == metrics[SHIPPED]["vt2a"]
    assert not changed["bars"]["shipped.v2a.onset_recall"]["passed"]


def test_a_missing_wav_is_named(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    gone = next((copy / "wav" / SHIPPED / "t2a").iterdir())
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        recompute(copy)
    (copy / "events.json").unlink()
    with pytest.raises(InputError, match="events.json: no such file"):
        recompute(copy)


def links(page: str) -> list[str]:
    return [unquote(link) for link in re.findall(r"(?:src|href)=['\"]([^'\"]+)['\"]", page)]


def test_report_links_resolve_and_text_is_escaped(finished: Path, metrics: dict) -> None:
    draw_pictures(finished, metrics, [(step, 1.0 / (1 + step)) for step in range(0, 100, 5)])
    (finished / "metrics.json").write_text(json.dumps(metrics))
    write_page(finished, metrics)
    assert (finished / "report.png").stat().st_size > 50_000
    page = (finished / "report.html").read_text(encoding="utf-8")
    found = links(page)
    assert len(found) > 40
    for link in found:
        assert not re.match(r"[a-z]+:|/", link), f"{link} leaves the folder"
        assert (finished / link).stat().st_size > 0
    assert "<rings>" not in page and "&lt;rings&gt; &amp; stops" in page
    assert {Path(link).suffix for link in found} == {".wav", ".mp4", ".png", ".json"}
    for kind in KINDS:
        assert f"<p>{kind}, " in page
    assert "&lt;toy&gt;.safetensors" in page
    assert page.count("trained here, briefly</h3>") == 12
    assert "100 steps in 30 s on this machine" in page


def test_report_without_a_training_names_none(finished: Path, metrics: dict) -> None:
    alone = {key: value for key, value in metrics.items() if key != QUICK} | {"training": None}
    draw_pictures(finished, alone, [])
    write_page(finished, alone)
    assert (finished / "report.png").stat().st_size > 50_000
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "trained here" not in page and "from nothing" not in page


def test_spectrogram_is_aligned_and_blank_in_silence() -> None:
    wave = np.zeros(16000)
    wave[8000] = 1.0
    picture = spectrogram(wave, RATE)
    assert picture.min() >= 0 and picture.max() <= 1
    assert abs(picture.sum(axis=0).argmax() / picture.shape[1] - 0.5) < 0.01
    assert not spectrogram(np.zeros(16000), RATE).any()


def test_demo_refuses_a_world_without_clips(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="heldout is 2"):
        run_demo(tmp_path, heldout=2)


def test_demo_refuses_an_unknown_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train is 'long'; wanted one of quick, full, none"):
        run_demo(tmp_path, train="long")


TINY = (
    "training.max_steps=10",
    "training.batch_size=4",
    "training.log_freq=4",
    "training.compile=false",
    "model.hidden_dim=64",
    "model.num_heads=1",
    "model.depth=2",
    "model.fused_depth=1",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to hear first, in the place of the packaged one."""
    path = save_tiny(tmp_path_factory.mktemp("weights") / "tiny.pth")
    content = state_dict.load(path)
    checkpoint.save(path, {**content, "model_ema1": content["model"], "ema_age": 900})
    return path


def test_tiny_demo_of_every_training(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    out = tmp_path / "out put"
    options = {"clips": 16, "heldout": 8, "overrides": TINY, "weights": tiny}
    options["train_seconds"] = 1e6  # the steps end it
    alone = run_demo(out, train="none", **options)
    assert alone["training"] is None and alone["reused"] == []
    assert alone["weights"]["file"] == "tiny.pth" and alone["seconds_first_sounds"] > 0

    metrics = run_demo(out, **options)
    assert metrics["reused"] == [
        "heldout clips", "heldout features", "shipped sounds", "train clips"
    ]  # fmt: skip
    assert (metrics["training"]["how"], metrics["training"]["steps"]) == (QUICK, 10)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    again = recompute(out)
    assert again == {key: metrics[key] for key in again}
    assert again[SHIPPED] == alone[SHIPPED] and QUICK not in alone
    entries = json.loads((out / "events.json").read_text())
    assert len(entries) == 8 * 3 * 4
    assert {(e["mode"], e["series"]) for e in entries} == {
        (mode, series) for mode in MODES for series in (SHIPPED, QUICK, *CONTROLS)
    }
    for entry in entries:
        for key in ("generated", "true"):
            info = soundfile.info(out / entry[key])
            assert (info.samplerate, info.frames) == (RATE, 16000)
        assert (entry["condition"] != entry["id"]) == (entry["series"] == "shuffled")
    for link in links((out / "report.html").read_text(encoding="utf-8")):
        assert (out / link).stat().st_size > 0
    trained = (out / entries[-1]["generated"]).read_bytes()
    assert "/quick/" in entries[-1]["generated"]
    said = capsys.readouterr().err
    assert "first sounds after" in said and "loss nan" not in said

    full = run_demo(out, train=FULL, **options)
    assert full["reused"] == [
        "heldout clips", "heldout features", "shipped sounds", "train clips",
        "train features",
    ]  # fmt: skip
    assert full["training"]["how"] == FULL and full[SHIPPED] == alone[SHIPPED]
    assert QUICK not in full and f"{FULL}.t2a.class_accuracy" in full["bars"]
    assert "10 steps, " in capsys.readouterr().err
    # Both are the same ten steps.
    entries = json.loads((out / "events.json").read_text())
    assert (out / entries[-1]["generated"]).read_bytes() == trained


# The packaged weights


def test_packaged_weights_meet_the_bars_on_unseen_clips(
    tmp_path: Path, classifier: KindClassifier
) -> None:
    """Clips of another world than the training's, from video and caption."""
    write_split(tmp_path / "toy", "heldout", BATCH, 7, workers=1)
    assert extract(tmp_path / "toy" / "heldout.csv", tmp_path / "features").done == BATCH
    sampler = Sampler.load("toy_8k", "cpu")
    assert sampler.dtype in (torch.float32, torch.bfloat16)
    clips = read_heldout(tmp_path, sampler.config)
    (job, *_) = jobs_of(sampler, SHIPPED, clips)
    entries = generate(tmp_path, [job], seed=7, progress=lambda *_: None)
    assert [entry["mode"] for entry in entries] == ["vt2a"] * BATCH
    waves = [load_audio(tmp_path / entry["generated"], RATE) for entry in entries]
    heard = zip((onsets(w, RATE) for w in waves), (e["events"] for e in entries), strict=True)
    found = onset_figures(heard)
    found["class_accuracy"] = share(classifier.predict(waves), [e["kind"] for e in entries])
    for name, least in score.WANTED["vt2a"].items():
        assert found[name] >= least, found


def test_packaged_weights_say_where_they_come_from() -> None:
    path = checkpoint.find("toy_8k")
    assert path.stat().st_size < ship.MOST_BYTES
    weights = checkpoint.read_weights("toy_8k")
    assert all(tensor.dtype == torch.float16 for tensor in weights.state.values())
    about = weights.provenance
    assert about["licence"] == "Apache-2.0" and re.fullmatch("[0-9a-f]{40}", about["commit"])
    assert about["steps"] == weights.global_step == load_config("toy_8k").training.max_steps
    assert [c.split()[:2] for c in about["commands"]][:3] == [
        ["wavflow", "toy"], ["wavflow", "extract"], ["wavflow", "train"]
    ]  # fmt: skip
    assert {(f["world"], f["dtype"]) for f in about["figures"]} >= {
        (seed, dtype) for seed in (0, 1, 2) for dtype in ("float32", "bfloat16")
    }
    assert all(figures["clips"] == HELDOUT_CLIPS for figures in about["figures"])
    for mode, wanted in score.WANTED.items():
        for name, least in wanted.items():
            for dtype in ("float32", "bfloat16"):
                rows = [f for f in about["figures"] if f["dtype"] == dtype]
                assert np.mean([f[mode][name] for f in rows]) >= least
                assert all(f[mode][name] >= least for f in rows if f["world"] == about["seed"])
    assert weights.config["data"]["csv_path"] is None


def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, clips: int) -> Path:
    """Runs `ship` on a training that ended with some weights, in a world of few clips."""
    monkeypatch.setattr(ship, "CLIPS", {QUICK: clips, FULL: clips})
    monkeypatch.setattr(ship, "HELDOUT_CLIPS", clips // 5)
    monkeypatch.setattr(ship, "CONTROL_CLIPS", 8)
    weights = checkpoint.read_weights(source)
    content = {"model": weights.state, "model_ema1": weights.state, "ema_age": 1500}
    path = tmp_path / "run" / checkpoint.LATEST
    checkpoint.save(path, {**content, "config": weights.config, "global_step": 1500})
    out = tmp_path / "out.safetensors"
    ship.ship(path.parent, out, tmp_path, seeds=[3], dtypes=["float32"], commit="0" * 40)
    return out


def test_ship_refuses_what_misses_a_bar(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"worlds \[3\], float32: .*shipped\.vt2a\.onset_recall 0\."
    ):
        shipped(tmp_path, monkeypatch, tiny, 40)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
def test_ship_writes_what_meets_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint.find("toy_8k")
    weights = checkpoint.read_weights(shipped(tmp_path, monkeypatch, source, 160))
    wanted = checkpoint.read_weights("toy_8k")
    assert all(torch.equal(weights.state[name], wanted.state[name]) for name in wanted.state)
    # Through today's keys: a file carries those of its own time.
    assert config_from_dict(weights.config) == config_from_dict(wanted.config)
    (figures,) = weights.provenance["figures"]
    assert (figures["world"], figures["dtype"], figures["clips"]) == (3, "float32", 32)
