from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from wavflow import __version__
from wavflow.base import console
from wavflow.cli.app import main
from wavflow.media.audio import load_audio

TINY = [
    "model.hidden_dim=32",
    "model.depth=2",
    "model.fused_depth=1",
    "model.num_heads=1",
    "training.batch_size=4",
    "training.warmup_steps=2",
    "training.max_steps=3",
]


def run(*argv):
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    return caught.value.code or 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    assert run("toy", "--out", root / "toy", "--clips", 8, "--heldout", 2, "--workers", 1) == 0
    assert run("extract", "--csv", root / "toy/train.csv", "--out", root / "f") == 0
    assert (
        run(
            "train",
            "--config",
            "toy_8k",
            *TINY,
            f"data.csv_path={root / 'f/train.csv'}",
            f"training.output_dir={root / 'runs'}",
        )
        == 0
    )
    return root, root / "runs/toy_8k/checkpoint_latest.pth"


def test_a_counter_shows_rate_and_time_left(monkeypatch):
    out = io.StringIO()
    shown = Console(file=out, force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", lambda: shown)
    now = iter((100.0, 104.0))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with console.counter("work") as progress:
        progress(0, 160)
        progress(8, 160)
    assert "8/160  2.0/s  1:16 left" in out.getvalue()


def test_generate_by_caption_video_and_both(trained, tmp_path, capsys):
    root, checkpoint = trained
    video = next(csv.DictReader(open(root / "toy/heldout.csv")))["video_path"]
    options = ["--checkpoint", checkpoint, "--steps", 2, "--seed", 5]
    for name, given in {
        "c.wav": ["--caption", "a bell rings, twice"],
        "v.flac": ["--video", root / "toy" / video],
        "b.wav": ["--caption", "a bell", "--video", root / "toy" / video, "--guidance", 1],
    }.items():
        assert run("generate", *options, *given, "--out", tmp_path / name) == 0
        assert load_audio(tmp_path / name, 8000).shape == (16000,)
        assert f"{name}: 2.00 s at 8000 Hz" in capsys.readouterr().err
    (tmp_path / "bad.mp4").write_text("no video")
    given = ["--video", tmp_path / "bad.mp4", "--out", tmp_path / "no.wav"]
    assert run("generate", *options, *given) == 2
    assert "bad.mp4: not readable as video" in capsys.readouterr().err
    assert not (tmp_path / "no.wav").exists()


def test_generate_with_every_option(trained, tmp_path, capsys):
    root, checkpoint = trained
    video = next(csv.DictReader(open(root / "toy/heldout.csv")))["video_path"]
    out = tmp_path / "o.wav"
    options = ["--checkpoint", checkpoint, "--caption", "a bell", "--out", out, "--seconds", 1]
    options += ["--video", root / "toy" / video, "--negative-caption", "a drum", "--steps", 3]
    options += ["--guidance-interval", 0.1, 0.9, "--guidance-rescale", 0.5]
    options += ["--solver", "2m", "--times", "log-snr", "--engine", "eager", "--dtype", "float32"]
    assert run("generate", *options) == 0
    assert load_audio(out, 8000).shape == (8000,)
    said = capsys.readouterr().err
    assert "engine eager" in said and "clips of 1 s, 1 at a time: about" in said
    for wrong, message in (
        (["--times", "odd"], "times is 'odd'; wanted one of even, sigmoid, log-snr"),
        (["--engine", "graph"], "engine 'graph' needs a model on a GPU"),
        (["--engine", "warp"], "engine is 'warp', wanted one of auto"),
    ):
        assert run("generate", *options, "--overwrite", *wrong) == 2
        assert message in capsys.readouterr().err
    table = ["--csv", root / "toy/heldout.csv", "--negative-caption", "a drum"]
    assert run("generate", "--checkpoint", checkpoint, *table, "--out", tmp_path / "all") == 2
    assert "--csv and --negative-caption do not go together" in capsys.readouterr().err


def test_generate_from_a_table(trained, tmp_path, capsys):
    root, checkpoint = trained
    options = ["generate", "--checkpoint", checkpoint, "--steps", 2]
    assert run(*options, "--csv", root / "toy/heldout.csv", "--out", tmp_path / "all") == 0
    assert len(list((tmp_path / "all").glob("*.wav"))) == 2
    (tmp_path / "some.csv").write_text("id,caption,text_exist\nx,a bell,1\ny,a drum,7\n")
    assert run(*options, "--csv", tmp_path / "some.csv", "--out", tmp_path / "some") == 1
    assert "1 rows failed" in capsys.readouterr().err
    (tmp_path / "none.csv").write_text("id,caption,text_exist\ny,a drum,7\n")
    assert run(*options, "--csv", tmp_path / "none.csv", "--out", tmp_path / "none") == 2


def test_extract_exit_codes(trained, tmp_path):
    root, _ = trained
    rows = list(csv.DictReader(open(root / "toy/train.csv")))
    for row in rows:
        row["audio_path"] = root / "toy" / row["audio_path"]
        row["video_path"] = root / "toy" / row["video_path"] if row["video_path"] else ""

    def table(name, chosen):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(chosen)
        return run("extract", "--csv", tmp_path / name, "--out", tmp_path / "o", "--workers", 0)

    bad = {**rows[0], "id": "bad", "audio_path": "gone.wav"}
    assert table("good.csv", rows[:2]) == 0
    assert table("some.csv", [rows[0], bad]) == 1
    assert table("none.csv", [bad]) == 2


def test_extract_takes_overrides_and_keeps_rows_whatever_the_limits(trained, tmp_path, capsys):
    csv_path, out = trained[0] / "toy/train.csv", tmp_path / "o"
    command = ["extract", "--csv", csv_path, "--out", out, "data.audio_duration=2.04"]
    assert run(*command) == 1  # videos of 2 s
    failed = int(re.search(r", 0 kept, (\d+) failed", capsys.readouterr().err)[1])
    assert run(*command, "decoding.hold_seconds=0.05") == 0
    said = capsys.readouterr().err
    assert failed and re.search(rf"{failed} extracted, [1-9]\d* kept, 0 failed", said)
    assert run("extract", "--csv", csv_path, "--out", out, "decoding.hold_second=1") == 2
    assert "did you mean decoding.hold_seconds?" in capsys.readouterr().err


def test_info(trained, capsys):
    assert run("info", trained[1]) == 0
    out = capsys.readouterr().out
    assert f"wavflow {__version__}, torch {torch.__version__}" in out
    assert "toy_8k, encoders embedded, 2.0 s at 8000 Hz" in out
    assert "global_step: 3" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config", "gone.yaml"], "gone.yaml: no such config file"),
        (["train", "--config", "toy_8k"], "data.csv_path is not set"),
        (["train", "--config", "toy_8k", "data.csv_pth=x"], "did you mean data.csv_path?"),
        (["train", "--config", "toy_8k", "data.csv_path=gone.csv"], "gone.csv: no such file"),
        (["extract", "--csv", "gone.csv", "--out", "o"], "gone.csv: no such file"),
        (["extract", "--csv", "gone.csv"], "--csv without --out; wanted both"),
        (["extract", "--out", "o"], "--out without --csv; wanted both"),
        (["extract"], "data.csv_path is not set in the configuration"),
        (["generate", "--checkpoint", "gone.pth", "--out", "o.wav"], "give --caption"),
        (
            ["generate", "--checkpoint", "gone.pth", "--out", "o.wav", "--caption", "x"],
            "gone.pth: no such checkpoint",
        ),
        (["infer", "--config", "toy_8k"], "model.ckpt_path is not set"),
        (["toy", "--out", "o", "--clips", "0"], "0 clips"),
        (["info", "gone.pth"], "gone.pth: no such checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_output_suffix_and_conflicts(trained, tmp_path, capsys):
    options = ["generate", "--checkpoint", trained[1], "--caption", "x"]
    assert run(*options, "--out", tmp_path / "x.mp3") == 2
    assert "wanted a .wav or .flac file" in capsys.readouterr().err
    assert run(*options, "--csv", "t.csv", "--out", tmp_path) == 2


def test_unknown_option_and_help():
    assert run("train", "--conf", "x") == 2
    assert run("--help") == 0


@pytest.mark.parametrize("module", ["wavflow", "wavflow.train", "wavflow.infer"])
def test_modules_run(module, tmp_path):
    wanted = ["--help"] if module == "wavflow" else ["--config", "gone.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", module, *wanted],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if module == "wavflow":
        assert done.returncode == 0
        for command in (
            "toy",
            "extract",
            "pack",
            "train",
            "generate",
            "serve",
            "infer",
            "eval",
            "demo",
            "info",
        ):
            assert command in done.stdout
    else:
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: gone.yaml")


def test_info_describes_packaged_weights(capsys):
    assert run("info", "toy_8k") == 0
    said = capsys.readouterr().out
    for words in ("licence: Apache-2.0", "global_step: 1500", "commands: wavflow toy", "figures"):
        assert words in said
    for command in (
        ["info", "toy_9k"],
        ["generate", "--checkpoint", "toy_9k", "--caption", "a", "--out", "a.wav"],
    ):
        assert run(*command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == "error: toy_9k: no such checkpoint; packaged ones: toy_8k"


def test_imports_are_lazy():
    heavy = (
        "soundfile soxr pyloudnorm av omegaconf matplotlib sklearn torchaudio torchvision "
        "open_clip timm transformers gradio".split()
    )
    code = (
        "import sys, wavflow\n"
        "assert 'torch' not in sys.modules, 'wavflow imports torch'\n"
        "import wavflow.pipeline.sampler, wavflow.training.trainer, wavflow_kernels\n"
        "import wavflow.features.extract, wavflow.features.public\n"
        f"loaded = [m for m in {heavy!r} if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert 'train' in dir(wavflow) and callable(wavflow.train)\n"
        "assert wavflow.Sampler is wavflow.pipeline.sampler.Sampler\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_attribute():
    import wavflow

    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = wavflow.Trainr
