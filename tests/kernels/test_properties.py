"""Laws the ops obey whatever the reference says: identities, invariances, bit-equality."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import BACKEND, DTYPE, normal, relative
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend, _philox
from wavflow_kernels._registry import Op

SIZES = st.integers(1, 40)
SEEDS = st.integers(-(2**63), 2**63 - 1)


# lift_patchify and unpatchify


@given(b=st.integers(0, 3), n=SIZES, d=SIZES, samples=st.integers(1, 1600), backend=BACKEND)
def test_property_unpatchify_inverts_patchify(
    b: int, n: int, d: int, samples: int, backend: str
) -> None:
    wave = normal(b, samples, seed=samples) * 0.1
    with wk.use_backend(backend):
        tokens = wk.lift_patchify(wave, token_size=d, tokens=n, audio_scale=1.0)
        kept = min(samples, n * d)
        joined = wk.unpatchify(tokens, audio_scale=1.0)
    assert joined.shape == (b, n * d)
    rms = wave.double().square().mean(1, keepdim=True).sqrt()
    gain = torch.where(rms > 1e-8, 0.33 / rms, 1.0)
    lifted = wave * gain
    peak = lifted.abs().amax(1, keepdim=True)
    lifted = torch.where((peak > 1) & (0.33 / peak > 0.3), lifted / peak, lifted).clamp(-1, 1)
    torch.testing.assert_close(joined[:, :kept].double(), lifted[:, :kept], rtol=1e-5, atol=1e-6)
    assert not joined[:, kept:].any()


@given(level=st.floats(1e-6, 1e3), samples=st.integers(2000, 60_000), backend=BACKEND)
def test_property_lift_sets_the_rms(level: float, samples: int, backend: str) -> None:
    wave = torch.sin(torch.arange(samples, dtype=torch.float64) * 0.1)[None].float() * level
    with wk.use_backend(backend):
        lifted = wk.lift_patchify(wave, token_size=1, tokens=samples, audio_scale=1.0)
    assert lifted.double().square().mean().sqrt() == pytest.approx(0.33, rel=1e-4)
    assert lifted.abs().max() <= 1


@given(gain=st.sampled_from([0.125, 0.5, 2.0, 16.0]), samples=st.integers(1, 5000))
def test_property_lift_ignores_the_level(gain: float, samples: int) -> None:
    wave = normal(2, samples) * 0.01
    a = wk.lift_patchify(wave, token_size=10, tokens=100)
    b = wk.lift_patchify(wave * gain, token_size=10, tokens=100)
    assert relative(a, b) < 1e-6


@given(
    level=st.sampled_from([1e-4, 0.02, 0.1, 0.5]),
    square=st.booleans(),
    start=st.integers(0, 3999),
    samples=st.integers(1, 2000),
    backend=BACKEND,
)
def test_property_windows_are_lifted_as_their_recording(
    level: float, square: bool, start: int, samples: int, backend: str
) -> None:
    """Square waves are what the peak rule is for."""
    whole = normal(1, 4000) * level
    whole = level * whole.sign() if square else whole
    levels = torch.stack([whole.double().square().mean(1), whole.abs().amax(1)], dim=1).float()
    with wk.use_backend(backend):
        lifted = wk.lift_patchify(whole, token_size=1, tokens=4000)[:, start : start + samples]
        window = whole[:, start : start + samples]
        found = wk.lift_patchify(window, levels=levels, token_size=1, tokens=window.shape[1])
    torch.testing.assert_close(found, lifted, rtol=1e-6, atol=1e-7)


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4), backend=BACKEND)
def test_property_lengths_are_rows_of_their_own(lengths: list[int], backend: str) -> None:
    wave = normal(len(lengths), 700) * 0.1
    with wk.use_backend(backend):
        together = wk.lift_patchify(wave, torch.tensor(lengths), token_size=30, tokens=20)
        for row, length, tokens in zip(wave, lengths, together, strict=True):
            alone = wk.lift_patchify(row[None, :length], token_size=30, tokens=20)
            torch.testing.assert_close(tokens, alone[0], rtol=1e-6, atol=1e-6)


# flow_mix and its noise


@given(b=st.integers(0, 3), n=SIZES, d=SIZES, backend=BACKEND, dtype=DTYPE)
def test_property_mix_ends_in_noise_and_data(
    b: int, n: int, d: int, backend: str, dtype: torch.dtype
) -> None:
    x_1 = normal(b, n, d, dtype=dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    seeds = torch.arange(b)
    with wk.use_backend(backend):
        at_data, _ = wk.flow_mix(x_1, torch.ones(b, dtype=computed), seeds=seeds)
        at_noise, x_0 = wk.flow_mix(x_1, torch.zeros(b, dtype=computed), seeds=seeds)
    assert torch.equal(at_data, x_1)
    assert torch.equal(at_noise, x_0.to(dtype))


@given(seeds=st.lists(SEEDS, min_size=1, max_size=5), n=SIZES, d=SIZES, backend=BACKEND)
def test_property_noise_is_an_items_own(seeds: list[int], n: int, d: int, backend: str) -> None:
    """The same bits alone, in a batch, as a prefix of a longer item, and from any backend."""
    with wk.use_backend(backend):
        batch = wk.philox_normal(torch.tensor(seeds), n, d)
    for row, seed in zip(batch, seeds, strict=True):
        alone = wk.philox_normal(torch.tensor([seed]), n, d)[0]
        longer = wk.philox_normal(torch.tensor([seed]), n + 3, d)[0]
        assert torch.equal(row, alone)
        assert torch.equal(row, longer[:n])


@given(
    seed=SEEDS,
    first=st.one_of(SIZES, st.integers(2**31, 2**40)),
    n=SIZES,
    d=SIZES,
    backend=BACKEND,
)
def test_property_noise_goes_on(seed: int, first: int, n: int, d: int, backend: str) -> None:
    """The tokens from `first` on are those of the whole stream, from any backend."""
    with wk.use_backend(backend):
        part = wk.philox_normal(torch.tensor([seed]), n, d, first=first)
        again = wk.philox_normal(torch.tensor([seed]), n + 5, d, first=max(first - 5, 0))
        assert torch.equal(part, again[:, min(first, 5) :][:, :n])
        if first < 1000:
            assert torch.equal(
                part, wk.philox_normal(torch.tensor([seed]), first + n, d)[:, first:]
            )


def test_property_noise_is_standard_normal() -> None:
    z = wk.philox_normal(torch.arange(50), 100, 200).flatten().double()
    count = z.numel()
    assert abs(z.mean()) < 4 / count**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(z.pow(3).mean()) < 4 * (15 / count) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    # Kolmogorov and Smirnov's distance, 0.1 % level.
    sorted_z = z.sort().values
    cdf = torch.special.ndtr(sorted_z)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (cdf - steps).abs().max() < 1.95 / count**0.5
    # Neighbours, and the same place of neighbouring seeds, are uncorrelated.
    for lag in (1, 2, 3, 4, 20_000):
        assert abs((z[:-lag] * z[lag:]).mean()) < 4 / (count - lag) ** 0.5


def test_property_philox_known_answer() -> None:
    """Counter 0, key 0 of the published Philox 4x32-10 test vectors (Random123)."""
    zero = torch.zeros(1, dtype=torch.int64)
    values = [int(x) for x in _philox.philox(zero, zero)]
    assert values == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_property_normals_are_accurate() -> None:
    """Box and Muller on the same integers in float64: within 4 ulp of the largest magnitude."""
    seeds = torch.arange(20)
    blocks = torch.arange(2500)
    x = _philox.philox(*torch.broadcast_tensors(blocks[None], seeds[:, None]))
    pairs = []
    for a, b in ((x[0], x[1]), (x[2], x[3])):
        u = ((a >> 1).double() * 2.0**-31 + 2.0**-32).float().double()
        angle = b.double() * (2 * np.pi / 2**32)
        radius = (-2 * u.log()).sqrt()
        pairs += [radius * angle.cos(), radius * angle.sin()]
    truth = torch.stack(pairs, -1).flatten(1)
    z = wk.philox_normal(seeds, 100, 100).flatten(1).double()
    assert (z - truth).abs().max() < 4 * torch.finfo(torch.float32).eps * truth.abs().max()


# flow_loss


@given(b=st.integers(1, 3), n=SIZES, d=SIZES, backend=BACKEND)
def test_property_loss_vanishes_at_the_target(b: int, n: int, d: int, backend: str) -> None:
    x_0, x_1 = normal(b, n, d, seed=1), normal(b, n, d, seed=2)
    t = torch.linspace(0.1, 0.9, b)
    x_t, _ = wk.flow_mix(x_1, t, noise=x_0)
    velocity = x_1 - x_0
    with wk.use_backend(backend):
        for prediction, pred in (("x", x_1), ("v", velocity)):
            for loss in ("x", "v"):
                value = wk.flow_loss(
                    pred, x_1, t, x_t=x_t, x_0=x_0, prediction=prediction, loss=loss
                )
                assert value.shape == (b,)
                assert value.max() < 1e-12


@given(t=st.floats(0, 1), n=SIZES, d=SIZES, backend=BACKEND)
def test_property_v_loss_is_the_x_loss_over_the_rest(
    t: float, n: int, d: int, backend: str
) -> None:
    pred, x_1 = normal(1, n, d, seed=3), normal(1, n, d, seed=4)
    time = torch.tensor([t], dtype=torch.float32)
    with wk.use_backend(backend):
        x_loss = wk.flow_loss(pred, x_1, time, loss="x").double()
        v_loss = wk.flow_loss(pred, x_1, time, loss="v").double()
    rest = (1 - time).clamp_min(1e-6).double()
    torch.testing.assert_close(v_loss, x_loss / rest**2, rtol=1e-5, atol=0)


# ode_step


def euler(t: float, dt: float, prediction: str) -> Tensor:
    rest = max(1 - t, 1e-6)
    row = [dt / rest, 1 - dt / rest] if prediction == "x" else [dt, 1.0]
    return torch.tensor([[t, 1.0, *row]])


@given(t=st.floats(0, 0.9), dt=st.floats(-0.5, 0.5), n=SIZES, d=SIZES, backend=BACKEND)
def test_property_euler_in_both_predictions(
    t: float, dt: float, n: int, d: int, backend: str
) -> None:
    x, v = normal(2, n, d, seed=5), normal(2, n, d, seed=6)
    index = torch.zeros(1, dtype=torch.int64)
    x_1 = x + (1 - t) * v  # where the straight line through x with velocity v ends
    with wk.use_backend(backend):
        by_v = wk.ode_step(x[None], v, euler(t, dt, "v"), index)[0]
        by_x = wk.ode_step(x[None], x_1, euler(t, dt, "x"), index)[0]
    torch.testing.assert_close(by_v, x + dt * v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_x, x + dt * v, rtol=1e-4, atol=1e-5)


@given(w=st.floats(-2, 8), n=SIZES, backend=BACKEND)
def test_property_guidance_extrapolates(w: float, n: int, backend: str) -> None:
    x, cond, uncond = (normal(1, n, 3, seed=i) for i in (7, 8, 9))
    table = torch.tensor([[0.0, w, 1.0, 0.0]])
    with wk.use_backend(backend):
        out = wk.ode_step(
            x[None], cond, table, torch.zeros(1, dtype=torch.int64), pred_uncond=uncond
        )[0]
    torch.testing.assert_close(out, uncond + w * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_property_inplace_steps_advance() -> None:
    """Three in-place steps equal three functional ones, and the index ends at 3."""
    table = torch.rand(3, 8)
    state = normal(2, 2, 5, 4)
    preds = [normal(2, 5, 4, seed=i) for i in range(3)]
    expected = state
    for i, pred in enumerate(preds):
        expected = wk.ode_step(expected, pred, table, torch.tensor([i]))
    index, version = torch.zeros(1, dtype=torch.int64), state._version
    for pred in preds:
        wk.ode_step_(state, pred, table, index)
    assert torch.equal(state, expected)
    assert int(index) == 3
    assert state._version > version


def test_property_inplace_refuses_gradients() -> None:
    state, pred = normal(1, 2, 3, 4), normal(2, 3, 4).requires_grad_()
    table, index = torch.rand(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="ode_step_ works in place"):
        wk.ode_step_(state, pred, table, index)
    with torch.no_grad():
        wk.ode_step_(state, pred, table, index)


def test_property_inplace_is_seen_by_autograd() -> None:
    """A state saved for backward and then stepped in place raises instead of lying."""
    state = normal(1, 2, 3, 4)
    weight = torch.ones(1, requires_grad=True)
    product = state * weight
    wk.ode_step_(state, normal(2, 3, 4), torch.rand(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# Threads


def calls_of_ours() -> list[tuple[Op, tuple[Any, ...]]]:
    """Calls of every op that kernels of ours run, on inputs of several blocks."""
    cpu = torch.device("cpu")
    return [
        (op, sample.args)
        for op in REGISTRY.values()
        for sample in op.samples(cpu, torch.float32, 11)
        # oneDNN and SDPA cut their sums by the number of threads.
        if _backend.choose(op, cpu, torch.float32, sample.args) != "library"
    ]


def everything(calls: list[tuple[Op, tuple[Any, ...]]]) -> list[Tensor]:
    """The outputs of these calls."""
    out: list[Tensor] = []
    for op, inputs in calls:
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in inputs)
        result = op(*args)
        result = op.mutated(args) if op.mutates else result
        out += list(result) if isinstance(result, (tuple, list)) else [result]
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@pytest.mark.compiled
def test_property_thread_count_changes_no_bit() -> None:
    threads, calls = torch.get_num_threads(), calls_of_ours()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(calls))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.compiled
def test_property_a_new_thread_runs_the_ops() -> None:
    calls = calls_of_ours()
    expected, found = everything(calls), []
    worker = threading.Thread(target=lambda: found.extend(everything(calls)))
    worker.start()
    worker.join(60)
    assert not worker.is_alive() and same(expected, found)


def _in_child(queue: Any, x: Tensor, t: Tensor, seeds: Tensor) -> None:
    # The parent's OpenMP pool does not exist here: the kernel must not wait for it. torch's own
    # parallel loops would, so the child calls nothing else.
    x_t, _ = wk.flow_mix(x, t, seeds=seeds)
    queue.put(hashlib.sha256(x_t.numpy().tobytes()).hexdigest())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_property_a_forked_worker_runs_the_ops() -> None:
    x, t, seeds = normal(4, 200, 200), torch.full((4,), 0.5), torch.arange(4)
    x_t, _ = wk.flow_mix(x, t, seeds=seeds)  # starts the pool
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, x, t, seeds))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        pytest.fail("the forked worker hangs")
    assert child.exitcode == 0
    assert queue.get() == hashlib.sha256(x_t.numpy().tobytes()).hexdigest()
