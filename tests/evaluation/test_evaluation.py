"""Evaluation: measures against scipy and closed forms, and whole runs on real files."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

pytest.importorskip("sklearn")
pytest.importorskip("soundfile")

import soundfile
from scipy import linalg, special, stats

from wavflow.base.errors import InputError
from wavflow.cli.app import main
from wavflow.evaluation import distances, listen
from wavflow.evaluation.distances import (
    Moments,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)
from wavflow.evaluation.evaluate import Evaluation, Given, evaluate
from wavflow.evaluation.extractors import Ast, Clap, melstats
from wavflow.evaluation.figures import Settings
from wavflow.evaluation.rows import read_rows
from wavflow.evaluation.scores import (
    bootstrap,
    cosine_similarity,
    inception_score,
    kl_sigmoid,
    kl_softmax,
    offsets,
)
from wavflow.evaluation.signals import check, compare
from wavflow.evaluation.toy import Matches, match, onsets
from wavflow.toy.world import write_toy_world

RATE = 8000


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Rows with exactly this mean and covariance."""
    rows = normal(n, len(mean), seed)
    rows -= rows.mean(axis=0)
    whitener = np.linalg.inv(np.linalg.cholesky(np.cov(rows.T)))
    return rows @ whitener.T @ np.linalg.cholesky(covariance).T + mean


# Distances of sets.


def test_moments_are_numpys_however_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 5 + normal(200, 4)
    for block in (1024, 7, 1):
        monkeypatch.setattr(distances, "BLOCK", block)
        found = Moments.of(rows)
        assert found.count == 200
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-12, atol=1e-14)


def test_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    a, b = normal(300, 12) @ normal(12, 12, 1), 0.3 + normal(400, 12, 2) @ normal(12, 12, 3)
    c, d = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(c @ d)
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c + d - 2 * root.real)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    variances = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    means = np.zeros(3), np.array([1.0, -2.0, 0.5])
    a, b = (
        with_moments(m, np.diag(v), 50, i)
        for i, (m, v) in enumerate(zip(means, variances, strict=True))
    )
    wanted = np.sum(means[1] ** 2) + np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rows", [2, 10, 63])
def test_frechet_distance_with_fewer_rows_than_dimensions(rows: int) -> None:
    a = normal(rows, 64) * np.logspace(0, -6, 64)
    here, spread = Moments.of(a), np.trace(np.cov(a.T))
    assert frechet_distance(here, here) <= 1e-13 * spread
    assert frechet_distance(here, Moments.of(a + 0.5)) == pytest.approx(64 * 0.25, rel=1e-12)
    larger = Moments.of(3 * (a - a.mean(0)) + a.mean(0))
    assert frechet_distance(here, larger) == pytest.approx(4 * spread, rel=1e-12)


seeds, sizes = st.integers(0, 10_000), st.integers(2, 12)


@given(seeds, sizes, sizes, sizes)
def test_distances_do_not_see_order_rotation_or_side(seed: int, n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + rng.standard_normal(d)
    turn = linalg.qr(rng.standard_normal((d, d)))[0]
    there = frechet_distance(Moments.of(a), Moments.of(b))
    near = pytest.approx(there, rel=1e-9, abs=1e-11)
    assert frechet_distance(Moments.of(b), Moments.of(a)) == near
    assert frechet_distance(Moments.of(a @ turn), Moments.of(b @ turn)) == near
    assert frechet_distance(Moments.of(a[::-1]), Moments.of(b[rng.permutation(m)])) == near
    apart = kernel_distance(a, b)
    near = pytest.approx(apart, rel=1e-9, abs=1e-11)
    assert kernel_distance(a @ turn + 7, b @ turn + 7) == near
    assert kernel_distance(3 * a[::-1], 3 * b[rng.permutation(m)]) == near


def test_infinity_takes_the_bias_of_few_rows_away() -> None:
    wanted = Moments(10**6, np.zeros(8), np.eye(8) * (10**6 - 1))
    plain, straight = [], []
    for seed in range(20):
        rows = normal(400, 8, seed)
        plain.append(frechet_distance(Moments.of(rows), wanted))
        straight.append(frechet_distance_infinity(rows, wanted, seed=seed))
    assert np.mean(plain) > 0.05
    assert abs(np.mean(straight)) < 0.15 * np.mean(plain)
    moved = [frechet_distance_infinity(normal(400, 8, s) + 1, wanted, seed=s) for s in range(20)]
    assert np.mean(moved) == pytest.approx(8, rel=0.02)
    with pytest.raises(ValueError, match="at least 10 rows, found 9"):
        frechet_distance_infinity(rows[:9], wanted)


def test_kernel_distance_is_the_plain_double_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(9, 3), 1 + normal(6, 3, 1)
    width = np.median([np.linalg.norm(x - y) for i, x in enumerate(b) for y in b[:i]])

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        pairs = [(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if x is not y or i != j]
        return np.mean([math.exp(-np.sum((p - q) ** 2) / (2 * width**2)) for p, q in pairs])

    wanted = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    for block in (1024, 4):
        monkeypatch.setattr(distances, "BLOCK", block)
        assert kernel_distance(a, b) == pytest.approx(wanted, rel=1e-12)


def test_kernel_distance_has_no_bias_and_finds_a_shift() -> None:
    same = [kernel_distance(normal(20, 8, 2 * s), normal(20, 8, 2 * s + 1)) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(200)
    assert min(same) < 0
    moved = kernel_distance(normal(20, 8) + 0.7, normal(20, 8, 1))
    assert moved > max(same)


def test_distances_refuse_what_has_none() -> None:
    rows = normal(5, 3)
    with pytest.raises(ValueError, match="at least 2 rows, found 1"):
        frechet_distance(Moments.of(rows[:1]), Moments.of(rows))
    with pytest.raises(ValueError, match="3 and 2 wide"):
        frechet_distance(Moments.of(rows), Moments.of(rows[:, :2]))
    with pytest.raises(ValueError, match="wanted \\(n, d\\)"):
        Moments.of(rows[:0])
    with pytest.raises(ValueError, match="3 and 2 wide"):
        kernel_distance(rows, rows[:, :2])
    with pytest.raises(ValueError, match="found 5 and 1"):
        kernel_distance(rows, rows[:1])
    with pytest.raises(ValueError, match="no width"):
        kernel_distance(rows, np.full((4, 3), 0.1))


# Scores.


def test_inception_score_between_one_and_the_classes() -> None:
    sure = 100.0 * np.eye(5)[np.arange(50) % 5]
    assert inception_score(sure, splits=1)[0] == pytest.approx(5)
    assert inception_score(np.zeros((20, 5)), splits=4) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(sure[::5], splits=2)[0] == pytest.approx(1)
    logits = normal(60, 5)
    p = special.softmax(logits, axis=1)
    wanted = math.exp(np.mean([stats.entropy(row, p.mean(0)) for row in p]))
    assert inception_score(logits, splits=1)[0] == pytest.approx(wanted, rel=1e-12)
    mean, spread = inception_score(logits, splits=6, seed=3)
    assert (mean, spread) == inception_score(logits, splits=6, seed=3)
    assert 1 < mean < wanted and spread > 0
    with pytest.raises(ValueError, match="11 parts"):
        inception_score(logits[:10], splits=11)


def test_divergences_are_scipys() -> None:
    a, b = 3 * normal(10, 7), 3 * normal(10, 7, 1)
    p, q = (special.softmax(x, axis=1) for x in (a, b))
    np.testing.assert_allclose(kl_softmax(a, b), stats.entropy(q, p, axis=1), rtol=1e-12)
    p, q = special.expit(a), special.expit(b)
    wanted = special.rel_entr(q, p) + special.rel_entr(1 - q, 1 - p)
    np.testing.assert_allclose(kl_sigmoid(a, b), wanted.sum(axis=1), rtol=1e-10)
    for kl in (kl_softmax, kl_sigmoid):
        np.testing.assert_allclose(kl(a, a), 0, atol=1e-12)
        assert kl(100 * a, 100 * b).min() >= 0 and np.isfinite(kl(300 * a, 300 * b)).all()
    # Of one class out of two, softmax of (x, 0) and sigmoid of x are the same distribution.
    pairs = [np.concatenate([x[:, :1], 0 * x[:, :1]], axis=1) for x in (a, b)]
    np.testing.assert_allclose(kl_sigmoid(a[:, :1], b[:, :1]), kl_softmax(*pairs), rtol=1e-10)


def test_cosine_similarity_and_offsets() -> None:
    a = np.array([[1.0, 0], [1, 1], [2, 0]])
    b = np.array([[3.0, 0], [0, 5], [-1, 0]])
    np.testing.assert_allclose(cosine_similarity(a, b), [1, math.sqrt(0.5), -1], rtol=1e-15)
    with pytest.raises(ValueError, match="row 1 is zero"):
        cosine_similarity(a, b * [[1], [0], [1]])
    np.testing.assert_allclose(offsets(np.eye(21)), np.arange(-10, 11) / 5, atol=1e-15)
    np.testing.assert_allclose(offsets(np.eye(3), 0.5), [-0.5, 0, 0.5])
    with pytest.raises(ValueError, match="at least 2 classes"):
        offsets(np.zeros((4, 1)))


def test_bootstrap_intervals_are_those_of_the_normal_mean() -> None:
    values = normal(400, 1)[:, 0]
    found = bootstrap(values, seed=1)
    assert found == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    half = 1.96 * values.std() / 20
    assert found.value == values.mean()
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    narrow = bootstrap(values, confidence=0.5, seed=1)
    assert found.low < narrow.low < narrow.high < found.high


# Signals.


def test_checks_find_clipping_silence_length_and_loudness() -> None:
    wave = 0.5 * torch.sin(2 * math.pi * 997 / 48000 * torch.arange(48000))
    found = check(wave, 48000)
    assert (found.seconds, found.silent, found.clipped) == (1.0, False, 0.0)
    assert found.lufs == pytest.approx(-3.01 - 6.02, abs=0.1)  # BS.1770: full scale is -3.01
    assert check(0 * wave, 48000).silent and check(0 * wave, 48000).lufs is None
    assert check(wave[:4800], 48000).lufs is None
    peaks = wave.clone()
    peaks[100:102] = 1  # two samples at full scale are no clipping, five are
    assert check(peaks, 48000).clipped == 0
    peaks[-5:] = -1
    assert check(peaks, 48000).clipped == 5 / 48000
    assert check((4 * wave).clamp(-1, 1), 48000).clipped > 0.5


def test_pairs_of_sounds_have_known_distances() -> None:
    wave = 0.1 * torch.randn(RATE)
    assert compare(wave, wave) == {"log_spectral_distance": 0, "stft_distance": 0}
    louder = compare(2 * wave, wave)
    assert louder["log_spectral_distance"] == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert louder["stft_distance"] == pytest.approx(1 + math.log(2), abs=1e-3)
    assert compare(torch.cat((wave, wave)), wave)["stft_distance"] < 0.1
    noisy = [
        compare(wave + x * torch.randn(RATE), wave)["stft_distance"] for x in (0.01, 0.03, 0.1)
    ]
    assert noisy == sorted(noisy)
    for a, b in ((0 * wave, wave), (wave, 0 * wave), (wave[9:10], wave)):
        assert all(0 < x < math.inf for x in compare(a, b).values())


def test_melstats_are_finite_and_in_decibels() -> None:
    wave = 0.1 * torch.randn(RATE)
    rows = melstats(wave, RATE)
    assert rows.shape == (96,)
    np.testing.assert_allclose(melstats(0.1 * wave, RATE)[:32], rows[:32] - 20, atol=1e-3)
    np.testing.assert_allclose(melstats(0.1 * wave, RATE)[32:], rows[32:], atol=1e-3)
    for short in (torch.zeros(1), torch.zeros(RATE), wave[:3]):
        assert np.isfinite(melstats(short, RATE)).all()


# Rows from files.


@pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
def test_rows_are_read_by_id(tmp_path: Path, kind: str) -> None:
    rows = {"a": np.ones(3, np.float32), "b.c": np.zeros((2, 3), np.float16), "other": np.ones(9)}
    path = tmp_path / f"rows.{kind}"
    if kind == "npz":
        np.savez(path, **rows)
    elif kind == "safetensors":
        tensors = {id: torch.from_numpy(x) for id, x in rows.items()}
        save_file(tensors | {"a": tensors["a"].bfloat16()}, path)
    else:
        path.mkdir()
        for id, values in rows.items():
            np.save(path / f"{id}.npy", values)
    found = read_rows(path, ["b.c", "gone", "a"])
    assert {id: x.shape for id, x in found.items()} == {"b.c": (2, 3), "a": (1, 3)}
    assert all(x.dtype == np.float32 for x in found.values()) and found["a"].all()
    with pytest.raises(InputError, match=r"other is 9 wide; wanted 3"):
        read_rows(path, ["a", "other"])


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trapped",)


def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", nan=[1, math.nan], words=["a"], cube=np.zeros((1, 1, 1)), empty=[])
    for id, reason in (
        ("nan", "non-finite"),
        ("words", r"wanted numbers \(d,\)"),
        ("cube", r"\(1, 1, 1\)"),
        ("empty", r"\(0,\)"),
    ):
        with pytest.raises(InputError, match=rf"x\.npz: {id}.*{reason}"):
            read_rows(Path("x.npz"), [id])
    np.savez("trap.npz", a=np.array([Trap()], dtype=object))
    with pytest.raises(InputError, match="not readable as embeddings"):
        read_rows(Path("trap.npz"), ["a"])
    assert not Path("trapped").exists()
    for name in ("bad.npz", "bad.safetensors"):
        Path(name).write_bytes(b"no such thing")
        with pytest.raises(InputError, match=f"{name}: not readable"):
            read_rows(Path(name), ["a"])
    Path("rows.pth").touch()
    with pytest.raises(InputError, match=r"rows\.pth: wanted \.safetensors, \.npz or a folder"):
        read_rows(Path("rows.pth"), ["a"])
    with pytest.raises(InputError, match=r"gone\.npz: no such file"):
        read_rows(Path("gone.npz"), ["a"])


# Whole evaluations.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world; `true` has its held-out sounds."""
    root = tmp_path_factory.mktemp("world")
    write_toy_world(root, 64, 3, heldout=16, workers=1)
    (root / "true").mkdir()
    for path in (root / "audio").glob("heldout_*.wav"):
        path.rename(root / "true" / path.name)
    return root


def generated(world: Path, out: Path, change) -> Path:  # change(wave (t,), index) -> wave
    out.mkdir()
    for index, path in enumerate(sorted((world / "true").iterdir())):
        wave, rate = soundfile.read(path)
        soundfile.write(out / path.name, change(wave, index), rate)
    return out


def values(result: Evaluation) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in result.figures}


def test_the_true_sounds_are_perfect(world: Path, tmp_path: Path) -> None:
    same = generated(world, tmp_path / "gen", lambda wave, _: wave)
    result = evaluate(same, world / "true", toy=world / "events.json", workers=0)
    found = values(result)
    assert list(found) == [
        "pairs.log_spectral_distance",
        "pairs.stft_distance",
        "pairs.loudness_difference",
        "pairs.duration_difference",
        "melstats.frechet_distance",
        "melstats.kernel_distance",
        *(f"toy{side}.{name}" for side in ("", ".true") for name in (
            "onset_recall", "onset_precision", "class_accuracy")),
    ]  # fmt: skip
    assert all(found[name] == 0 for name in found if name.startswith("pairs."))
    assert found["melstats.frechet_distance"] < 1e-8
    # Both sums leave out an item with itself, the mixed one does not: below 0 for equal sets.
    assert -0.2 < found["melstats.kernel_distance"] < 0
    assert all(found[name] == 1 for name in found if name.startswith("toy"))
    assert result.problems == [] and result.counts["pairs"] == 16
    assert result.settings["rate"] == RATE


def test_worse_sounds_are_further_away(world: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    results = []
    for noise in (0.003, 0.03, 0.3):
        gen = generated(
            world,
            tmp_path / str(noise),
            lambda w, _: w + noise * rng.standard_normal(w.size),  # noqa: B023
        )
        results.append(values(evaluate(gen, world / "true", workers=0)))
    for name in results[0]:
        if name not in ("pairs.duration_difference", "pairs.loudness_difference"):
            assert [r[name] for r in results] == sorted(r[name] for r in results), name


def test_shifted_sounds_lose_their_onsets_and_others_their_kind(
    world: Path, tmp_path: Path
) -> None:
    def change(wave: np.ndarray, index: int) -> np.ndarray:
        if index < 4:
            return wave
        return np.roll(wave, RATE // 5) if index < 8 else np.zeros_like(wave)

    gen = generated(world, tmp_path / "gen", change)
    result = evaluate(gen, world / "true", toy=world / "events.json", workers=0)
    found = values(result)
    scenes = json.loads((world / "events.json").read_text())
    counts = Matches()
    for path in gen.iterdir():
        counts += match(onsets(soundfile.read(path)[0], RATE), scenes[path.stem]["times"])
    assert 0.1 < found["toy.onset_recall"] == counts.recall < 0.6
    assert found["toy.onset_precision"] == counts.precision
    assert found["toy.true.onset_recall"] == 1
    assert 0.5 <= found["toy.class_accuracy"] < 0.8
    assert result.counts["generated"]["silent"] == 8
    recall = next(f for f in result.figures if f.name == "toy.onset_recall")
    assert recall.low <= recall.value <= recall.high and recall.count == 16
    right = [s["toy.class_accuracy"] for s in result.sounds.values()]
    assert np.mean(right) == found["toy.class_accuracy"]
    silent = result.sounds["heldout_00015"]
    assert silent["generated"]["silent"] and silent["generated"]["lufs"] is None
    assert "pairs.loudness_difference" not in silent


@pytest.fixture
def folders(world: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Generated sounds of other formats, lengths and rates, one missing, extra and broken each."""
    import soxr

    gen = tmp_path / "gen"
    generated(world, gen, lambda wave, _: 0.5 * wave)
    wave, rate = soundfile.read(gen / "heldout_00001.wav")
    (gen / "heldout_00001.wav").unlink()
    fine = soxr.resample(wave, rate, 44100)
    soundfile.write(gen / "heldout_00001.flac", fine, 44100)
    fine[1000:1010] = 1
    soundfile.write(gen / "heldout_00006.wav", fine, 44100)
    soundfile.write(gen / "heldout_00002.wav", wave[:RATE], rate)
    (gen / "heldout_00003.wav").write_bytes(b"RIFF and no more")
    (gen / "heldout_00004.wav").rename(gen / "other.wav")
    soundfile.write(gen / "heldout_00005.wav", np.full(99, np.nan), rate, subtype="FLOAT")
    (gen / ".hidden.wav").write_bytes(b"left by a crash")
    (gen / "notes.txt").write_text("not a sound")
    return gen, world / "true"


def test_what_is_missing_extra_or_broken_is_reported_by_name(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    result = evaluate(*folders, workers=0)
    assert {(p.where, p.id) for p in result.problems} == {
        ("generated", "heldout_00003"),
        ("missing", "heldout_00004"),
        ("generated", "heldout_00005"),
        ("extra", "other"),
    }
    reasons = {p.id: p.reason for p in result.problems}
    assert "heldout_00003.wav: not readable as audio" in reasons["heldout_00003"]
    assert "sample 0 is nan" in reasons["heldout_00005"]
    assert result.counts["generated"]["files"] == 16 and result.counts["generated"]["read"] == 14
    assert (result.counts["pairs"], result.counts["missing"], result.counts["extra"]) == (13, 1, 1)
    # Resampled, and half as loud: 6 dB away.
    resampled = result.sounds["heldout_00001"]
    assert resampled["pairs.loudness_difference"] == pytest.approx(6.02, abs=0.1)
    assert resampled["generated"]["seconds"] == pytest.approx(2, abs=1e-3)
    assert result.sounds["heldout_00006"]["generated"]["clipped"] == pytest.approx(10 / 88200)
    assert result.sounds["heldout_00002"]["pairs.duration_difference"] == 1
    by_name = {figure.name: figure for figure in result.figures}
    assert by_name["pairs.stft_distance"].count == 13
    assert by_name["melstats.frechet_distance"].count == 14
    result.save(tmp_path / "all.json")
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["versions"].keys() >= {"wavflow", "torch", "soxr", "python"}
    assert saved["settings"]["seed"] == 0 and saved["settings"]["gen"] == str(folders[0])
    assert saved["figures"][0]["value"] == result.figures[0].value
    assert saved["sounds"]["other"].keys() == {"generated"}


def test_workers_change_nothing(folders: tuple[Path, Path]) -> None:
    shown = []
    alone = evaluate(*folders, workers=0)
    with_workers = listen.listen(
        {side: listen.find_sounds(f) for side, f in zip(listen.SIDES, folders, strict=True)},
        RATE,
        workers=2,
        progress=lambda *at: shown.append(at),
    )
    assert shown == [(i, 17) for i in range(1, 18)]
    assert [heard.id for heard in with_workers] == list(alone.sounds)
    for heard in with_workers:
        for name, value in heard.distances.items():
            assert alone.sounds[heard.id][f"pairs.{name}"] == pytest.approx(value, rel=1e-6)


def die(wave: torch.Tensor, rate: int) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_reported(folders: tuple[Path, Path]) -> None:
    sounds = {side: listen.find_sounds(f) for side, f in zip(listen.SIDES, folders, strict=True)}
    heard = listen.listen(sounds, RATE, [listen.Measure("die", die)], workers=2)
    assert len(heard) == 17
    assert heard[0].problems == dict.fromkeys(listen.SIDES, "a worker process died")


def test_rows_of_other_models(world: Path, tmp_path: Path) -> None:
    ids = sorted(path.stem for path in (world / "true").iterdir())
    gen = generated(world, tmp_path / "gen", lambda wave, _: wave)
    (gen / f"{ids[3]}.wav").rename(gen / "extra.wav")
    ids[3] = "extra"
    rng = np.random.default_rng(0)
    rows = {name: {id: rng.standard_normal(4) for id in ids} for name in "abc"}
    del rows["b"]["extra"]
    for name, table in rows.items():
        np.savez(tmp_path / f"{name}.npz", **dict(reversed(table.items())))
    np.savez(tmp_path / "crops.npz", **{id: np.eye(21)[[10, 15]] for id in ids[1:]})
    a, b, c = (
        np.stack([rows[name][id] for id in sorted(rows[name])]).astype(np.float32) for name in "abc"
    )
    both = [i for i, id in enumerate(sorted(rows["a"])) if id in rows["b"]]
    texts = {
        "embeddings": f"panns={tmp_path}/a.npz,{tmp_path}/b.npz",
        "logits": f"passt={tmp_path}/a.npz,{tmp_path}/b.npz",
        "similarity": f"imagebind={tmp_path}/a.npz,{tmp_path}/c.npz",
        "offsets": f"synchformer={tmp_path}/crops.npz",
    }
    result = evaluate(
        gen,
        world / "true",
        extractors=(),
        given=[Given.parse(kind, text) for kind, text in texts.items()],
        settings=Settings(splits=2, fad_infinity=True),
        workers=0,
    )
    found, of_b = values(result), Moments.of(b)
    near = {
        "panns.frechet_distance": frechet_distance(Moments.of(a), of_b),
        "panns.frechet_distance_infinity": frechet_distance_infinity(a, of_b),
        "panns.kernel_distance": kernel_distance(a, b),
        "passt.inception_score": inception_score(a, splits=2)[0],
        "passt.kl_softmax": kl_softmax(a[both], b).mean(),
        "passt.kl_sigmoid": kl_sigmoid(a[both], b).mean(),
        "imagebind.similarity": cosine_similarity(a, c).mean(),
        "synchformer.desync": 0.5,
    }
    assert {name: found[name] for name in near} == pytest.approx(near, rel=1e-9)
    missing = "heldout_00003"  # its true sound has no row in b either
    assert {(p.where, p.id) for p in result.problems} == {
        ("extra", "extra"),
        ("missing", missing),
        ("embeddings panns", missing),
        ("logits passt", missing),
        ("offsets synchformer", ids[0]),
    }
    assert result.sounds[ids[1]]["synchformer.desync"] == 0.5
    second = kl_softmax(*(rows[name][ids[1]] for name in "ab"))
    assert result.sounds[ids[1]]["passt.kl_softmax"] == pytest.approx(second)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"given": ["embeddings x=a.npz,narrow.npz"]}, "x: generated rows are 4 wide, true ones 3"),
        ({"given": ["similarity x=a.npz,zero.npz"]}, "x: heldout_00000 is zero"),
        ({"given": ["logits x=crops.npz"]}, "x: heldout_00000 has 2 rows, wanted one"),
        ({"given": ["offsets x=other.npz"]}, "other.npz: nothing of the 16 generated sounds"),
        ({"given": ["offsets x=crops.npz"] * 2}, "two figures would be called x.desync"),
        ({"captions": "x.csv"}, "--captions x.csv: wanted --extractor clap with it"),
        ({"extractors": ["vggish"]}, "--extractor vggish: wanted one of melstats, ast, clap"),
        ({"extractors": ["melstats=x"]}, "--extractor melstats: wanted one of"),
        ({"toy": "list.json"}, "list.json: wanted a toy world's"),
        ({"rate": 2}, "rate is 2 Hz, wanted at least 1000"),
    ],
)
def test_what_does_not_fit_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = [f"heldout_{i:05d}" for i in range(16)]
    for name, row in {
        "a": np.ones(4), "narrow": np.ones(3), "zero": np.zeros(4), "crops": np.ones((2, 4))
    }.items():  # fmt: skip
        np.savez(f"{name}.npz", **dict.fromkeys(ids, row))
    np.savez("other.npz", x=np.ones(4))
    Path("list.json").write_text("[]")
    (tmp_path / "train.csv").write_text("id,audio_path\na,a.wav\n")
    options |= {"given": [Given.parse(*text.split(" ", 1)) for text in options.get("given", ())]}
    with pytest.raises(InputError) as error:
        evaluate(world / "true", world / "true", workers=0, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_and_options_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    empty, twice = tmp_path / "empty", tmp_path / "twice"
    for folder in (empty, twice):
        folder.mkdir()
    for name in ("a.wav", "a.flac"):
        soundfile.write(twice / name, np.zeros(9), RATE)
    for folder, message in (
        (tmp_path / "gone", "gone: no such folder"),
        (empty, "empty: no .wav or .flac"),
        (twice, "a.flac and a.wav have one id"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(folder, twice)
    broken, silent = tmp_path / "broken", tmp_path / "silent"
    for folder in (broken, silent):
        folder.mkdir()
    (broken / "a.wav").write_bytes(b"RIFF")
    soundfile.write(silent / "a.wav", np.zeros(0), RATE)
    for folder in (broken, silent):
        with pytest.raises(InputError, match=f"no generated sound can be read.*{folder}/a.wav"):
            evaluate(folder, world / "true", workers=0)
    for text in ("x", "x=", "=a.npz,b.npz", "x=a.npz", "x=a,b,c"):
        with pytest.raises(InputError, match="wanted NAME=GENERATED,TRUE"):
            Given.parse("embeddings", text)
    for options in ({"confidence": 1}, {"splits": 0}, {"resamples": 0}, {"offset_limit": 0}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is .*, wanted"):
            Settings(**options)


def test_a_single_pair_has_notes_in_the_place_of_distances(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(900), RATE)
    result = evaluate(tmp_path, tmp_path, workers=0)
    notes = {figure.name: figure.note for figure in result.figures if figure.value is None}
    assert notes == {
        "pairs.loudness_difference": "no sound has a value",
        "melstats.frechet_distance": "a covariance wants at least 2 rows, found 1",
        "melstats.kernel_distance": "a kernel distance wants at least 2 rows, found 1 and 1",
    }


# Models.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small AST and CLAP models of random weights, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    out = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"max_length": 128, "num_mel_bins": 64}
    config = transformers.ASTConfig(**small, **sizes, num_hidden_layers=1, num_labels=7)
    transformers.ASTForAudioClassification(config).save_pretrained(out / "ast")
    transformers.ASTFeatureExtractor(**sizes).save_pretrained(out / "ast")
    text = small | {"vocab_size": 9, "num_hidden_layers": 1, "max_position_embeddings": 70}
    audio = {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "window_size": 4}
    audio |= {"num_attention_heads": [2, 2], "num_hidden_layers": 2}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(out / "clap")
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(out / "clap")
    words = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "bell", "drum"))}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(out / "clap")
    return out


def test_models_hear_every_window(models: Path) -> None:
    cpu = torch.device("cpu")
    ast, clap = Ast(str(models / "ast"), cpu), Clap(str(models / "clap"), cpu)
    wave = 0.1 * torch.randn(3 * 16000)
    found = ast(wave)  # windows of 1.28 s, the last of 0.44 s left out
    assert ast.rate == 16000 and found.rows.shape == (2, 32) and found.logits.shape == (1, 7)
    alone = ast(wave[: 128 * 160])
    np.testing.assert_allclose(alone.rows[0], found.rows[0], atol=1e-5)
    assert clap.rate == 48000
    long = clap(0.1 * torch.randn(11 * 48000 + 1))
    assert long.rows.shape == (2, 16) and long.logits is None
    texts = clap.captions(["a bell", "drum drum drum", ""])
    assert texts.shape == (3, 16)
    for rows in (long.rows, texts):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(clap.captions(["a bell"]), texts[:1], atol=1e-5)


def test_models_give_figures(models: Path, world: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for index in range(3):
        (few / f"{index}.wav").symlink_to(world / "true" / f"heldout_{index:05d}.wav")
    table = tmp_path / "captions.csv"
    table.write_text("id,caption\n0,a bell\n1,a drum\n2,\n")
    result = evaluate(
        few,
        few,
        extractors=[f"ast={models / 'ast'}", f"clap={models / 'clap'}"],
        captions=table,
        settings=Settings(splits=1),
        workers=0,
    )
    found = values(result)
    assert found["ast.frechet_distance"] < 1e-6 and found["clap.frechet_distance"] < 1e-6
    assert found["ast.kl_softmax"] == pytest.approx(0, abs=1e-9)
    assert 1 <= found["ast.inception_score"] <= 7
    assert -1 <= found["clap.similarity"] <= 1
    assert [(p.where, p.id) for p in result.problems] == [("captions", "2")]
    assert "transformers" in result.versions


def test_a_model_that_is_not_there_is_one_line(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ClapModel to be had there") as error:
        Clap(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="weights of ASTForAudioClassification are missing"):
        Ast(str(models / "clap"), torch.device("cpu"))


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"transformers is not installed \(pip install"):
        Ast("anything", torch.device("cpu"))


def test_the_classifier_of_kinds_names_its_package(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match="scikit-learn, which is not installed"):
        evaluate(world / "true", world / "true", toy=world / "events.json", workers=0)


# The command line.


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *map(str, argv)])
    return caught.value.code or 0


def test_command_line(
    folders: tuple[Path, Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gen, true = folders
    out = tmp_path / "out.json"
    options = ("--gen", gen, "--true", true, "--workers", 1, "--resamples", 20)
    assert run(*options, "--json", out, "--toy", world / "events.json") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "13 pairs, 1 missing, 1 extra, compared at 8000 Hz" in shown
    assert "left out, missing, 1: heldout_00004: no generated sound" in shown
    assert "toy.onset_recall" in shown and "melstats.kernel_distance" in shown
    assert json.loads(out.read_text())["settings"]["resamples"] == 20
    assert run(*options, "--strict") == 1
    assert run("--gen", true, "--true", true, "--workers", 1, "--strict") == 0
    capsys.readouterr()
    assert run(*options, "--logits", "x") == 2
    assert capsys.readouterr().err == "error: --logits x: wanted NAME=GENERATED[,TRUE]\n"
    assert run("--gen", tmp_path / "gone", "--true", true) == 2
    assert capsys.readouterr().err.count("\n") == 1
