"""Flow matching and its solvers: golden vectors, exact cases and properties."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_weights import golden_state_dict, load_golden, relative_error
from support.numerics import assert_recorded

from wavflow.flow.matching import FlowMatching, log_normal_sample
from wavflow.flow.solvers import SOLVERS, adaptive, solve, solver_table
from wavflow.flow.times import (
    LOG_SNR,
    SIGMOID_SLOPE,
    log_snr_grid,
    sampling_times,
    shift_time,
    time_grid,
)
from wavflow.systems.wavflow.network import WavflowModel
from wavflow_kernels import use_backend

TOLERANCE = 1e-5
LOSSES = ("x_pred_x_loss", "x_pred_v_loss", "v_pred_v_loss", "v_pred_x_loss")
properties = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["model_tiny", "model_head64"])
def golden(request):
    """A golden file, and fn(t, x) of its guided model."""
    tensors, metadata = load_golden(request.param)
    fn = guided(tensors, metadata)
    fn.exact = guided(tensors, metadata, torch.float64)
    return tensors, fn


def guided(tensors, metadata, dtype=torch.float32):
    model = WavflowModel(**json.loads(metadata["config"]))
    model.load_weights(golden_state_dict(model))
    model.to(dtype)
    with torch.no_grad():
        conditions = model.preprocess_conditions(
            *(tensors[f"in.{k}"].to(dtype) for k in ("clip", "sync", "text"))
        )
        empty = model.get_empty_conditions(3)

    def fn(weight):
        return lambda t, x: model.ode_wrapper(t, x, conditions, empty, weight)

    fn.model, fn.conditions, fn.empty = model, conditions, empty
    return fn


@pytest.fixture(scope="module")
def edge():
    """The edge cases' file, the inputs they belong to, and fn(t, x) of the guided model."""
    tensors, metadata = load_golden("model_tiny")
    return load_golden("edge_tiny")[0], tensors, guided(tensors, metadata)


def tokens(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Golden vectors


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_golden_euler(golden, prediction, shift):
    tensors, fn = golden
    flow = FlowMatching(num_steps=5, prediction_type=prediction, noise_shift=shift)
    noise, wanted = tensors["in.noise"], tensors[f"out.euler5_{prediction}_shift{shift}"]
    exact = flow.to_data(fn.exact(4.5), noise.double())
    with use_backend("reference"):
        plain = flow.to_data(fn(4.5), noise)
    assert_recorded(flow.to_data(fn(4.5), noise), wanted, exact, plain, TOLERANCE)


def test_golden_path_and_losses(golden):
    tensors, _ = golden
    flow = FlowMatching(noise_shift=3.0)
    t = flow.shift_timestep(tensors["in.t"])
    assert relative_error(t, tensors["fm.t_shifted3"]) < TOLERANCE
    x0, x1 = tensors["in.noise"], tensors["in.latent"]
    xt = flow.get_conditional_flow(x0, x1, t)
    assert relative_error(xt, tensors["fm.xt_shift3"]) < TOLERANCE
    for loss in LOSSES:
        got = getattr(flow, loss)(tensors["fm.pred"], x0, xt, x1, t)
        assert relative_error(got, tensors[f"fm.{loss}"]) < TOLERANCE, loss


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_golden_min_sigma(edge, prediction):
    wanted, tensors, fn = edge
    flow = FlowMatching(min_sigma=0.01, num_steps=5, prediction_type=prediction)
    got = flow.to_data(fn(2.0), tensors["in.noise"])
    assert relative_error(got, wanted[f"euler5_{prediction}_minsigma0.01_cfg2"]) < TOLERANCE


def test_golden_to_prior(edge):
    wanted, tensors, fn = edge
    flow = FlowMatching(num_steps=5, prediction_type="v")
    got = flow.to_prior(fn(1.0), tensors["in.latent"])
    assert relative_error(got, wanted["to_prior5_v_cfg1"]) < TOLERANCE


def test_golden_losses_near_the_end(edge):
    wanted, tensors, _ = edge
    flow = FlowMatching(min_sigma=0.01)
    x0, x1, t = tensors["in.noise"], tensors["in.latent"], wanted["loss.t"]
    xt = flow.get_conditional_flow(x0, x1, t)
    assert relative_error(xt, wanted["loss.xt_minsigma0.01"]) < TOLERANCE
    for loss in LOSSES:
        got = getattr(flow, loss)(wanted["loss.pred"], x0, xt, x1, t)
        # Each item on its own: at t = 1 the velocity loss is 1e12 times the others.
        for item in range(3):
            assert relative_error(got[item], wanted[f"loss.{loss}"][item]) < TOLERANCE, loss


def test_golden_noise(edge):
    wanted, tensors, _ = edge
    flow = FlowMatching(noise_scale=0.7, noise_shift=3.0)
    conditions = object()
    x0, x1, xt, t, passed = flow.get_x0_xt_c(
        tensors["in.latent"],
        torch.tensor([0.2, 0.5, 0.8]),
        conditions,
        generator=torch.Generator().manual_seed(123),
    )
    assert x1 is tensors["in.latent"]
    assert passed is conditions
    for name, value in (("x0", x0), ("xt", xt), ("t", t)):
        key = f"x0xtc_seed123_scale0.7_shift3.{name}"
        assert relative_error(value, wanted[key]) < TOLERANCE, name


def test_golden_log_normal_sample(edge):
    wanted = edge[0]["log_normal_seed123_m0.3_s0.8"]
    generator = torch.Generator().manual_seed(123)
    got = log_normal_sample(torch.empty(6, 2, 3), generator, m=0.3, s=0.8)
    assert got.dtype == torch.float32
    assert relative_error(got, wanted) < TOLERANCE


# Solvers


def test_guidance_in_the_step_equals_guidance_in_the_network(golden):
    tensors, fn = golden
    table = solver_table("euler", time_grid(5), guidance=4.5)

    def run(fn, noise):
        def pair(t, x):
            return fn.model.predict_flow_pair(x, t, fn.conditions, fn.empty)

        return solve(pair, noise, table)

    noise, wanted = tensors["in.noise"], tensors["out.euler5_x_shift1.0"]
    with use_backend("reference"):
        plain = run(fn, noise)
    exact = FlowMatching(num_steps=5, prediction_type="x").to_data(fn.exact(4.5), noise.double())
    assert_recorded(run(fn, noise), wanted, exact, plain, TOLERANCE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_euler_is_exact_on_constant_velocity(dtype, shift):
    x0, x1 = tokens(0, 2, 5, 3).to(dtype), tokens(1, 2, 5, 3).to(dtype)
    seen = []

    def velocity(t, x):
        assert t.dim() == 0 and x.dtype == dtype
        seen.append((float(t), x))
        return x1 - x0

    def clean(t, x):
        return x1

    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for prediction, fn in (("v", velocity), ("x", clean)):
        flow = FlowMatching(num_steps=7, prediction_type=prediction, noise_shift=shift)
        got = flow.to_data(fn, x0)
        assert got.dtype == dtype
        assert relative_error(got, x1) < tolerance, prediction
    times = [t for t, _ in seen]
    assert times[0] == 0 and len(times) == 7
    assert times == sorted(times)
    assert torch.equal(seen[0][1], x0)  # what fn got is not overwritten later


class Gaussian:
    """Data of mean 0.7 and deviation 0.3: the best prediction and the flow are known."""

    mean, deviation = 0.7, 0.3

    def clean(self, t, x):
        spread = (1 - t) ** 2 + (self.deviation * t) ** 2
        return self.mean + self.deviation**2 * t / spread * (x - t * self.mean)

    def flow(self, t, x0):
        return t * self.mean + math.hypot(1 - t, self.deviation * t) * x0


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize(
    ("method", "order", "evaluations"),
    [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 4), ("ab2", 2, 1)]
    + [("2m", 2, 1)],
)
def test_solvers_converge_with_their_order(method, order, evaluations, prediction):
    """dx/dt = -x^2 cos(t), of which 1/x(t) = 1/x(t_0) + sin(t) - sin(t_0)."""
    x0 = torch.linspace(0.5, 3, 9, dtype=torch.float64).view(1, 9, 1)

    def velocity(t, x):
        return -x.square() * torch.cos(t)

    def clean(t, x):
        return x + (1 - t) * velocity(t, x)

    errors = []
    for steps in (40, 80):
        # Uneven steps, away from both ends where 2M falls back to Euler's.
        grid = time_grid(steps, 0.2, 0.7, shift=2.0)
        table = solver_table(method, grid, prediction=prediction)
        assert len(table) == evaluations * steps
        got = solve(clean if prediction == "x" else velocity, x0, table)
        exact = 1 / (1 / x0 + grid[-1].sin() - grid[0].sin())
        errors.append((got - exact).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", list(SOLVERS))
def test_solvers_go_from_noise_to_data(method):
    """Over the whole interval, where x-prediction's velocity is 0/0 at the end."""
    gaussian = Gaussian()
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 9, 1)
    euler = relative_error(
        solve(gaussian.clean, x0, solver_table("euler", time_grid(40))), gaussian.flow(1.0, x0)
    )
    got = solve(gaussian.clean, x0, solver_table(method, time_grid(40)))
    error = relative_error(got, gaussian.flow(1.0, x0))
    assert error == euler if method == "euler" else error < euler / 4


def test_solver_arguments():
    with pytest.raises(ValueError, match="solver is 'eule', wanted one of euler, midpoint"):
        solver_table("eule", time_grid(3))
    with pytest.raises(ValueError, match="solver 2m needs times that increase"):
        solver_table("2m", time_grid(3, 1.0, 0.0))
    with pytest.raises(ValueError, match="prediction is 'e'"):
        solver_table("rk4", time_grid(3), prediction="e")
    with pytest.raises(ValueError, match="slope is -1"):
        time_grid(3, slope=-1)


def test_times_even_in_the_log_snr():
    grid = log_snr_grid(12)
    assert grid[0] == 0 and grid[-1] == 1 and len(grid) == 13 and grid.dtype == torch.float64
    inner = torch.logit(grid[1:-1])
    torch.testing.assert_close(inner, torch.linspace(*LOG_SNR, 11, dtype=torch.float64))
    assert log_snr_grid(1).tolist() == [0, 1]
    early = log_snr_grid(12, 0.9)
    assert early[-1] == 0.9 and len(early) == 13 and (early.diff() > 0).all()
    with pytest.raises(ValueError, match="t1 is 0.01, wanted a log-SNR above -4"):
        log_snr_grid(12, 0.01)
    assert torch.equal(sampling_times("even", 5, 0.9, 3.0), time_grid(5, 0.0, 0.9, 3.0))
    assert torch.equal(sampling_times("sigmoid", 5), time_grid(5, slope=SIGMOID_SLOPE))
    assert torch.equal(sampling_times("log-snr", 12, shift=3.0), grid)
    with pytest.raises(ValueError, match="times is 'odd', wanted one of even, sigmoid, log-snr"):
        sampling_times("odd", 5)
    with pytest.raises(ValueError, match="steps is 0"):
        log_snr_grid(0)


def test_guidance_interval():
    """Rows outside the interval weigh 1 and ask the network once."""
    table = solver_table("heun", time_grid(10), guidance=4.5, interval=(0.25, 0.65))
    inside = (table[:, 0] >= 0.25) & (table[:, 0] <= 0.65)
    assert torch.equal(table[:, 1], torch.where(inside, 4.5, 1.0).double())
    calls = {"pair": 0, "plain": 0}

    def pair(t, x):
        calls["pair"] += 1
        return x, 0.5 * x

    def plain(t, x):
        calls["plain"] += 1
        return x

    solve(pair, tokens(0, 1, 2, 3), table, plain)
    assert calls == {"pair": int(inside.sum()), "plain": int((~inside).sum())}


def test_sigmoid_grid_is_dense_at_both_ends():
    steps = time_grid(20, 0.1, 0.9, slope=7.0).diff()
    assert (steps > 0).all()
    assert torch.allclose(steps, steps.flip(0))
    assert steps[0] < steps[9] / 4
    assert torch.allclose(time_grid(20, slope=1e-4), time_grid(20), atol=1e-9)


def test_solving_records_no_gradient():
    weight = torch.ones((), requires_grad=True)
    x0 = tokens(0, 1, 2, 3)
    for mode in ("euler", "adaptive"):
        out = FlowMatching(num_steps=2, inference_mode=mode).to_data(lambda t, x: weight * x, x0)
        assert not out.requires_grad


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_adaptive_meets_a_known_solution(prediction, shift):
    """dx/dt = -x + t, x(0) = 2: the time shift changes the steps, not the solution."""
    x0 = torch.full((2, 3, 1), 2.0, dtype=torch.float64)

    def fn(t, x):
        velocity = t - x
        return velocity if prediction == "v" else x + (1 - t) * velocity

    flow = FlowMatching(inference_mode="adaptive", prediction_type=prediction, noise_shift=shift)
    got = flow.run_t0_to_t1(fn, x0, 0.0, 1.0)
    # With x-prediction the last 1e-3 is one Euler step, of error below 1e-6.
    assert (got - 3 * math.exp(-1.0)).abs().max() < 1e-4
    tight = adaptive(fn, x0, 0.0, 1.0, prediction=prediction, rtol=1e-10, atol=1e-10)
    assert (tight - 3 * math.exp(-1.0)).abs().max() < (1e-6 if prediction == "x" else 1e-9)


def test_adaptive_ends_on_the_prediction(edge):
    _, tensors, fn = edge
    calls = []

    def recorded(t, x):
        calls.append((float(t), fn(1.0)(t, x)))
        return calls[-1][1]

    got = FlowMatching(inference_mode="adaptive").to_data(recorded, tensors["in.noise"])
    assert calls[-1][0] == pytest.approx(0.999)
    assert torch.allclose(got, calls[-1][1])


def test_adaptive_bounds_its_calls():
    x0 = tokens(0, 1, 2, 3)
    calls = 0

    def rough(t, x):
        nonlocal calls
        calls += 1
        return torch.sin(1e6 * x + 1e5 * t)

    with pytest.raises(RuntimeError, match="after 50 calls of the network: allow more"):
        adaptive(rough, x0, 0.0, 1.0, prediction="v", max_calls=50)
    assert calls == 50
    with pytest.raises(RuntimeError, match="adaptive solver"):
        adaptive(lambda t, x: x * math.nan, x0, 0.0, 1.0, prediction="v")


def test_to_prior_inverts_to_data():
    x0 = tokens(0, 2, 4, 3, dtype=torch.float64)
    flow = FlowMatching(num_steps=2000, prediction_type="v")

    def fn(t, x):
        return t - x

    assert relative_error(flow.to_prior(fn, flow.to_data(fn, x0)), x0) < 1e-3
    with pytest.raises(ValueError, match="prediction_type is 'x', wanted 'v'"):
        FlowMatching().to_prior(fn, x0)


# Properties


@properties
@given(t=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_noise_shift_round_trip(t, shift):
    time = torch.tensor([t], dtype=torch.float64)
    shifted = FlowMatching(noise_shift=shift).shift_timestep(time)
    assert 0 <= shifted.item() <= 1
    assert (shifted.item() - t) * (1 - shift) >= -1e-12
    assert shift_time(shifted, 1 / shift).item() == pytest.approx(t, abs=1e-12)


@properties
@given(
    steps=st.integers(1, 60),
    t0=st.floats(0, 0.4),
    t1=st.floats(0.5, 1),
    shift=st.floats(0.1, 10),
)
def test_time_grid(steps, t0, t1, shift):
    grid = time_grid(steps, t0, t1, shift)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert (grid.diff() > 0).all()
    ends = shift_time(torch.tensor([t0, t1], dtype=torch.float64), shift)
    assert torch.allclose(grid[[0, -1]], ends, rtol=0, atol=1e-14)
    uniform = shift_time(grid, 1 / shift).diff()
    assert torch.allclose(uniform, uniform.mean().expand_as(uniform), rtol=0, atol=1e-12)


@properties
@given(steps=st.integers(1, 40), shift=st.floats(0.2, 5), seed=st.integers(0, 1000))
def test_x_and_v_prediction_take_the_same_steps(steps, shift, seed):
    x0 = tokens(seed, 1, 3, 2, dtype=torch.float64)

    def clean(t, x):
        return torch.tanh(x + t)

    def velocity(t, x):
        return (clean(t, x) - x) / (1 - t).clamp_min(1e-6)

    grid = time_grid(steps, shift=shift)
    by_x = solve(clean, x0, solver_table("euler", grid, prediction="x"))
    by_v = solve(velocity, x0, solver_table("euler", grid, prediction="v"))
    assert torch.allclose(by_x, by_v, rtol=1e-9, atol=1e-9)


@properties
@given(t=st.floats(0, 0.999), sigma=st.floats(0, 0.5), seed=st.integers(0, 1000))
def test_losses_vanish_at_the_target(t, sigma, seed):
    flow = FlowMatching(min_sigma=sigma)
    x0, x1 = (tokens(seed + i, 2, 3, 4, dtype=torch.float64) for i in range(2))
    time = torch.full((2,), t, dtype=torch.float64)
    xt = flow.get_conditional_flow(x0, x1, time)
    velocity = x1 - (1 - sigma) * x0
    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(flow.x_pred_x_loss(x1, x0, xt, x1, time), zero)
    assert torch.equal(flow.x_pred_v_loss(x1, x0, xt, x1, time), zero)
    assert torch.allclose(flow.v_pred_v_loss(velocity, x0, xt, x1, time), zero, atol=1e-20)
    # The x-loss of a velocity takes the path's end for x1, which sigma_min moves by sigma x0.
    moved = (sigma * x0).square().mean(dim=(1, 2))
    assert torch.allclose(flow.v_pred_x_loss(velocity, x0, xt, x1, time), moved, atol=1e-12)


@properties
@given(m=st.floats(-2, 2), s=st.floats(0.1, 2), seed=st.integers(0, 1000))
def test_log_normal_sample_is_logit_normal(m, s, seed):
    x = torch.empty(4096, 1)
    t = log_normal_sample(x, torch.Generator().manual_seed(seed), m=m, s=s)
    assert t.shape == (4096,)
    assert ((t > 0) & (t < 1)).all()
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(m, abs=5 * s / 64)
    assert logit.std().item() == pytest.approx(s, rel=0.06)


# Dtypes and errors


def test_losses_of_half_precision_predictions_have_gradients():
    flow = FlowMatching()
    x0, x1 = tokens(0, 2, 3, 4), tokens(1, 2, 3, 4)
    t = torch.tensor([0.2, 0.9])
    xt = flow.get_conditional_flow(x0, x1, t)
    pred = tokens(2, 2, 3, 4).bfloat16().requires_grad_()
    for loss in LOSSES:
        value = getattr(flow, loss)(pred, x0, xt, x1, t)
        assert value.shape == (2,) and value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value.sum(), pred)
        assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference_mode": "rk9"}, "inference_mode is 'rk9', wanted one of euler, midpoint"),
        ({"prediction_type": "eps"}, "prediction is 'eps', wanted 'x' or 'v'"),
        ({"num_steps": 0}, "num_steps is 0, wanted at least 1"),
        ({"min_sigma": -0.1}, "min_sigma is -0.1"),
        ({"noise_scale": -1}, "noise_scale is -1"),
        ({"noise_shift": 0}, "noise_shift is 0"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(**options)


def test_shape_errors_name_argument_shape_and_wanted():
    flow = FlowMatching()
    x, short, t = tokens(0, 2, 3, 4), tokens(0, 2, 2, 4), torch.rand(2)
    cases = [
        (lambda: flow.get_conditional_flow(short, x, t), "x0", "(2, 3, 4)"),
        (lambda: flow.get_conditional_flow(x[0], x[0], t), "x1", "(batch, tokens, samples)"),
        (lambda: flow.get_conditional_flow(x, x, t[:1]), "t", "(2,)"),
        (lambda: flow.get_x0_xt_c(x, t[None], None), "t", "(2,)"),
        (lambda: flow.to_data(lambda t, x: x, x[0]), "x0", "(batch, tokens, samples)"),
    ]
    for loss in LOSSES:
        call = getattr(flow, loss)
        cases += [
            (lambda call=call: call(x, x, short, x, t), "xt", "(2, 3, 4)"),
            (lambda call=call: call(x, x, x, short, t), "x1", "(2, 3, 4)"),
            (lambda call=call: call(x, x, x, x, torch.tensor(0.5)), "t", "(2,)"),
        ]
    for call, argument, wanted in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"{argument} has shape ("), argument
        assert str(error.value).endswith(f", wanted {wanted}"), argument
    with pytest.raises(ValueError, match="pred"):
        flow.to_data(lambda t, x: x[:, :1], x)
