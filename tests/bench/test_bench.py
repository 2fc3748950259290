"""The benchmarks: workloads of every op, what a row holds, how make gpu's stages end."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.golden_weights import relative_error
from support.networks import golden_model, inputs

from bench import fidelity, gpu, machine, ops, peers, plain, plot, sample, solvers, stages, weights
from bench.peaks import Peaks
from wavflow.base import memory
from wavflow.config.load import load_config
from wavflow.evaluation.signals import FLOOR_DB
from wavflow.features.extract import extract
from wavflow.flow.solvers import solve, solver_table
from wavflow.flow.times import time_grid
from wavflow.systems.wavflow.build import build_model
from wavflow.systems.wavflow.config import PRESETS
from wavflow.toy.world import write_toy_world
from wavflow.training import checkpoint
from wavflow_kernels import REGISTRY, unpatchify
from wavflow_kernels._registry import tensors

CPU, META = torch.device("cpu"), torch.device("meta")
SHORT = 0.001


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_workloads_can_be_made_anywhere(name: str) -> None:
    op = REGISTRY[name]
    assert op.workloads, f"{name} has no workload"
    for dtype in (torch.bfloat16, torch.float32):
        for make in op.workloads.values():
            args = make(META, dtype)
            op.check(*args)
            assert all(t.device == META for t in tensors(args))
            assert op.bytes(*args) > 0 and op.flops(*args) > 0


def small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the op's workloads by its first sample."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple:
        return REGISTRY[name].samples(device, dtype, 0)[0].args

    monkeypatch.setitem(REGISTRY[name].__dict__, "workloads", {"small": make})


@pytest.mark.parametrize("name", ["flow_loss", "flow_mix", "ode_step_", "rope_attention"])
def test_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(name, monkeypatch)
    op = REGISTRY[name]
    for case in ops.cases([name]):
        row = ops.measure_case(case, CPU, torch.float32, Peaks(1e9, 1e9), SHORT)
        seconds = row["seconds"]
        assert {"reference", "compile"} <= set(seconds), row["left_out"]
        assert ("copy" in seconds) == (not case.training) == ("bytes" in row)
        assert ("tflop_s" in row) == (op.tolerance == "matrix")
        assert row["runs_as"] == next(iter(seconds))
        assert len(ops.cells(row | {"op": name})) == len(ops.HEADERS)
        json.dumps(row)
    assert [case.training for case in ops.cases([name])] == (
        [False] if not ops.differentiated(op) else [False, True]
    )


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "free_memory", lambda device: 1000)
    small("unpatchify", monkeypatch)
    case = ops.cases(["unpatchify"])[0]
    row = ops.measure_case(case, CPU, torch.float32, Peaks(1, 1), SHORT)
    assert "seconds" not in row and "are free" in row["skipped"]
    assert ops.cells(row)[2].startswith("skipped: needs 0.0 GB")


def test_variants_that_fail_are_left_out_but_never_the_first() -> None:
    def broken() -> None:
        raise RuntimeError("No available kernel.\nAborting")

    calls = {"cpp": lambda: 1, "cudnn": broken, "reference": broken}
    kept, left_out = ops.runnable(calls, lambda: None, 5, 1)
    assert list(kept) == ["cpp"]
    assert left_out["cudnn"] == "No available kernel."
    assert "needs about" in left_out["reference"]
    with pytest.raises(RuntimeError):
        ops.runnable({"cpp": broken}, lambda: None, 0, 1)


def test_one_broken_row_and_a_spent_budget_do_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "measure", lambda device, dtype: Peaks(1, 1))

    def measured(case: ops.Case, *_: object) -> dict:
        if case.workload == "bad":
            raise RuntimeError("illegal address\nmore")
        return {"seconds": {}}

    monkeypatch.setattr(ops, "measure_case", measured)
    op = REGISTRY["unpatchify"]
    todo = [ops.Case(op, name, False) for name in ("bad", "good")]
    bad, good = (row for _, row in ops.results(todo, CPU, torch.float32, 1, None))
    assert bad["failed"] == "RuntimeError: illegal address" and "seconds" in good
    assert all("commit" in row and "torch" in row for row in (bad, good))
    late = list(ops.results(todo, CPU, torch.float32, 1, -1.0))
    assert [(case, row["skipped"]) for case, row in late] == [(c, ops.NO_TIME) for c in todo]
    twice = list(ops.results(todo, CPU, torch.float32, 1, 60.0))
    assert [case for case, _ in twice] == todo * 2


def test_first_workloads_come_first_and_later_backwards_last() -> None:
    found = ops.cases(["flow_loss", "unpatchify"])
    order = [(case.op.name, list(case.op.workloads).index(case.workload)) for case in found]
    assert order == [
        ("flow_loss", 0),
        ("unpatchify", 0),
        ("flow_loss", 0),
        ("flow_loss", 1),
        ("unpatchify", 1),
        ("flow_loss", 1),
    ]
    assert [case.training for case in found] == [False, False, True, False, False, True]
    assert {case.workload for case in ops.cases(["flow_loss"], "256")} == {"256 clips of 8 s"}


def options(**given: object) -> dict:
    return {
        "ops": None,
        "device": "cpu",
        "dtype": "bfloat16",
        "only": "",
        "json_path": None,
    } | given


@pytest.mark.parametrize(
    "given, message",
    [
        ({"ops": ["nix"]}, "bench.run: no op 'nix'; there are "),
        ({"dtype": "int8"}, "bench.run: --dtype is 'int8', wanted one of bfloat16, "),
        ({"device": "quantum"}, "bench.run: --device quantum cannot be used: "),
        ({"ops": ["flow_mix"], "only": "zz"}, "bench.run: no workload of flow_mix has 'zz'"),
    ],
)
def test_bad_arguments_are_one_line(
    given: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        ops.main(**options(**given), seconds=1.0, budget=None)
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.startswith(message) and said.count("\n") == 1


def test_the_command_line_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("unpatchify", monkeypatch)
    monkeypatch.setattr(ops, "measure", lambda device, dtype: Peaks(1e9, 1e9))
    monkeypatch.setattr(ops, "keep_freed_memory", lambda: True)
    path = tmp_path / "deep" / "r.json"
    with pytest.raises(SystemExit) as error:
        ops.main(**options(ops=["unpatchify"], json_path=path), seconds=SHORT, budget=None)
    assert error.value.code == 0
    (row,) = json.loads(path.read_text())
    assert row["op"] == "unpatchify" and row["dtype"] == "bfloat16" and row["commit"]
    assert "1 rows: 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "samples"),
    [("rope_attention", 10), ("conv_swiglu", 1), ("conv1d", 1), ("prepared_conv", 8)],
)
def test_peers_compute_what_the_op_computes(name: str, samples: int) -> None:
    op = REGISTRY[name]
    for case in op.samples(CPU, torch.float32, 0)[:samples]:
        wanted = op.reference(*case.args)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        calls = peers.PEERS[name](*case.args)
        assert calls
        for peer, call in calls.items():
            torch.testing.assert_close(
                call(), wanted, rtol=1e-4, atol=1e-4, msg=f"{name}, {case.name}, {peer}"
            )


@torch.inference_mode()
def test_the_plain_network_is_the_network() -> None:
    for name in ("model_tiny", "model_head64"):
        model, _ = golden_model(name)
        latent, *features, _ = inputs(model, 2)
        given = model.preprocess_conditions(*features), model.get_empty_conditions(2), 4.5
        wanted = plain.guided(model, torch.tensor(0.4), latent, *given)
        found = model.ode_wrapper(torch.tensor(0.4), latent, *given)
        assert relative_error(found, wanted) < 1e-5


def test_sample_compares_a_step_with_another_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "row.json"
    sample.main("toy_8k", seconds=0.01, against=machine.ROOT, json_path=path)
    row, other = json.loads(path.read_text()), str(machine.ROOT)
    assert set(row["seconds"]) == {"ours", "plain", "plain, weights cast", other}
    # Two processes that each compile the ops need not round alike.
    slack = 0.05 if os.environ.get("WAVFLOW_BACKEND") == "compile" else 0
    assert row["difference"]["ours"] == pytest.approx(row["difference"][other], rel=slack, abs=0)
    assert 0 < row["difference"]["ours"] < 2 * row["difference"]["plain"]
    said = capsys.readouterr().out
    assert "ours is faster by" in said and "peak memory" in said and "preparation" in said
    parts = row["stages"]
    assert set(parts) == {"conditions", "preparation", *stages.PARTS} | {
        "network", "the rest", "update", "unpatchify"
    }  # fmt: skip
    assert all(0 < seconds < 60 for seconds in parts.values())
    assert row["of_gemm_peak"] > 0 and row["steps_a_second"] > row["audio_seconds_a_second"] / 2
    held = row["memory"]
    assert held["weights"] < held["peak"] and 0 < held["above"] < held["peak"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engines_step_is_the_drop_in_paths(dtype: torch.dtype) -> None:
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 2)
    step = sample.engine_step(model, [*features, latent, torch.tensor(0.4)], 4.5, dtype, "eager")
    half = dtype != torch.float32
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=half):
        given = model.preprocess_conditions(*features), model.get_empty_conditions(2)
        wanted = model.ode_wrapper(torch.tensor(0.4), latent, *given, 4.5)
    for _ in range(2):
        assert relative_error(step(), wanted.float()) < (0.05 if half else 1e-6)


def test_a_meter_takes_medians_of_the_rounds_sums() -> None:
    now = 0
    meter = stages.Meter(lambda: now)
    for parts in ((1, 2), (10,), (4, 1)):
        meter.round += 1
        for amount in parts:
            with meter.stage("work"):
                now += amount
        now += 100
    with meter.stage("once"):
        now += 7
    assert meter.medians() == {"work": 5, "once": 7}


def test_stages_leave_no_hooks_and_give_the_samplers_sound() -> None:
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 2)
    meter = stages.Meter(lambda: 0)
    wave = stages.generate(model, [*features, latent], 4.5, torch.float32, 3, meter)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.inference_mode():
        given = model.preprocess_conditions(*features), model.get_empty_conditions(2)
        table = solver_table("euler", time_grid(3), guidance=4.5)
        tokens = solve(lambda t, x: model.predict_flow_pair(x, t, *given), latent, table)
    assert torch.equal(wave, unpatchify(tokens))


def test_operations_are_those_of_the_matrix_products() -> None:
    one, two = (
        stages.operations("toy_8k", shapes(batch), guidance)
        for batch, guidance in ((2, 1.0), (2, 4.5))
    )
    assert two["audio input"] == one["audio input"]  # shared by both passes
    assert two["fused blocks"] == 2 * one["fused blocks"]
    c = PRESETS["toy_8k"]
    final = 2 * 7 * c.hidden_dim * c.latent_dim * c.latent_seq_len * 2
    assert one["final layer"] == final + 2 * 2 * c.hidden_dim * 2 * c.hidden_dim
    assert sum(one[part] for part in stages.PARTS) + one["the rest"] == one["network"]


def shapes(batch: int) -> list[torch.Size]:
    given = weights.inputs(weights.filled("toy_8k", CPU), batch)
    return [x.shape for x in given[:-1]]


def test_sample_refuses_what_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ({"model": "small"}, "--model is 'small', wanted one of medium_16k"),
        ({"dtype": "int8"}, "--dtype is 'int8', wanted bfloat16, float16 or float32"),
        ({"device": "tpu"}, "--device tpu cannot be used"),
        ({"against": Path("/nowhere")}, "--against /nowhere: it has no folder wavflow"),
    ):
        with pytest.raises(SystemExit) as error:
            sample.main(**options)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_relative_l2_and_log_spectral_distance_have_their_units() -> None:
    wave = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    found = torch.stack((2 * wave[0], wave[1]))
    assert fidelity.relative_l2(found, wave).tolist() == [1, 0]
    distance = fidelity.log_spectral_distance(found, wave)
    assert distance.tolist() == pytest.approx([20 * math.log10(2), 0], abs=1e-4)
    # Silence counts as the floor; what lies below it on both sides as equal.
    tone = torch.sin(0.3 * torch.arange(4000.0))[None]
    assert 0 < fidelity.log_spectral_distance(0 * tone, tone).item() < -FLOOR_DB
    assert fidelity.log_spectral_distance(tone + 1e-7 * wave[:1], tone).item() < 0.1
    assert fidelity.log_spectral_distance(0 * tone, 0 * tone).item() == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fidelity and solvers read of a demo's folder, with a network of random weights."""
    out = tmp_path_factory.mktemp("demo")
    sizes = ("hidden_dim=32", "num_heads=1", "depth=2", "fused_depth=1")
    config = load_config("toy_8k", [f"model.{x}" for x in sizes] + ["sampling.num_steps=3"])
    write_toy_world(out / "toy", 12, 0, heldout=3, workers=1)
    assert (
        extract(out / "toy" / "heldout.csv", out / "features", config=config, workers=0).done == 3
    )
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    content = {"model": model.state_dict(), "config": config.to_dict()}
    checkpoint.save(out / checkpoint.LATEST, content)
    return out


def test_fidelity_compares_choices_and_scores_them(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    short = [c for c in fidelity.CHOICES if (c.solver or ("", 0, ""))[1] <= 25 or c.against is None]
    wrong = fidelity.Choice("int8", "float32", {"dtype": torch.int8})
    monkeypatch.setattr(fidelity, "CHOICES", [*short, wrong])
    path = tmp_path / "rows.json"
    files = sorted(demo.rglob("*"))
    fidelity.main(
        demo, demo / checkpoint.LATEST, ema="none", device="cpu", clips=2, batch=2, json_path=path
    )
    assert sorted(demo.rglob("*")) == files
    found = json.loads(path.read_text())
    rows = {row["choice"]: row for row in found["rows"]}
    assert found["clips"] == 2 and list(rows) == [choice.name for choice in fidelity.CHOICES]
    assert "wanted one of torch.bfloat16" in rows["int8"]["left_out"]
    assert "relative_l2" not in rows["fine solution"]
    error = {name: row["relative_l2"] for name, row in rows.items() if "relative_l2" in row}
    assert 0 < error["float32, reference backend"]["worst"] < 1e-4
    assert 1e-4 < error["bfloat16, no Winograd"]["median"] <= error["bfloat16"]["worst"] < 0.2
    assert error["float32, euler 25 even"]["median"] < error["float32"]["median"]
    assert all(0 <= row["onset_recall"] <= 1 for row in rows.values() if "left_out" not in row)
    assert "2 held-out clips" in capsys.readouterr().out


def test_fidelity_names_what_is_missing(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    network = demo / checkpoint.LATEST
    for options, message in (
        ({"demo": demo, "checkpoint": tmp_path / "nix"}, "nix: no such checkpoint"),
        ({"demo": demo, "checkpoint": network, "ema": "ema1"}, "it has no model_ema1"),
        ({"demo": tmp_path, "checkpoint": network, "ema": "none"}, "heldout.csv"),
    ):
        with pytest.raises(SystemExit) as error:
            fidelity.main(**options)
        said = capsys.readouterr().err
        assert error.value.code == 2 and message in said and said.count("\n") == 1


def test_solvers_are_measured_against_an_agreed_reference(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(solvers, "BUDGETS", (4, 16))
    monkeypatch.setattr(solvers, "JUDGED", (4,))
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    solvers.main(
        demo,
        demo / checkpoint.LATEST,
        ema="none",
        device="cpu",
        guidance=(1.0, 2.0),
        guidance_interval=(0.2, 0.7),
        clips=2,
        judged=2,
        exact=40,
        batch=2,
        json_path=path,
        plot=picture,
    )
    found = json.loads(path.read_text())
    cases = [(study["guidance"], tuple(study["interval"])) for study in found["studies"]]
    assert cases == [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.2, 0.7))]
    for study in found["studies"]:
        assert study["reference_difference"] < 0.5 * study["smallest_error"]
        errors = {(r["solver"], r["times"], r["evaluations"]): r["error"] for r in study["rows"]}
        assert len({key[:2] for key in errors}) == len(solvers.WAYS)
        assert len(study["judged"]) == len(solvers.WAYS) - 1
        assert all(0 < error < 10 for error in errors.values())
        assert all(0 <= row["class_accuracy"] <= 1 for row in study["judged"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "errors of 2 clips, figures of 2" in said and "guidance 2 for t in 0.2 to 0.7" in said


def test_freed_memory_is_kept_where_glibc_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *pair: asked.append(pair) or 1)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    assert memory.keep_freed_memory()
    assert asked == [(-4, 0), (-1, 2**31 - 1)]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not memory.keep_freed_memory()


def test_free_memory_is_plausible() -> None:
    assert 10**7 < machine.free_memory(CPU) < 10**14


def rows() -> list[dict]:
    about = {"device": "machine", "torch": "2", "dtype": "bfloat16", "direction": "forward"}
    seconds = {"cpp": 1e-4, "reference": 4e-4, "compile": 5e-5, "copy": 1e-4, "randn": 2e-4}
    timed = {name: {"median": value} for name, value in seconds.items()}
    first = {"op": "flow_mix", "workload": "8 clips", "runs_as": "cpp", "seconds": timed}
    skipped = {"op": "flow_mix", "workload": "9 clips", "skipped": "no memory"}
    return [first | about | {"of_copy_peak": 0.8}, skipped | about]


def test_a_picture_is_drawn_from_the_rows_that_were_timed(tmp_path: Path) -> None:
    assert plot.speedups(rows()[0]) == pytest.approx({"reference": 4, "compile": 0.5, "best": 2})
    assert plot.peak(rows()[0]) == ("of_copy_peak", 0.8)
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows()))
    plot.main(path, None)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["not json", "[]", "[1]", '[{"skipped": "all"}]'])
def test_a_picture_of_nothing_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    path.write_text(text)
    for wrong in (path, tmp_path / "missing.json"):
        with pytest.raises(SystemExit) as error:
            plot.main(wrong, None)
        assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# make gpu


def stage(name: str, code: str, limit: float = 60, **more: object) -> gpu.Stage:
    return gpu.Stage(name, [sys.executable, "-c", code], limit, **more)


def test_stages_run_in_turn_and_each_ends_as_it_should(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []
    endless = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    start = time.monotonic()
    outcomes = gpu.run_stages(
        [
            stage("fine", "print('one'); print('two')", then=lambda: ended.append("fine")),
            stage(
                "broken", "print('why'); raise SystemExit(3)", then=lambda: ended.append("broken")
            ),
            stage("follows", "print('never')", needs="broken"),
            stage("endless", endless, limit=2),
            stage("unwanted", "print('never')", unless="matplotlib is not installed"),
            stage("independent", "print('last')", needs="fine"),
        ],
        tmp_path / "work",
        dict(os.environ),
        600,
    )
    assert time.monotonic() - start < 60
    assert {o.name: o.result for o in outcomes} == {
        "fine": "ok",
        "broken": "failed",
        "follows": "skipped",
        "endless": "stopped",
        "unwanted": "skipped",
        "independent": "ok",
    }
    notes = {o.name: o.note for o in outcomes}
    assert notes["fine"] == "two" and notes["broken"].startswith("exit code 3: why")
    assert notes["follows"] == "broken did not succeed"
    assert notes["unwanted"] == "matplotlib is not installed"
    assert "not done after 2 s" in notes["endless"]
    assert (tmp_path / "work" / "endless.log").read_text() == "begun\n"
    assert (tmp_path / "work" / "fine.log").read_text() == "one\ntwo\n"
    assert ended == ["fine", "broken"]
    assert "two\n" in capfd.readouterr().out
    assert len(gpu.summary(outcomes).splitlines()) == 6
    assert gpu.exit_code(outcomes) == 1
    assert gpu.exit_code([o for o in outcomes if o.result in ("ok", "skipped")]) == 0


def test_stages_for_which_the_time_is_up_are_skipped(tmp_path: Path) -> None:
    (outcome,) = gpu.run_stages([stage("late", "pass")], tmp_path, dict(os.environ), 1)
    assert (outcome.result, outcome.note) == ("skipped", "the 1 s were up")


def test_the_plan_fits_and_its_stages_exist() -> None:
    stages = gpu.plan((9, 0), "NVIDIA H100 80GB HBM3", workers=8)
    assert [s.name for s in stages] == [
        "build", "report", "test", "test-large", "tune", "bench", "plot",
        "sample-1", "sample-8", "train", "length",
    ]  # fmt: skip
    assert gpu.TOTAL_SECONDS < 540
    assert all(s.needs in {"", *(other.name for other in stages)} for s in stages)
    bench = next(s for s in stages if s.name == "bench")
    assert str(bench.command[-1]).endswith("results/nvidia-h100-80gb-hbm3.json")


@pytest.mark.parametrize(
    "capability, wanted", [((8, 0), "80-real"), ((9, 0), "90a-real"), ((10, 0), "100-real")]
)
def test_architectures(capability: tuple[int, int], wanted: str) -> None:
    assert gpu.architecture(capability) == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_machine_without_a_gpu_is_told_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_nvcc", lambda: None)
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a CUDA device (torch" in said and "nvcc (not on PATH" in said
