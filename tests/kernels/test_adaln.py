"""Laws of adaln and gated_residual_adaln, their rows, and what the kernels read of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import relative
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend

BACKEND = st.sampled_from(["cpp", "reference"] if _backend.C is not None else ["reference"])
DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
CHANNELS = st.integers(1, 150)
BATCH = st.integers(1, 3)


@st.composite
def token_maps(draw: st.DrawFn) -> wk.TokenRows:
    """Rows of 1 to 70 tokens; some rows have many tokens, some none."""
    lengths = draw(st.lists(st.integers(0, 35), min_size=1, max_size=6).filter(any))
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return wk.token_rows(index, len(lengths))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def modulation(
    b: int, rows: wk.TokenRows | None, c: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk views (b r c) of one projection."""
    r = 1 if rows is None else len(rows.offsets) - 1
    return normal(b, r, 3 * c, seed=1, dtype=dtype).chunk(3, -1)


@given(b=BATCH, c=CHANNELS, rows=token_maps(), backend=BACKEND, dtype=DTYPE)
def test_property_gathered_rows_are_a_row_per_token(
    b: int, c: int, rows: wk.TokenRows, backend: str, dtype: torch.dtype
) -> None:
    n = len(rows.index)
    x, y = normal(b, n, c, seed=2, dtype=dtype), normal(b, n, c, seed=3, dtype=dtype)
    shift, scale, gate = modulation(b, rows, c, dtype)
    every = wk.token_rows(torch.arange(n), n)
    wide = [t.index_select(1, rows.index) for t in (shift, scale, gate)]
    with wk.use_backend(backend):
        assert torch.equal(wk.adaln(x, shift, scale, rows), wk.adaln(x, wide[0], wide[1], every))
        new, out = wk.gated_residual_adaln(x, y, gate, rows, shift, scale, rows)
        new_wide, out_wide = wk.gated_residual_adaln(x, y, wide[2], every, *wide[:2], every)
    assert torch.equal(new, new_wide) and torch.equal(out, out_wide)


@given(b=BATCH, n=st.integers(1, 40), c=CHANNELS, backend=BACKEND, dtype=DTYPE)
def test_property_a_closed_gate_leaves_adaln(
    b: int, n: int, c: int, backend: str, dtype: torch.dtype
) -> None:
    x, y = normal(b, n, c, dtype=dtype), normal(b, n, c, seed=3, dtype=dtype)
    shift, scale, gate = modulation(b, None, c, dtype)
    with wk.use_backend(backend):
        new, out = wk.gated_residual_adaln(x, y, gate * 0, None, shift, scale)
        assert torch.equal(out, wk.adaln(x, shift, scale))
    assert torch.equal(new, x)


@given(n=st.integers(1, 20), c=st.integers(2, 300), backend=BACKEND)
def test_property_without_modulation_mean_0_and_variance_1(n: int, c: int, backend: str) -> None:
    x, none = normal(1, n, c) * 3 + 1, torch.zeros(1, 1, c)
    with wk.use_backend(backend):
        out = wk.adaln(x, none, none, eps=1e-12).double()
    assert out.mean(-1).abs().max() < 1e-4
    torch.testing.assert_close(
        out.var(-1, correction=0), torch.ones(1, n, dtype=torch.float64), rtol=1e-3, atol=0
    )


@given(
    c=st.integers(2, 300),
    offset=st.floats(-4, 4),
    factor=st.floats(0.5, 8),
    backend=BACKEND,
)
def test_property_level_and_offset_of_a_token_vanish(
    c: int, offset: float, factor: float, backend: str
) -> None:
    x, (shift, scale, _) = normal(2, 7, c, dtype=torch.float64), modulation(2, None, c)
    shift, scale = shift.double(), scale.double()
    with wk.use_backend(backend):
        a = wk.adaln(x, shift, scale, eps=1e-12)
        b = wk.adaln(x * factor + offset, shift, scale, eps=1e-12)
    assert relative(b, a) < 1e-6


@given(b=BATCH, c=CHANNELS, rows=token_maps(), backend=BACKEND)
def test_property_row_gradients_add_up(b: int, c: int, rows: wk.TokenRows, backend: str) -> None:
    """The gradient of the shift is the output's, summed; every token goes to one row."""
    x = normal(b, len(rows.index), c)
    shift, scale, gate = (t.clone().requires_grad_() for t in modulation(b, rows, c))
    grad = normal(*x.shape, seed=5)
    with wk.use_backend(backend):
        out = wk.adaln(x, shift, scale, rows)
        (d_shift,) = torch.autograd.grad(out, shift, grad)
        new, _ = wk.gated_residual_adaln(x, x, gate, rows, shift, scale, rows)
        (d_gate,) = torch.autograd.grad(new, gate, grad)
    for row, (begin, end) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        part, dx = grad[:, begin:end].double(), x[:, begin:end].double()
        torch.testing.assert_close(d_shift[:, row].double(), part.sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            d_gate[:, row].double(), (part * dx).sum(1), rtol=1e-4, atol=1e-4
        )


@given(b=BATCH, c=CHANNELS, rows=token_maps(), gate_rows=token_maps(), dtype=DTYPE)
def test_property_gradients_are_the_references(
    b: int, c: int, rows: wk.TokenRows, gate_rows: wk.TokenRows, dtype: torch.dtype
) -> None:
    n = min(len(rows.index), len(gate_rows.index))
    rows, gate_rows = (wk.token_rows(r.index[:n], len(r.offsets) - 1) for r in (rows, gate_rows))
    inputs = [normal(b, n, c, seed=i, dtype=dtype) for i in (2, 3)]
    shift, scale, _ = modulation(b, rows, c, dtype)
    inputs += [modulation(b, gate_rows, c, dtype)[2], shift, scale]
    grads = [normal(b, n, c, seed=i, dtype=dtype) for i in (7, 8)]

    def gradients(wide: torch.dtype) -> tuple[Tensor, ...]:
        x, y, gate, shift, scale = leaves = [t.detach().to(wide).requires_grad_() for t in inputs]
        outs = wk.gated_residual_adaln(x, y, gate, gate_rows, shift, scale, rows)
        return torch.autograd.grad(outs, leaves, [g.to(wide) for g in grads])

    with wk.use_backend("reference"):
        truth = gradients(torch.float64)
    for actual, wanted in zip(gradients(dtype), truth, strict=True):
        assert relative(actual, wanted) < 4 * torch.finfo(dtype).eps + 1e-12


@pytest.mark.compiled
def test_property_threads_change_no_bit_of_the_gradients() -> None:
    for name in ("adaln_backward", "gated_residual_adaln_backward"):
        op, threads, results = REGISTRY[name], torch.get_num_threads(), []
        args = [s.args for s in op.samples(torch.device("cpu"), torch.bfloat16, 3)]
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append([t for a in args for t in op(*a)])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["adaln", "gated_residual_adaln"])
def test_rows_shared_by_the_batch_are_read_in_place(name: str) -> None:
    """An expanded table gives what its copy gives, and its gradient is the batch's sum."""
    x, rows = normal(3, 9, 20), wk.token_rows(torch.arange(9) // 4, 3)
    tables = [t.clone().requires_grad_() for t in modulation(1, rows, 20)]

    def run(tables: list[Tensor]) -> tuple[Tensor, ...]:
        shift, scale, gate = tables
        if name == "adaln":
            return (wk.adaln(x, shift, scale, rows),)
        return wk.gated_residual_adaln(x, x, gate, rows, shift, scale, rows)

    expanded = [t.expand(3, 3, 20) for t in tables]
    assert all(t.stride(0) == 0 for t in expanded)
    outs, copies = run(expanded), run([t.contiguous() for t in expanded])
    assert all(torch.equal(a, b) for a, b in zip(outs, copies, strict=True))
    used = tables[: 2 if name == "adaln" else 3]
    grads = torch.autograd.grad(sum(o.square().sum() for o in outs), used)
    parts = [t.detach().expand(3, 3, 20).clone().requires_grad_() for t in tables]
    full = torch.autograd.grad(sum(o.square().sum() for o in run(parts)), parts[: len(used)])
    for shared, each in zip(grads, full, strict=True):
        torch.testing.assert_close(shared, each.sum(0, keepdim=True))


def test_the_norm_sees_the_sum_before_it_is_rounded() -> None:
    """1 + 2^-10 y is 1 in bfloat16: all of the normalised row comes from what rounding drops."""
    x, y = torch.ones(1, 1, 256).bfloat16(), normal(1, 1, 256).bfloat16()
    gate, none = torch.full((1, 1, 256), 2.0**-10).bfloat16(), torch.zeros(1, 1, 256).bfloat16()
    new, out = wk.gated_residual_adaln(x, y, gate, None, none, none, eps=1e-12)
    wide = y.double()
    wanted = (wide - wide.mean()) / wide.std(correction=0)
    assert relative(out, wanted) < 0.004
    assert relative(new, torch.ones(1, 1, 256)) < 0.004


def test_token_rows() -> None:
    rows = wk.token_rows(torch.tensor([0, 0, 2, 2, 2, 3]), 5)
    assert rows.index.tolist() == [0, 0, 2, 2, 2, 3] and rows.offsets.tolist() == [0, 2, 2, 5, 6, 6]
    assert rows.index.dtype == rows.offsets.dtype == torch.int32


def rows_of(index: list[int], offsets: list[int]) -> wk.TokenRows:
    return wk.TokenRows(
        torch.tensor(index, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
    )


WRONG_ROWS: dict[str, Any] = {
    "index is 7 at token 3, where offsets have row 1": rows_of([0, 0, 1, 7], [0, 2, 4]),
    "index is -1 at token 0, where offsets have row 0": rows_of([-1, 0, 1, 1], [0, 2, 4]),
    "index is 0 at token 3, where offsets have row 1": rows_of([0, 0, 1, 0], [0, 2, 4]),
    "offsets must rise from 0 to 4, got 5 at 1": rows_of([0, 0, 0, 0], [0, 5, 4]),
    "offsets must rise from 0 to 4, got -9 at 0": rows_of([0, 0, 0, 0], [-9, 4, 4]),
    "offsets must rise from 0 to 4, got 3 at 2": rows_of([0, 0, 1, 1], [0, 2, 3]),
}


@pytest.mark.compiled
@pytest.mark.parametrize("message", list(WRONG_ROWS))
def test_rows_made_by_hand_are_checked(message: str) -> None:
    x, table, rows = normal(1, 4, 6), normal(1, 2, 6), WRONG_ROWS[message]
    good = wk.token_rows(torch.tensor([0, 0, 1, 1]), 2)
    calls = {
        "adaln": lambda: wk.adaln(x, table, table, rows),
        "gated_residual_adaln": lambda: wk.gated_residual_adaln(
            x, x, table, rows, table, table, good
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            call()
    with pytest.raises(ValueError, match=f"^adaln: {message}"):
        REGISTRY["adaln_backward"](x, x, table, *rows, 1e-5)
