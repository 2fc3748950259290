"""Laws of conv1d and conv_swiglu, with plain weights and with prepared ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.numerics import assert_close, filters, normal, relative
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import _backend, _panels, cpu
from wavflow_kernels.ops import conv1d, conv_swiglu, prepared_conv

BACKEND = st.sampled_from(["library", "reference", *([] if _backend.C is None else ["cpp"])])
WIDTH = st.sampled_from([1, 3, 7])
N, C = st.integers(1, 40), st.integers(1, 40)
HALF = st.sampled_from([torch.float32, torch.bfloat16])
winograd_runs = pytest.mark.skipif(
    not prepared_conv.fast(torch.zeros(1)), reason="no compiled kernels, or torch without oneDNN"
)


@given(b=st.integers(1, 3), n=N, c=C, o=C, k=WIDTH, backend=BACKEND)
def test_property_conv1d_is_the_sum_of_its_taps(
    b: int, n: int, c: int, o: int, k: int, backend: str
) -> None:
    x, weight, bias = normal(b, n, c), filters(o, c, k), normal(o, seed=2)
    with wk.use_backend(backend):
        out = wk.conv1d(x, weight, bias)
    truth = bias.double().expand(b, n, o).clone()
    for j in range(k):
        shift = j - k // 2
        first, last = max(0, -shift), min(n, n - shift)
        if first < last:
            truth[:, first:last] += (
                x[:, first + shift : last + shift].double() @ weight[..., j].double().t()
            )
    assert_close(out, truth, "matrix", peer=conv1d.plain(x, weight, bias))


@given(n=N, c=C, o=C, k=WIDTH, data=st.data(), backend=BACKEND)
def test_property_conv1d_moves_with_its_input(
    n: int, c: int, o: int, k: int, data: st.DataObject, backend: str
) -> None:
    """Zeros put before and after a sequence shift the result and change nothing else."""
    before = data.draw(st.integers(0, 5))
    x, weight = normal(2, n, c), filters(o, c, k)
    with wk.use_backend(backend):
        out = wk.conv1d(x, weight)
        moved = wk.conv1d(F.pad(x, (0, 0, before, 3)), weight)[:, before : before + n]
    torch.testing.assert_close(moved, out, rtol=1e-5, atol=1e-5)


@given(n=N, o=C, rows=st.integers(1, 6), backend=BACKEND)
def test_property_conv1d_gates_rows(n: int, o: int, rows: int, backend: str) -> None:
    x, weight, residual = normal(2, n, 9), filters(o, 9, 3), normal(2, n, o, seed=3)
    gate = normal(2, rows, o, seed=4)
    index = (torch.arange(n) * rows // n).int()
    with wk.use_backend(backend):
        z = wk.conv1d(x, weight)
        gated = conv1d.OP(x, weight, None, False, residual, gate, index)
        zero = wk.conv1d(x, weight, residual=residual, gate=torch.zeros(2, 1, o))
        plain = wk.conv1d(x, weight, residual=residual)
    torch.testing.assert_close(gated, residual + gate[:, index.long()] * z, rtol=1e-5, atol=1e-5)
    assert torch.equal(zero, residual)
    torch.testing.assert_close(plain, residual + z, rtol=1e-6, atol=1e-6)


@given(n=N, c=C, i=C, k=WIDTH, backend=BACKEND)
def test_property_conv_swiglu_is_linear_in_w3(n: int, c: int, i: int, k: int, backend: str) -> None:
    x, w1, w3 = normal(2, n, c), filters(i, c, k, 1), filters(i, c, k, 2)
    with wk.use_backend(backend):
        one, two = wk.conv_swiglu(x, w1, w3), wk.conv_swiglu(x, w1, 2 * w3)
        a, b = wk.conv1d(x, w1), wk.conv1d(x, w3)
    assert torch.equal(two, 2 * one)
    torch.testing.assert_close(one, F.silu(a) * b, rtol=1e-5, atol=1e-5)


@given(n=N, c=C, o=C, selu=st.booleans())
def test_property_a_linear_is_a_convolution_of_width_1(n: int, c: int, o: int, selu: bool) -> None:
    """Forward and gradients, in float32: the path past F.linear against F.linear."""
    x, weight, bias = normal(2, n, c), filters(o, c, 1)[..., 0], normal(o, seed=2)
    grad = normal(2, n, o, seed=3)
    activation = "selu" if selu else None

    def run(call: object, *inputs: Tensor) -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.linear(x, weight, bias)
        return F.selu(z) if selu else z

    inputs = (x, weight, bias)
    found = run(lambda *t: wk.conv1d(*t, activation=activation), *inputs)
    truth, peer = run(linear, *(t.double() for t in inputs)), run(linear, *inputs)
    assert_close(found, truth, "matrix", peer=peer)


@given(n=N, c=C, o=C, k=WIDTH, gated=st.booleans(), dtype=HALF)
def test_property_prepared_weights_give_the_same(
    n: int, c: int, o: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    x = normal(2, n, c, dtype=dtype)
    weights = [filters(o, c, k, s) for s in (1, 2)]
    cast = [w.to(dtype) for w in weights]
    if gated:
        out = wk.conv_swiglu(x, wk.prepare_conv(weights, dtype=dtype))
        plain = conv_swiglu.OP.reference(x, *cast, False)[0]
        a, b = (conv1d.plain(x.double(), w.double()) for w in cast)
        truth = F.silu(a) * b
    else:
        bias = normal(o, seed=3, dtype=dtype)
        out = wk.conv1d(x, wk.prepare_conv(weights[0], dtype=dtype), bias, activation="selu")
        plain = conv1d.OP.reference(x, cast[0], bias, True, None, None, None)
        truth = F.selu(conv1d.plain(x.double(), cast[0].double(), bias.double()))
    assert_close(out, truth, "matrix", peer=plain)


@winograd_runs
@given(
    b=st.integers(0, 2),
    n=N,
    c=C,
    o=C,
    gated=st.booleans(),
    strided=st.booleans(),
    dtype=HALF,
    backend=st.sampled_from(["cpp", "reference"]),
)
def test_property_winograd_is_the_convolution(
    b: int,
    n: int,
    c: int,
    o: int,
    gated: bool,
    strided: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Any length, odd and 1 included: within a few roundings of its factors."""
    x, weights = normal(b, n, c, dtype=dtype), [filters(o, c, 3, s) for s in (1, 2)]
    if strided:
        x = normal(c, n, b + 1, dtype=dtype).transpose(0, 2)[1:]
    truth, *rest = (conv1d.plain(x.double(), w.double()) for w in weights)
    given = weights if gated else weights[0]
    prepared = wk.prepare_conv(given, dtype=dtype, winograd=True)
    with wk.use_backend(backend):
        if gated:
            out = wk.conv_swiglu(x, prepared)
            truth = F.silu(truth) * rest[0]
        else:
            bias = normal(o, seed=3, dtype=dtype)
            out = wk.conv1d(x, prepared, bias)
            truth = truth + bias.double()
    assert out.shape == truth.shape and out.dtype == dtype
    if b:
        error = (out.double() - truth).abs().max() / truth.abs().max().clamp_min(1)
        assert error < (8 if dtype == torch.bfloat16 else 32) * torch.finfo(dtype).eps


@winograd_runs
@given(o=st.integers(1, 20), c=st.integers(1, 300), pair=st.booleans(), dtype=HALF)
def test_property_winograd_weights_are_prepared_as_written(
    o: int, c: int, pair: bool, dtype: torch.dtype
) -> None:
    """Also strided weights, and of another dtype than float32."""
    given = [filters(o, c, 6, seed)[..., ::2] for seed in range(1 + pair)]
    four = prepared_conv.winograd_weights(torch.cat(given))
    for source in (torch.float32, torch.float64):
        prepared = wk.prepare_conv([w.to(source) for w in given], dtype=dtype, winograd=True)
        for weight, wanted in zip(prepared.weights, four, strict=True):
            assert weight.dtype == cpu.product_dtype(dtype)
            if weight.dim() == 3:
                assert _panels.fastest(dtype) and o % _panels.WIDTH == 0
                weight = _panels.unpacked(weight, c).squeeze(2)
            assert torch.equal(weight.to_dense(), wanted.to(weight.dtype))


@winograd_runs
def test_property_winograd_error_is_twice_the_direct_ones() -> None:
    """Where products are rounded to bfloat16; by float32 its only error is the result's."""
    x, w = normal(1, 101, 256, dtype=torch.bfloat16), filters(200, 256, 3)
    truth = conv1d.plain(x.double(), w.double())
    direct = relative(wk.conv1d(x, wk.prepare_conv(w, dtype=x.dtype)), truth)
    winograd = relative(wk.conv1d(x, wk.prepare_conv(w, dtype=x.dtype, winograd=True)), truth)
    if cpu.product_dtype(x.dtype) == x.dtype:
        assert direct < winograd < 2.5 * direct
    else:
        assert winograd < direct


@winograd_runs
@pytest.mark.parametrize("gated", [False, True])
def test_property_winograd_error_in_float32(gated: bool) -> None:
    """At the medium network's width it is 2.6 times that of the direct form with AVX-512, 0.75
    times with AVX2, where oneDNN adds all products of a sum one after the other."""
    x, weights = normal(1, 101, 896), [filters(300, 896, 3, s) for s in (1, 2)]
    truth, other = (conv1d.plain(x.double(), w.double()) for w in weights)
    truth = F.silu(truth) * other if gated else truth
    errors = []
    for winograd in (False, True):
        prepared = wk.prepare_conv(weights if gated else weights[0], winograd=winograd)
        out = wk.conv_swiglu(x, prepared) if gated else wk.conv1d(x, prepared)
        errors.append(relative(out, truth))
    assert errors[0] != errors[1] < min(4 * errors[0], 1e-6)


@winograd_runs
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_form_is_chosen_by_width_and_size(k: int) -> None:
    """Float32 keeps the bits of plain weights, except for large ones of width 3."""
    x, small, large = normal(2, 9, 64), filters(48, 64, k), filters(1024, 350, k)
    panels = _panels.fastest(torch.float32)
    for winograd in (None, False):
        prepared = wk.prepare_conv(small, winograd=winograd)
        assert prepared.packed == (k == 1 or panels) and len(prepared.weights) == 1
        assert torch.equal(wk.conv1d(x, prepared), wk.conv1d(x, small))
    for weight in (large, [large[:512], large[512:]]):
        for dtype in (torch.float32, torch.bfloat16):
            prepared = wk.prepare_conv(weight, dtype=dtype, winograd=None)
            assert (len(prepared.weights) == 4) == (k == 3)
            assert prepared.packed == (k < 7 or dtype == torch.bfloat16 or panels)


@winograd_runs
def test_property_prepared_threads_change_no_bit() -> None:
    """The transforms' blocks; oneDNN's own sums over channels are not split among threads."""
    threads = torch.get_num_threads()
    weights = wk.prepare_conv([filters(64, 32, 3, s) for s in (1, 2)], winograd=True)
    x = normal(2, 77, 32)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(wk.conv_swiglu(x, weights))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("k", [1, 3])
def test_prepared_weights_refuse_gradients(k: int) -> None:
    x = normal(1, 4, 8).requires_grad_()
    single = wk.prepare_conv(filters(6, 8, k))
    pair = wk.prepare_conv([filters(6, 8, k), filters(6, 8, k)])
    for call in (lambda: wk.conv1d(x, single), lambda: wk.conv_swiglu(x, pair)):
        with pytest.raises(RuntimeError, match="prepared weights have no gradient"):
            call()
        with torch.no_grad():
            call()


def test_prepared_weights_are_copies() -> None:
    for k in (1, 3):
        weight, x = filters(6, 8, k), normal(1, 4, 8)
        prepared = wk.prepare_conv(weight)
        before = wk.conv1d(x, prepared)
        weight.zero_()
        assert torch.equal(wk.conv1d(x, prepared), before) and before.any()


@pytest.mark.parametrize("winograd", [False, pytest.param(True, marks=winograd_runs)])
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_prepared_weights_compile(mode: str, winograd: bool) -> None:
    x = normal(2, 9, 8)
    weights = wk.prepare_conv([filters(6, 8, 3, s) for s in (1, 2)], winograd=winograd)

    def call(x: Tensor) -> Tensor:
        return wk.conv_swiglu(x * 2, weights) + 1

    with torch.no_grad():
        out = torch.compile(call, backend=mode, fullgraph=True)(x)
        torch.testing.assert_close(out, call(x))
    torch._dynamo.reset()


def test_prepared_weights_run_under_autocast() -> None:
    x, weight = normal(1, 5, 8), filters(6, 8, 3)
    half = wk.prepare_conv(weight, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wk.conv1d(x, half), wk.conv1d(x.bfloat16(), half))
    with pytest.raises(TypeError, match="prepared for bfloat16, x is computed in float32"):
        wk.conv1d(x, half)


def test_backward_without_kept_activations_recomputes() -> None:
    x, w1, w3 = (t.requires_grad_() for t in (normal(2, 9, 8), filters(6, 8, 3), filters(6, 8, 3)))
    grads = []
    for keep in (True, False):
        out, a, b = torch.ops.wavflow.conv_swiglu(x, w1, w3, keep)
        assert a.numel() == b.numel() == (out.numel() if keep else 0)
        grads.append(torch.autograd.grad(out.sum(), (x, w1, w3)))
    for kept, again in zip(*grads, strict=True):
        torch.testing.assert_close(kept, again)
