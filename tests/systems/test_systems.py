"""Systems: one that the library does not know trains as its own do, and what it may not do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import ROOT

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.cli.app import main
from wavflow.config.load import config_from_dict, load_config, save_config
from wavflow.config.schema import Config
from wavflow.data.manifest import write_csv
from wavflow.data.open import open_dataset
from wavflow.media.audio import load_audio, save_wav
from wavflow.pipeline.sampler import Sampler
from wavflow.pipeline.table import infer
from wavflow.serve.studio import Form, Limits, Studio
from wavflow.systems import SYSTEMS, system
from wavflow.training.checkpoint import LATEST
from wavflow.training.run_log import read_metrics
from wavflow.training.trainer import Trainer

PULSE = "tests.support.pulse"
RATE, SECONDS, CLIPS = 1600, 2, 10
YAML = """
system: tests.support.pulse
experiment_id: pulse
model: {width: 12}
data: {target_sample_rate: 1600, audio_duration: 1.0, crop: random, lift: recording}
training:
  {batch_size: 3, epochs: 4, lr: 1e-2, lr_schedule: cosine, warmup_steps: 2, num_workers: 1,
   log_freq: 1, val_steps: 5, checkpoint_freq: 1, dtype: float32, device: cpu, tensorboard: false}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Recordings of two clips each that are loud where their beat says so; the last has none."""
    root, generator = tmp_path_factory.mktemp("pulse"), np.random.default_rng(0)
    rows = []
    for i in range(CLIPS):
        beat = torch.from_numpy(generator.random((8 * SECONDS, 3), np.float32))
        loud = beat[:, 0].repeat_interleave(RATE // 8)
        noise = torch.from_numpy(generator.normal(0, 0.1, loud.shape)).float()
        save_wav(root / f"{i}.wav", loud * noise, RATE)
        torch.save({"beat": beat}, root / f"{i}.pth")
        files = {"audio_path": f"{i}.wav", "features_path": f"{i}.pth"}
        rows.append({"id": i, **files, "video_exist": i < CLIPS - 1})
    write_csv(root / "train.csv", rows, list(rows[0]))
    (root / "pulse.yaml").write_text(YAML)
    return root / "train.csv"


def train(table: Path, out: Path, *more: str):
    import wavflow

    tables = [f"data.csv_path={table}", f"data.val_csv_path={table}"]
    return wavflow.train(
        table.with_name("pulse.yaml"), [*tables, f"training.output_dir={out}", *more]
    )


def assert_same_run(one, two) -> None:
    """Weights, averages and optimiser of two runs have the same bits."""
    a, b = (state_dict.load(result.checkpoint) for result in (one, two))
    assert a["global_step"] == b["global_step"] == one.steps == two.steps
    for key in ("model", "model_ema1", "model_ema2"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_another_system_trains_and_validates(table, tmp_path):
    result = train(table, tmp_path, "training.epochs=30", "training.max_steps=90")
    lines = read_metrics(result.out / "metrics.jsonl")
    losses = [x["loss"] for x in lines if "loss" in x]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    held = [x["val/loss"] for x in lines if "val/loss" in x]
    assert len(held) == 18 and held[-1] < held[0]
    carried = state_dict.load(result.checkpoint)["config"]
    assert carried["system"] == PULSE and carried["data"]["beat_rows"] == 8
    assert load_config(result.out / "config.yaml").model.width == 12


def test_it_goes_on_as_if_never_stopped(table, tmp_path, monkeypatch):
    whole = train(table, tmp_path / "whole")
    step = Trainer.train_step

    def falls(self, batches):
        if self.step == 9:
            raise OSError("the plug is pulled")
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", falls)
        with pytest.raises(OSError, match="plug"):
            train(table, tmp_path / "stopped")
    left = state_dict.load(tmp_path / "stopped/pulse" / LATEST)["global_step"]
    assert 0 < left < 9
    assert_same_run(whole, train(table, tmp_path / "stopped"))


def test_a_pack_of_it_trains_as_its_files_do(table, tmp_path, capsys):
    files = train(table, tmp_path / "files")
    stored = train(table, tmp_path / "stored", f"data.store={tmp_path / 'pack'}")
    assert_same_run(files, stored)
    command = ["pack", "--csv", str(table), "--out", str(tmp_path / "again")]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--config", str(table.with_name("pulse.yaml"))])
    assert not caught.value.code
    names = {path.name for path in (tmp_path / "pack").iterdir()} - {".lock", "report.csv"}
    for name in names:
        assert (tmp_path / "pack" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    # A pack of one system is no pack of another.
    wavflow = load_config("toy_8k", ["data.target_sample_rate=1600", "data.audio_duration=1.0"])
    data = replace(wavflow.data, csv_path=str(tmp_path / "pack"))
    with pytest.raises(InputError, match="packed with data.clip_seq_len None, wanted 16"):
        open_dataset(data, data.tracks)


def test_a_table_must_have_the_columns_of_its_tracks(table, tmp_path):
    bare = tmp_path / "bare.csv"
    write_csv(bare, [{"id": 0, "audio_path": table.with_name("0.wav")}], ["id", "audio_path"])
    with pytest.raises(InputError, match=r"bare\.csv: no column 'features_path'"):
        train(table, tmp_path, f"data.csv_path={bare}")


# Sampling


@pytest.fixture(scope="module")
def sampler(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled")
    result = train(table, out, "training.epochs=30", "training.max_steps=90")
    return Sampler.load(result.checkpoint, config=load_config(table.with_name("pulse.yaml")))


def test_it_is_sampled_in_any_batch_and_hears_its_beat(sampler):
    beats = [torch.full((8, 3), level) for level in (0.05, 0.95, 0.5)]
    rows = [{"beat": beat} for beat in beats]
    together = sampler.generate_features(rows, [1, 1, 2], guidance=1.5)
    (alone,) = sampler.generate_features(rows[1:2], [1], guidance=1.5)
    assert [sound.audio.numel() for sound in together] == [1600] * 3
    torch.testing.assert_close(together[1].audio, alone.audio, atol=1e-5, rtol=1e-4)
    assert together[1].audio.std() > 1.5 * together[0].audio.std()
    with pytest.raises(InputError, match=r"row 0: beat is \(7, 3\); the model wants \(8, 3\)"):
        sampler.generate_features([{"beat": beats[0][:7]}], [1])


def test_its_long_sounds_are_streamed_completed_and_looped(sampler):
    given = {"seconds": 5.0, "seed": 3, "steps": 4}
    (whole,) = sampler.generate(["abcabc"], **given)
    streamed = torch.cat([part.audio for part in sampler.stream("abcabc", batch_size=2, **given)])
    torch.testing.assert_close(streamed, whole.audio, atol=1e-5, rtol=1e-4)
    kept = sampler.complete(whole.audio[:1600], "abcabc", seconds=2.0, steps=4)
    assert torch.equal(kept.audio[:1600], whole.audio[:1600]) and kept.audio.numel() == 3200
    assert sampler.loop("abc", seconds=2.0, steps=4).audio.numel() == 3200


def test_it_is_served_and_fills_a_table(sampler, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    studio = Studio(sampler, folder, Limits())
    form = Form("abc", "", None, 1.0, 7, 1.0, 4, None)
    view = list(studio.generate(form))[-1]
    studio.close()
    assert view.sound is not None and view.share == 1
    assert load_audio(view.sound, RATE).numel() == 1600
    write_csv(tmp_path / "t.csv", [{"id": i, "caption": "abc"} for i in "xy"], ["id", "caption"])
    done = infer(sampler, tmp_path / "t.csv", tmp_path / "out", steps=4, seconds=1.5)
    assert (done.done, done.failed) == (2, 0)
    assert load_audio(tmp_path / "out/x.wav", RATE).numel() == 2400
    with pytest.raises(InputError, match="film.mp4: a video has no pulse; wanted a caption"):
        sampler("abc", "film.mp4")


def test_the_library_does_not_know_it():
    sources = [*(ROOT / "wavflow").rglob("*.py"), *(ROOT / "wavflow").rglob("*.yaml")]
    assert not [path for path in sources if "pulse" in path.read_text(encoding="utf-8").lower()]


def test_info_says_which_system_a_checkpoint_is_of(table, tmp_path, capsys):
    result = train(table, tmp_path, "training.max_steps=1")
    with pytest.raises(SystemExit) as caught:
        main(["info", str(result.checkpoint)])
    assert not caught.value.code
    assert f"system {PULSE}, 1.0 s at 1600 Hz" in capsys.readouterr().out


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wavflo", "is 'wavflo'; wanted wavflow or the dotted path of a module; did you mean wav"),
        ("sonar", r"is 'sonar'; wanted wavflow or the dotted path of a module$"),
        (
            "nowhere.at_all",
            r"cannot be imported \(No module named 'nowhere'\); wanted wavflow",
        ),
        (".relative", "which cannot be imported"),
        ("os.path", r"is 'os\.path', a module whose SYSTEM is a NoneType; wanted a wavflow\.sys"),
    ],
)
def test_systems_that_are_not_there(name, message):
    with pytest.raises(InputError, match=message) as caught:
        system(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"toy_8k.yaml: system .*{message}"):
        load_config("toy_8k", [f"system={name}"])


def test_names_that_differ_by_a_letter_are_both_named(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "waveflow", "wavflow.systems.waveflow")
    for name in ("waveflo", "wavflo", "WavFlow"):
        with pytest.raises(InputError, match="did you mean waveflow or wavflow"):
            system(name)
    with pytest.raises(InputError, match=r"'waveflow', which cannot be imported .* wanted wavef.*"):
        system("waveflow")


def test_the_wrong_kind_of_name():
    with pytest.raises(InputError, match=r"system is 3 \(int\); wanted str"):
        load_config("toy_8k", ["system=3"])


def test_a_checkpoint_has_no_module_imported(tmp_path, monkeypatch):
    """A configuration that a file of weights carries may name what is imported, and no more."""
    (tmp_path / "stranger_x").mkdir()
    (tmp_path / "stranger_x/it.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="x.pth: system is 'stranger_x.it', a module that has not"):
        config_from_dict({"system": "stranger_x.it"}, where="x.pth")
    assert system(PULSE) and config_from_dict({"system": PULSE}).data.beat_rows == 8


# Configurations


def test_a_configuration_has_the_sections_of_its_system(tmp_path):
    config = Config(system=PULSE)
    assert (config.model.width, config.data.beat_rows) == (16, 8)
    assert config_from_dict(config.to_dict()) == config
    save_config(tmp_path / "x.yaml", config)
    assert load_config(tmp_path / "x.yaml") == config
    assert replace(config, experiment_id="x").data == config.data
    message = f"unknown key data.beet_rows of system {PULSE}; did you mean data.beat_rows"
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "x.yaml", ["data.beet_rows=1"])
    with pytest.raises(InputError, match=r"data\.beat_rows is 'a' \(str\); wanted int"):
        load_config(tmp_path / "x.yaml", ["data.beat_rows=a"])
    with pytest.raises(InputError, match="model is a WavflowModelConfig; wanted a PulseModelConf"):
        replace(Config(), system=PULSE)


def test_the_default_is_as_if_there_were_no_key():
    config = load_config("toy_8k")
    assert config.system == "wavflow" and "system" not in config.to_dict()
    assert load_config("toy_8k", ["system=wavflow"]) == config
    assert Config() == config_from_dict({}) == Config(system="wavflow")


def test_no_encoders_no_extraction(table, tmp_path):
    from wavflow.features.extract import extract

    with pytest.raises(InputError, match=f"system {PULSE} has no encoders; wanted a conf"):
        extract(table, tmp_path, config=Config(system=PULSE))


def test_reading_a_configuration_needs_no_torch():
    code = (
        "import sys, wavflow.systems; assert 'wavflow.config.schema' not in sys.modules\n"
        "from wavflow.config.load import load_config\n"
        "load_config('toy_8k').data.tracks\n"
        "wavflow.systems.system('wavflow')\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
