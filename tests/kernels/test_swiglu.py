"""Laws of swiglu."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import BACKEND, DTYPE, assert_close, normal, to_float64

import wavflow_kernels as wk
from wavflow_kernels.ops import swiglu

SIZES = st.integers(1, 70)


@given(b=st.integers(0, 3), n=SIZES, i=SIZES, backend=BACKEND, dtype=DTYPE)
def test_property_swiglu_of_halves_is_that_of_copies(
    b: int, n: int, i: int, backend: str, dtype: torch.dtype
) -> None:
    joined = normal(b, n, 2 * i, dtype=dtype)
    halves = joined.chunk(2, -1)
    with wk.use_backend(backend):
        out = wk.swiglu(*halves)
        copies = wk.swiglu(*(h.contiguous() for h in halves))
        apart = wk.swiglu(*(h.transpose(0, 1).contiguous().transpose(0, 1) for h in halves))
    if backend == "cpp":  # torch's own loops take another path, with other bits, along a stride
        assert torch.equal(out, copies) and torch.equal(out, apart)
    truth = swiglu.OP.reference(*to_float64(halves))
    assert_close([out, copies, apart], [truth] * 3, "single_pass")


@given(scale=st.floats(1e-3, 1e30), i=st.integers(1, 200), backend=BACKEND)
def test_property_swiglu_ends_in_zero_and_identity(scale: float, i: int, backend: str) -> None:
    """silu(a) b is a b far above 0 and 0 far below; at 0 it is 0."""
    a, ones = normal(1, 1, i).abs() * scale, torch.ones(1, 1, i)
    with wk.use_backend(backend):
        above, below = wk.swiglu(a, ones), wk.swiglu(-a, ones)
        assert not wk.swiglu(torch.zeros_like(a), ones).any()
    # silu(a) - silu(-a) = a
    torch.testing.assert_close(above + below.abs(), a, rtol=1e-6, atol=0)
    assert torch.equal(above[a > 20], a[a > 20])
    assert (below[a > 110] == 0).all() and (below <= 0).all()


@given(b=st.integers(1, 2), n=SIZES, i=SIZES, backend=BACKEND)
def test_property_swiglu_gradient_of_b_is_the_gate(b: int, n: int, i: int, backend: str) -> None:
    """The result is linear in b: its gradient there is the result for b = 1 times the incoming."""
    a, b_, grad = (normal(b, n, i, seed=s) for s in range(3))
    b_.requires_grad_()
    with wk.use_backend(backend):
        wk.swiglu(a, b_).backward(grad)
        gate = wk.swiglu(a, torch.ones_like(a))
    torch.testing.assert_close(b_.grad, grad * gate, rtol=1e-6, atol=1e-7)


def test_property_swiglu_passes_nan_on() -> None:
    a = torch.tensor([[[float("nan"), 1.0, 1.0]]])
    b = torch.tensor([[[1.0, float("nan"), 1.0]]])
    assert wk.swiglu(a, b).isnan().tolist() == [[[True, True, False]]]


@pytest.mark.compiled
def test_property_swiglu_threads_change_no_bit() -> None:
    """Rows longer and shorter than a block, cut among 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    try:
        for shape in ((2, 3, 40_000), (2, 900, 70)):
            a, b, grad = (normal(*shape, seed=s) for s in range(3))
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append((wk.swiglu(a, b), *swiglu.BACKWARD(grad, a, b)))
            for other in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)
