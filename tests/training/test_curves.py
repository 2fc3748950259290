"""The picture of a run's metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from wavflow.base.errors import InputError
from wavflow.cli.app import main
from wavflow.media import pictures
from wavflow.training.curves import PANELS, Curve, plot_runs, read_run
from wavflow.training.run_log import RunLog


def make_run(folder: Path, steps: int = 30, **also: float) -> Path:
    with RunLog(folder, tensorboard=False) as run:
        for step in range(1, steps + 1):
            loss = 1 + 5 / step
            run.metrics(
                step,
                {"loss": loss, "grad_norm": 0.3, "lr": 1e-4, "clips_per_second": 8.0} | also,
            )
    return folder


def figure_of(monkeypatch: pytest.MonkeyPatch, *runs: Path, out: Path | None = None) -> object:
    """The figure that is drawn of runs, still open."""
    drawn = []
    save = pictures.save
    monkeypatch.setattr(
        pictures, "save", lambda figure, path: (drawn.append(figure), save(figure, path))
    )
    plot_runs(runs, out)
    return drawn[0]


def titles(figure: object) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.get_axes()]


def test_a_run_is_read_with_its_gaps(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", tensorboard=False) as run:
        run.metrics(10, {"loss": 2.0})
        run.metrics(20, {"loss": math.nan, "val/loss": 3.0})
    found = read_run(tmp_path / "run")
    assert found.name == "run"
    assert found.curves["loss"].steps.tolist() == [10, 20]
    np.testing.assert_array_equal(found.curves["loss"].values, [2.0, np.nan])
    assert found.curves["val/loss"].steps.tolist() == [20]


def test_smoothing_is_a_mean_of_what_is_known() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0])
    smooth = Curve(np.arange(6), values).smoothed()
    np.testing.assert_allclose(smooth, [1.5, 7 / 3, 3.0, 17 / 4, 5.0, 5.0])
    alone = Curve(np.array([3.0]), np.array([7.0])).smoothed()
    np.testing.assert_allclose(alone, [7.0])
    assert np.isnan(Curve(np.array([3.0]), np.array([np.nan])).smoothed()).all()
    constant = Curve(np.arange(1000), np.full(1000, 2.0)).smoothed()
    np.testing.assert_allclose(constant, 2.0)


def test_panels_are_those_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    assert titles(figure_of(monkeypatch, run)) == [
        "loss",
        "gradient norm",
        "learning rate",
        "clips a second",
    ]
    buckets = {f"loss_by_t/{t / 5:.1f}-{t / 5 + 0.2:.1f}": 1.0 + t for t in range(5)}
    full = make_run(tmp_path / "full", mfu=0.4, memory_gb=2.0, **{"val/loss": 1.5} | buckets)
    figure = figure_of(monkeypatch, full)
    assert titles(figure)[1:] == [
        "loss by t (0 noise, 1 data)",
        *(title for title, _ in PANELS.values()),
    ]
    by_t = figure.get_axes()[1]
    assert [text.get_text() for text in by_t.get_legend().get_texts()] == [
        "t 0.0-0.2", "t 0.2-0.4", "t 0.4-0.6", "t 0.6-0.8", "t 0.8-1.0"
    ]  # fmt: skip
    assert [float(line.get_ydata()[0]) for line in by_t.get_lines()] == [1, 2, 3, 4, 5]
    raw, smooth, held_out = figure.get_axes()[0].get_lines()
    assert raw.get_linewidth() < smooth.get_linewidth()
    assert held_out.get_ydata().tolist() == [1.5] * 30


def test_runs_are_overlaid_in_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    figure = figure_of(monkeypatch, *runs, out=tmp_path / "both.png")
    losses = figure.get_axes()[0]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["first", "second"]
    assert len({line.get_color() for line in losses.get_lines()}) == 4
    assert (tmp_path / "both.png").is_file()


def test_the_command_line_writes_into_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(run)])
    assert not ended.value.code and "curves.png" in capsys.readouterr().err
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.jsonl; wanted the folder of a training run"),
        ("", "no line yet"),
        ("nonsense\n", "no line yet"),
    ],
)
def test_what_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="several runs need --out"):
        plot_runs([run, run], None)
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'wavflow\[demo\]'"):
        plot_runs([run], None)


def test_any_values_can_be_drawn(tmp_path: Path) -> None:
    """A run that has only begun, and one that went wrong."""
    begun = tmp_path / "begun"
    begun.mkdir()
    lines = [{"step": 1, "loss": None, "grad_norm": 0.0, "lr": 0.0, "mfu": None}]
    (begun / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert plot_runs([begun], None).is_file()
    wild = tmp_path / "wild"
    with RunLog(wild, tensorboard=False) as run:
        for step, loss in enumerate((-1.0, 1e30, 0.0, math.inf)):
            run.metrics(step, {"loss": loss, "grad_norm": abs(loss)})
    assert plot_runs([wild], None).is_file()
