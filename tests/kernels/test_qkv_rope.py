"""Laws of qkv_rope: norms, relative positions, streams, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import relative
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import _backend

DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
BACKEND = st.sampled_from(["cpp", "reference"] if _backend.C is not None else ["reference"])
HEAD_DIM = st.sampled_from([2, 6, 32, 64, 66, 130])
TOKENS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def weights(count: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [1 + 0.3 * normal(d, seed=seed + i, dtype=wide) for i in range(count)]


@given(b=st.integers(0, 3), tokens=TOKENS, d=HEAD_DIM, dtype=DTYPE, backend=BACKEND, data=st.data())
def test_property_streams_are_joined_in_order(
    b: int, tokens: list[int], d: int, dtype: torch.dtype, backend: str, data: st.DataObject
) -> None:
    """Values are copied; each stream's queries and keys are what the stream gives alone."""
    heads, with_queries = 2, data.draw(st.integers(1, len(tokens)))
    parts = [3 if i < with_queries else 2 for i in range(len(tokens))]
    x = [
        normal(b, n, heads * d * p, seed=n + p, dtype=dtype)
        for n, p in zip(tokens, parts, strict=True)
    ]
    wq, wk_ = weights(len(x), d, 1, dtype), weights(len(x), d, 9, dtype)
    rope = wk.rope_table(sum(tokens), d, dtype=wq[0].dtype)
    with wk.use_backend(backend):
        q, k, v = wk.qkv_rope(x, wq, wk_, rope, heads=heads)
        assert q.shape == (b, heads, sum(tokens[:with_queries]), d) and k.shape == v.shape
        split = [t.split(tokens, dim=2) for t in (k, v)]
        for i, table in enumerate(rope.split(tokens)):
            by_part = x[i].unflatten(2, (heads, d, parts[i]))
            assert torch.equal(split[1][i], by_part[..., -1].transpose(1, 2))
            # Alone, a stream must supply queries: any do.
            full = torch.cat((by_part[..., -2:-1], by_part[..., -2:]), dim=-1)
            full = by_part if parts[i] == 3 else full
            one = wk.qkv_rope([full.flatten(2)], [wq[i]], [wk_[i]], table, heads=heads)
            assert torch.equal(split[0][i], one[1])
            if parts[i] == 3:
                assert torch.equal(q.split(tokens[:with_queries], dim=2)[i], one[0])


@given(n=st.integers(1, 40), d=HEAD_DIM, scale=st.floats(0.1, 1000), backend=BACKEND)
def test_property_heads_get_norm_sqrt_d(n: int, d: int, scale: float, backend: str) -> None:
    """With weights of one, whatever the scale: RMSNorm; the rotation changes no norm."""
    x = normal(2, n, 9 * d, seed=n) * scale
    one = [torch.ones(d)]
    with wk.use_backend(backend):
        q, k, _ = wk.qkv_rope([x], one, one, wk.rope_table(n, d, step=0.7), heads=3)
    mean = x.double().unflatten(2, (3, d, 3)).square().mean(3).movedim(-1, 0).transpose(2, 3)
    wanted = (mean / (mean + torch.finfo(torch.float32).eps)).sqrt()
    for out, rms in zip((q, k), wanted[:2], strict=True):
        torch.testing.assert_close(out.double().square().mean(-1).sqrt(), rms, rtol=1e-5, atol=0)


@given(
    shift=st.integers(0, 300), step=st.sampled_from([1.0, 0.5, 4.0]), d=HEAD_DIM, backend=BACKEND
)
def test_property_scores_see_relative_positions(
    shift: int, step: float, d: int, backend: str
) -> None:
    x, one = normal(1, 20, 6 * d, seed=shift), [torch.ones(d)]
    table = wk.rope_table(20 + shift, d, step=step)
    with wk.use_backend(backend):
        scores = []
        for rope in (table[:20], table[shift:]):
            q, k, _ = wk.qkv_rope([x], one, one, rope, heads=2)
            scores.append(q @ k.transpose(-2, -1))
    # An angle of r radians is exact to r float32 epsilons.
    tolerance = 1e-6 * (1 + (20 + shift) * step)
    assert relative(*scores) < tolerance


@given(n=st.integers(1, 20), d=HEAD_DIM, dtype=DTYPE, backend=BACKEND)
def test_property_step_0_rotates_nothing(n: int, d: int, dtype: torch.dtype, backend: str) -> None:
    table = wk.rope_table(n, d, step=0.0)
    assert torch.equal(table, torch.tensor([1.0, 0.0]).repeat(n, d // 2))
    x, w = normal(1, 1, 3 * d, dtype=dtype).expand(1, n, -1), weights(1, d, 3, dtype)
    with wk.use_backend(backend):
        for out in wk.qkv_rope([x], w, w, table.to(w[0].dtype), heads=1):
            assert torch.equal(out, out[:, :, :1].expand_as(out))


def test_rope_table_is_the_formula() -> None:
    table = wk.rope_table(50, 8, step=1.25, dtype=torch.float64)
    n, i = torch.arange(50.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)
    angle = 1.25 * n * 10000 ** (-2 * i / 8)
    truth = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
    assert (table - truth).abs().max() < 1e-5


@given(
    tokens=TOKENS,
    d=st.sampled_from([32, 64, 66]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=BACKEND,
)
def test_property_gradient_is_orthogonal_to_the_input(
    tokens: list[int], d: int, dtype: torch.dtype, backend: str
) -> None:
    """A norm ignores the scale of its input, so x . dx = 0 but for the epsilon; v's is copied."""
    x = [normal(2, n, 6 * d, seed=n, dtype=dtype).requires_grad_() for n in tokens]
    w = weights(len(x), d, 5)
    rope = wk.rope_table(sum(tokens), d)
    with wk.use_backend(backend):
        out = wk.qkv_rope(x, w, w, rope, heads=2)
        grads = [normal(*o.shape, seed=7 + i, dtype=dtype) for i, o in enumerate(out)]
        d_x = torch.autograd.grad(out, x, grads)
    eps = torch.finfo(dtype).eps
    for i, (a, g) in enumerate(zip(x, d_x, strict=True)):
        a, g = (t.detach().unflatten(2, (2, d, 3)) for t in (a, g))
        assert torch.equal(g[..., 2], grads[2].split(tokens, dim=2)[i].transpose(1, 2))
        a, g = a[..., :2].double(), g[..., :2].double()
        bound = a.norm(dim=3) * g.norm(dim=3) * 2 * eps + 1e-5 * (1 + 1 / a.norm(dim=3))
        assert ((a * g).sum(3).abs() <= bound).all()


@pytest.mark.compiled
@pytest.mark.parametrize("d", [64, 10])
def test_property_thread_count_changes_no_bit_of_the_gradients(d: int) -> None:
    tokens, threads = [70, 33], torch.get_num_threads()
    x = [
        normal(3, n, p * 2 * d, seed=n).requires_grad_()
        for n, p in zip(tokens, (3, 2), strict=True)
    ]
    w = [t.requires_grad_() for t in (*weights(2, d, 1), *weights(2, d, 5))]
    rope, results = wk.rope_table(sum(tokens), d), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with wk.use_backend("cpp"):
                out = wk.qkv_rope(x, w[:2], w[2:], rope, heads=2)
                grads = [normal(*o.shape, seed=3) for o in out]
                results.append([*out, *torch.autograd.grad(out, [*x, *w], grads)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][3 + 3].any(), "the q_weight of a stream without queries"


@pytest.mark.compiled
def test_no_gradient_for_the_table() -> None:
    rope = wk.rope_table(3, 4).requires_grad_()
    x, w = torch.ones(1, 3, 12, requires_grad=True), [torch.ones(4)]
    with pytest.raises(RuntimeError, match="no gradient with respect to rope"):
        wk.qkv_rope([x], w, w, rope, heads=1)[0].sum().backward()
