"""What a run leaves to read: metrics, TensorBoard's events, samples and their picture, progress."""

from __future__ import annotations

import builtins
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.media import pictures
from wavflow.media.audio import load_audio
from wavflow.training import run_log
from wavflow.training.run_log import RunLog, Sample, log_file, read_metrics

RATE = 8000


def tone(hertz: float, seconds: float = 0.5) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(RATE * seconds)) / RATE)


def lines(out: Path) -> list[dict]:
    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=strict) for line in text.splitlines()]


def test_metrics_are_lines_of_strict_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wavflow")
    with RunLog(tmp_path / "run", tensorboard=False) as run:
        run.metrics(20, {"loss": 1.5, "loss_by_t/0.2-0.4": 2.0})
        run.metrics(40, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
    assert lines(tmp_path / "run") == [
        {"step": 20, "loss": 1.5, "loss_by_t/0.2-0.4": 2.0},
        {"step": 40, "loss": None, "grad_norm": None, "lr": 1e-4},
    ]
    assert list(lines(tmp_path / "run")[0])[0] == "step"
    assert "step 20 loss 1.5 loss_by_t/0.2-0.4 2" in caplog.text
    assert "step 40 loss nan grad_norm inf" in caplog.text
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_resumed_run_drops_what_it_takes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLog(tmp_path, tensorboard=False) as run:
        for step in (20, 40, 60):
            run.metrics(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 80, "lo')
    with RunLog(tmp_path, tensorboard=False, first_step=40) as run:
        assert [line["step"] for line in lines(tmp_path)] == [20, 40]
        run.metrics(60, {"loss": 1.0})
    assert "left out line 4, which is broken" in caplog.text
    assert [line["loss"] for line in lines(tmp_path)] == [20.0, 40.0, 1.0]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines(tmp_path)


def test_tensorboard_has_scalars_audio_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def found() -> EventAccumulator:
        return EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    with RunLog(tmp_path, tensorboard=True) as run:
        for step in (10, 20, 30):
            run.metrics(step, {"loss": float(step), "val/loss": math.nan})
        run.samples(30, tmp_path / "samples", [Sample("a", RATE, 3 * tone(440), tone(440))])
    events = found()
    assert [(s.step, s.value) for s in events.Scalars("loss")] == [(10, 10), (20, 20), (30, 30)]
    assert all(math.isnan(s.value) for s in events.Scalars("val/loss"))
    (audio,) = events.Audio("a/generated")
    assert audio.sample_rate == RATE and audio.length_frames == RATE // 2
    assert len(events.Audio("a/true")) == 1
    (image,) = events.Images("samples")
    assert image.width > 300 and image.height > 200

    with RunLog(tmp_path, first_step=20) as run:
        run.metrics(30, {"loss": 1.0})
    assert [(s.step, s.value) for s in found().Scalars("loss")] == [(10, 10), (20, 20), (30, 1)]


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def imported(name: str, *args: object, **kwargs: object) -> object:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", imported)


@pytest.mark.usefixtures("without_tensorboard")
def test_a_missing_tensorboard_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wavflow")
    with RunLog(tmp_path) as run:
        run.metrics(1, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1
    assert caplog.text.count("pip install 'wavflow[tensorboard]'") == 1
    with pytest.raises(
        InputError, match=r"is true, but .* \(pip install 'wavflow\[tensorboard\]'\)"
    ):
        RunLog(tmp_path, tensorboard=True)


def test_samples_are_sounds_and_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "samples" / "step_20"
    made = [Sample("a", RATE, tone(440), tone(880)), Sample("b.c", RATE, tone(220))]
    with RunLog(tmp_path, tensorboard=False) as run:
        run.samples(20, folder, made)
    assert sorted(path.name for path in folder.iterdir()) == [
        "gen_rank0_id_a.wav",
        "gen_rank0_id_b.c.wav",
        "gt_rank0_id_a.wav",
        "spectrograms.png",
    ]
    for name, hertz in (("gen_rank0_id_a", 440), ("gt_rank0_id_a", 880)):
        wave = load_audio(folder / f"{name}.wav", RATE)
        torch.testing.assert_close(wave, tone(hertz), atol=1e-4, rtol=0)
    from matplotlib.image import imread

    picture = imread(folder / "spectrograms.png")
    assert picture.std() > 0.1


def test_an_unsafe_id_writes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as run, pytest.raises(InputError, match="separator"):
        run.samples(
            1, tmp_path / "samples", [Sample("a", RATE, tone(440)), Sample("../b", RATE, tone(440))]
        )
    assert not (tmp_path / "samples").exists()


def test_without_matplotlib_there_are_sounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wavflow")
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    with RunLog(tmp_path, tensorboard=False) as run:
        run.samples(1, tmp_path / "samples", [Sample("a", RATE, tone(440))])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["gen_rank0_id_a.wav"]
    assert "pip install 'wavflow[demo]'" in caplog.text


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_lies_in_its_band(rate: int) -> None:
    for hertz in (100.0, 440.0, 3000.0):
        wave = torch.sin(2 * math.pi * hertz * torch.arange(rate) / rate)
        level = pictures.mel_level(wave, rate)
        assert level.shape[0] == pictures.BANDS and torch.isfinite(level).all()
        band = int(level[:, level.shape[1] // 2].argmax())
        wanted = pictures.mel(hertz) / pictures.mel(rate / 2) * (pictures.BANDS + 1) - 1
        assert abs(band - wanted) <= 2
    silence = pictures.mel_level(torch.zeros(rate), rate)
    assert float(silence.max()) == pytest.approx(-120)


def test_progress_is_a_line_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wavflow")
    now = 0.0
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now)
    with RunLog(tmp_path, tensorboard=False) as run:
        run.progress(0.1, 5.0, "step 1")
        assert "step 1" not in caplog.text
        now = 11.0
        run.progress(0.25, 900.0, "step 2")
        run.progress(0.25, 900.0, "step 3")
    assert "step 2  45:00 left" in caplog.text and "step 3" not in caplog.text


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(run_log, "console", lambda: terminal)
    monkeypatch.setattr("wavflow.base.console.console", lambda: terminal)
    with RunLog(tmp_path, tensorboard=False) as run:
        run.progress(0.5, 3600.0, "step 7")
    assert "50 %" in screen.getvalue() and "step 7  1:00:00 left" in screen.getvalue()


def test_the_log_file_keeps_debug_lines_and_the_level(tmp_path: Path) -> None:
    level = run_log.log.level
    with log_file(tmp_path / "training.log"):
        run_log.log.debug("figures")
    run_log.log.debug("later")
    assert run_log.log.level == level
    text = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert "DEBUG figures" in text and "later" not in text
