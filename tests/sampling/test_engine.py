"""The steps of a solver: one by one, replayed from fixed places, compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from support.networks import field_of, golden_model, inputs

from wavflow.flow.guidance import mix_guidance, rescale_guidance
from wavflow.flow.solvers import solve, solver_table
from wavflow.flow.times import time_grid
from wavflow.sampling import engine
from wavflow.sampling.engine import TABLE_ROWS, Engine


def problem(seed=0, batch=2, steps=3, method="2m", guidance=3.0, interval=(0.0, 1.0)):
    """A model, noise, table, conditions, empty conditions."""
    torch.manual_seed(seed)
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, batch)
    features = [f + 0.1 * torch.randn_like(f) for f in features]
    table = solver_table(method, time_grid(steps), guidance=guidance, interval=interval)
    with torch.inference_mode():
        conditions = model.preprocess_conditions(*features)
        return model, latent, table, conditions, model.get_empty_conditions(batch)


def by_solve(model, noise, table, conditions, empty):
    """The same through ``solvers.solve`` and the drop-in calls."""
    with torch.inference_mode():
        return solve(
            lambda t, x: model.predict_flow_pair(x, t, conditions, empty),
            noise,
            table,
            lambda t, x: model.predict_flow(x, t.expand(len(x)), conditions),
        )


@pytest.mark.parametrize("method", ["euler", "2m", "rk4"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_eager_and_replayed_steps_agree_with_solve(graphs, method, interval):
    model, *given = problem(method=method, interval=interval)
    wanted = by_solve(model, *given)
    torch.testing.assert_close(Engine(field_of(model)).solve(*given), wanted, rtol=1e-5, atol=1e-6)
    replayed, recorder = graphs(model)
    torch.testing.assert_close(replayed.solve(*given), wanted, rtol=1e-5, atol=1e-6)
    assert recorder.captured == (1 if interval == (0.0, 1.0) else 2)


def test_a_graph_serves_other_clips_tables_and_guidance(graphs):
    model, *first = problem()
    replayed, recorder = graphs(model)
    replayed.solve(*first)
    _, *second = problem(seed=1, steps=5, guidance=1.5)
    made = replayed.solve(*second)
    torch.testing.assert_close(made, by_solve(model, *second), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        replayed.solve(*first), by_solve(model, *first), rtol=1e-5, atol=1e-6
    )
    assert recorder.captured == 1


def test_kept_graphs_are_bounded_and_the_oldest_goes(graphs):
    model, *one = problem(batch=1)
    _, *two = problem(batch=2)
    _, *long = problem(batch=1, steps=TABLE_ROWS + 1, method="euler")
    replayed, recorder = graphs(model, limit=2)
    for given, captured in ((one, 1), (two, 2), (one, 2), (long, 3), (one, 3), (two, 4)):
        made = replayed.solve(*given)
        torch.testing.assert_close(made, by_solve(model, *given), rtol=1e-4, atol=1e-5)
        assert recorder.captured == captured
        assert len(replayed.graphs) <= 2


def test_a_graph_is_of_one_window(graphs):
    model, noise, table, *_ = problem()
    _, *features, _ = inputs(model, 2)
    replayed, recorder = graphs(model)
    ends = []
    for window, captured in ((None, 1), (3, 2), (4, 3), (3, 3)):
        model.update_attention(window, "linear")
        with torch.inference_mode():
            given = model.preprocess_conditions(*features), model.get_empty_conditions(2)
        made = replayed.solve(noise, table, *given)
        wanted = by_solve(model, noise, table, *given)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        assert recorder.captured == captured
        ends.append(made)
    assert torch.equal(ends[1], ends[3]) and not torch.allclose(ends[1], ends[2], rtol=1e-3)


def test_a_prediction_is_the_networks_from_any_kind(graphs):
    model, noise, _, conditions, empty = problem(guidance=2.0)
    replayed, recorder = graphs(model)
    for t, weight in ((0.3, 2.0), (0.7, 1.0), (0.9, 3.0)):
        wanted = Engine(field_of(model)).predict(t, noise, conditions, empty, weight)
        with torch.inference_mode():
            pair = model.predict_flow_pair(noise, torch.tensor(t), conditions, empty)
        assert isinstance(wanted, tuple) == (weight > 1)
        wanted = mix_guidance(wanted, weight)
        torch.testing.assert_close(wanted, mix_guidance(pair if weight > 1 else pair[0], weight))
        found = mix_guidance(replayed.predict(t, noise, conditions, empty, weight), weight)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert recorder.captured == 2  # with guidance and without


def test_a_failed_capture_is_logged_and_compiled(monkeypatch, graphs, caplog):
    model, *given = problem(method="euler")

    def refuses(step, rewind, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    def compiled(function, **options):
        calls.append(options)
        return function

    calls = []
    replayed, _ = graphs(model)
    monkeypatch.setattr(engine, "capture", refuses)
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(RuntimeError, match="not permitted"):
        replayed.solve(*given)
    replayed.may_fall_back = True
    with caplog.at_level(logging.WARNING, "wavflow"):
        made = replayed.solve(*given)
    assert replayed.kind == "compile" and calls == [{"dynamic": False}]
    assert "not permitted when stream is capturing): it is compiled instead" in caplog.text
    torch.testing.assert_close(made, by_solve(model, *given), rtol=1e-5, atol=1e-6)


def test_compiled_steps_agree():
    model, *given = problem(method="euler")
    made, wanted = Engine(field_of(model), "compile").solve(*given), by_solve(model, *given)
    assert (made - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.gpu
def test_predictions_by_cuda_graphs_agree_with_eager_ones():
    model, noise, _, *conditions = problem()
    model, noise = model.cuda(), noise.cuda()
    features = [each.cuda() for each in inputs(model, 2)[1:-1]]
    with torch.inference_mode():
        conditions = [model.preprocess_conditions(*features), model.get_empty_conditions(2)]
    graph, eager = Engine(field_of(model), "graph"), Engine(field_of(model), "eager")
    for t, weight in ((0.3, 2.0), (0.7, 1.0), (0.9, 3.0)):
        made, wanted = (
            mix_guidance(engine.predict(t, noise, *conditions, weight), weight)
            for engine in (graph, eager)
        )
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_agree_with_eager_steps(dtype):
    from wavflow.layers.prepare import prepare_inference

    model, noise, table, *_ = problem()
    model, noise = model.cuda(), noise.cuda()
    if dtype == torch.bfloat16:
        model = prepare_inference(model, dtype)
    _, *features, _ = inputs(model, 2)
    graph, eager = Engine(field_of(model), "graph", dtype), Engine(field_of(model), "eager", dtype)
    with torch.inference_mode(), eager.cast():
        conditions = model.preprocess_conditions(*(f.cuda() for f in features))
        empty = model.get_empty_conditions(2)
    wanted = eager.solve(noise, table, conditions, empty)
    for _ in range(2):
        made = graph.solve(noise, table, conditions, empty)
        assert (made - wanted).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()
    assert graph.kind == "graph" and len(graph.graphs) == 1


def test_steps_are_told_what_the_network_saw():
    model, noise, table, conditions, empty = problem(method="euler")
    seen = []
    end = Engine(field_of(model)).solve(
        noise,
        table,
        conditions,
        empty,
        after=lambda row, x, pred: seen.append((row, x.clone(), mix_guidance(pred, 3.0))),
    )
    assert [row for row, _, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], noise)
    torch.testing.assert_close(seen[-1][2], end, rtol=1e-5, atol=1e-6)  # Euler ends on data


def test_rescaling_guidance():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 50, 8, generator=generator).unbind()
    guided = uncond + 4.0 * (cond - uncond)
    std = lambda x: x.std((1, 2))  # noqa: E731
    full = rescale_guidance(cond, uncond, 4.0, 1.0)
    torch.testing.assert_close(std(full), std(cond))
    cosine = torch.cosine_similarity(full.flatten(1), guided.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))
    torch.testing.assert_close(rescale_guidance(cond, uncond, 4.0, 0.0), guided)
    half = rescale_guidance(cond.bfloat16(), uncond.bfloat16(), torch.tensor(4.0), 0.5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(std(half), (std(cond) + std(guided)) / 2, rtol=0.02, atol=0)
    model, noise, table, conditions, empty = problem(method="euler")
    end = Engine(field_of(model)).solve(noise, table[-1:], conditions, empty, rescale=1.0)
    with torch.inference_mode():
        alone = model.predict_flow(noise, table[-1:, 0].float().expand(2), conditions)
    torch.testing.assert_close(std(end), std(alone), rtol=1e-4, atol=1e-6)


def test_wrong_engines():
    model, *_ = problem()
    with pytest.raises(ValueError, match="engine is 'warp', wanted one of auto, eager"):
        Engine(field_of(model), "warp")
    with pytest.raises(ValueError, match="engine 'graph' needs a model on a GPU, it is on cpu"):
        Engine(field_of(model), "graph")
