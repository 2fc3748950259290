"""Laws of attention, and its block edges against the mathematics in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import relative
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import AttentionWindow, _backend
from wavflow_kernels.ops import rope_attention as ops

BACKEND = st.sampled_from(["cpp", "reference"] if _backend.C is not None else ["reference"])
WINDOWS = ["reference", "library", *([] if _backend.C is None else ["cpp"])]
WINDOWED = st.sampled_from(WINDOWS)
DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
HALF_DIM = st.integers(1, 40)
# Past the blocks of the compiled kernels: 48 queries and 256 keys forward, 96 and 192 backward.
LENGTH = st.one_of(st.integers(1, 70), st.integers(180, 300))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(b: int, h: int, nq: int, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(b, h, m, d, dtype=dtype, seed=i) for i, m in enumerate((nq, n, n))]


@given(b=st.integers(0, 2), n=LENGTH, half=HALF_DIM, dtype=DTYPE, backend=BACKEND)
def test_property_order_of_the_keys_does_not_matter(
    b: int, n: int, half: int, dtype: torch.dtype, backend: str
) -> None:
    q, k, v = qkv(b, 2, n, n, 2 * half, dtype)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    with wk.use_backend(backend):
        out = wk.rope_attention(q, k, v)
        same = wk.rope_attention(q, k[:, :, order], v[:, :, order])
    assert relative(same, out) < TOLERANCE[dtype]


@given(n=LENGTH, half=HALF_DIM, dtype=DTYPE, backend=BACKEND, size=st.sampled_from([1.0, 30.0]))
def test_property_weights_sum_to_one(
    n: int, half: int, dtype: torch.dtype, backend: str, size: float
) -> None:
    q, k, _ = qkv(1, 2, n, n, 2 * half, dtype)
    v = normal(1, 2, 1, 2 * half, dtype=dtype).expand_as(k)
    with wk.use_backend(backend):
        out = wk.rope_attention(q * size, k, v)
    wanted = v.transpose(1, 2).flatten(2)
    assert relative(out, wanted) < TOLERANCE[dtype]


@given(n=LENGTH, spread=st.integers(0, 40), backend=WINDOWED)
def test_property_a_window_as_long_as_all_is_none(n: int, spread: int, backend: str) -> None:
    q, k, v = qkv(1, 1, n, n, 8, torch.float32)
    spread = min(spread, n - 1)
    with wk.use_backend(backend):
        out = wk.rope_attention(q, k, v)
        everything = wk.rope_attention(q, k, v, window=AttentionWindow(n, n - spread, spread))
    assert relative(everything, out) < 1e-6


@given(
    local=st.integers(1, 330),
    spread=st.integers(0, 90),
    rest=st.integers(0, 20),
    size=st.integers(0, 340),
    alone=st.booleans(),
    half=st.integers(1, 8),
    backend=WINDOWED,
)
def test_property_a_window_is_a_masked_softmax(
    local: int, spread: int, rest: int, size: int, alone: bool, half: int, backend: str
) -> None:
    """Values and gradients of all tokens or the first stream's, against all scores in float64."""
    n, unit = local + spread + rest, max(spread, 1)
    nq = local if alone else n
    clock = torch.cat((torch.arange(local) * unit, torch.arange(spread) * local))
    hidden = torch.zeros(n, n, dtype=torch.bool)
    hidden[: len(clock), : len(clock)] = (clock[:, None] - clock).abs() > size * unit
    inputs = [x.requires_grad_() for x in qkv(2, 1, nq, n, 2 * half, torch.float64)]
    q, k, v = inputs
    scores = (q @ k.transpose(-2, -1) * (2 * half) ** -0.5).masked_fill(hidden[:nq], -torch.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    grad = normal(*wanted.shape, dtype=torch.float64, seed=4)
    with wk.use_backend(backend):
        out = wk.rope_attention(q, k, v, window=AttentionWindow(size, local, spread))
    for found, right in zip(
        (out, *torch.autograd.grad(out, inputs, grad)),
        (wanted, *torch.autograd.grad(wanted, inputs, grad)),
        strict=True,
    ):
        assert (found - right).abs().max() < 1e-10


@pytest.mark.parametrize("backend", WINDOWS)
def test_what_a_token_sees(backend: str) -> None:
    """Six tokens, four over the same time at 0, 1.5, 3 and 4.5, and one without a place."""
    seen = {
        0: "110000 1000",
        1: "111000 1100",
        2: "011100 0110",
        5: "000011 0001",
        6: "110000 1000",
        7: "011000 0100",
        8: "001110 0010",
        9: "000011 0001",
        10: "111111 1111",
    }
    v = torch.eye(11)[None, None, :, :10]
    zero = torch.zeros_like(v)
    with wk.use_backend(backend):
        (out,) = wk.rope_attention(zero, zero, v, window=AttentionWindow(1, local=6, spread=4))
    for token, wanted in seen.items():
        bits = "".join(str(int(weight > 0)) for weight in out[token])
        assert bits == wanted.replace(" ", ""), token


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_long_windows_hold_nothing_square(backend: str) -> None:
    """Scores of 20,000 tokens squared are 1.6 GB; a thousand keys for each take 80 MB."""
    q, k, v = qkv(1, 1, 20000, 20100, 8, torch.float32)
    with wk.use_backend(backend), torch.profiler.profile(profile_memory=True) as held:
        wk.rope_attention(q, k, v, window=AttentionWindow(300, 20000, 50))
    assert max(e.cpu_memory_usage for e in held.events()) < 100e6


def results(backend: str, args: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in args[:3]]
    with wk.use_backend(backend):
        out = ops.OP(*inputs, *args[3:])[0]
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.compiled
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    n=LENGTH,
    fewer=st.integers(0, 299),
    half=HALF_DIM,
    window=st.integers(-1, 120),
    local=st.integers(1, 300),
    spread=st.integers(0, 300),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.bfloat16, torch.float32]),
)
def test_property_blocks_of_any_size_give_the_mathematics(
    heads: tuple[int, int],
    n: int,
    fewer: int,
    half: int,
    window: int,
    local: int,
    spread: int,
    dtype: torch.dtype,
) -> None:
    nq, d = max(n - fewer, 1), 2 * half
    q, k, v = qkv(*heads, nq, n, d, dtype)
    local = min(local, n)
    args = (q, k, v, window, local, min(spread, n - local))
    grad = normal(heads[0], nq, heads[1] * d, seed=4, dtype=dtype)
    exact = tuple(x.double() if isinstance(x, Tensor) else x for x in args)
    found, truth = results("cpp", args, grad), results("reference", exact, grad)
    # One key alone, or one that wins, leaves a gradient of rounding errors.
    floor = max(float(t.norm()) / t.numel() ** 0.5 for t in truth)
    for i, (a, t) in enumerate(zip(found, truth, strict=True)):
        error = float((a.double() - t).norm())
        assert error < TOLERANCE[dtype] * (float(t.norm()) + floor * t.numel() ** 0.5), i


@given(dtype=DTYPE, backend=BACKEND)
def test_property_one_token_has_nothing_to_choose(dtype: torch.dtype, backend: str) -> None:
    """The output is its value, and the gradients of q and k vanish but for rounding."""
    q, k, v = qkv(3, 2, 1, 1, 16, dtype)
    grad = normal(3, 1, 32, seed=4, dtype=dtype)
    out, d_q, d_k, d_v = results(backend, (q, k, v, -1, 0, 0), grad)
    assert torch.equal(out, v.transpose(1, 2).flatten(2))
    assert torch.equal(d_v.transpose(1, 2).flatten(2), grad)
    for d_x in (d_q, d_k):
        assert d_x.abs().max() < 32 * torch.finfo(dtype).eps


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 3, 300, 330, 48, dtype)
    grad = normal(1, 300, 3 * 48, dtype=dtype, seed=4)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results("cpp", (q, k, v, 40, 250, 20), grad))
            with wk.use_backend("cpp"):
                runs[-1] += ops.OP(q, k, v, -1, 0, 0)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.compiled
def test_an_item_does_not_hear_its_batch() -> None:
    q, k, v = qkv(5, 2, 60, 60, 32, torch.bfloat16)
    with wk.use_backend("cpp"):
        together = wk.rope_attention(q, k, v)
        alone = wk.rope_attention(q[3:4], k[3:4], v[3:4])
    assert torch.equal(together[3:4], alone)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_spoils_its_own_output(dtype: torch.dtype, bad: float) -> None:
    q, k, v = qkv(1, 1, 50, 50, 32, dtype)
    with wk.use_backend("cpp"):
        clean = wk.rope_attention(q, k, v)
        q[0, 0, 17] = bad
        out = wk.rope_attention(q, k, v)
    rows = torch.arange(50) != 17
    assert torch.equal(out[:, rows], clean[:, rows])
    assert out[:, 17].isnan().all()


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size(dtype: torch.dtype) -> None:
    """Scores past exp's range: the largest one takes all the weight."""
    q, k, v = qkv(1, 2, 20, 300, 64, dtype)
    with wk.use_backend("cpp"):
        out = wk.rope_attention(q * 1e4, k * 100, v)
    best = ((q * 1e4).double() @ (k * 100).double().transpose(-2, -1)).argmax(-1)
    wanted = v.gather(2, best[..., None].expand(-1, -1, -1, 64)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.compiled
def test_wide_heads() -> None:
    q, k, v = qkv(1, 1, 70, 90, 600, torch.float64)
    args = (q, k, v, -1, 0, 0)
    grad = normal(1, 70, 600, dtype=torch.float64)
    for a, t in zip(results("cpp", args, grad), results("reference", args, grad), strict=True):
        assert relative(a, t) < 1e-12
