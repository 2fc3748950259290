from __future__ import annotations

import dataclasses

import pytest

from wavflow.base.errors import InputError
from wavflow.config.load import config_from_dict, load_config, preset_names, save_config
from wavflow.config.schema import Config


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_presets_load_and_agree_with_the_networks():
    from wavflow.systems.wavflow.config import PRESETS

    assert preset_names() == ["large_16k", "large_44k", "medium_16k", "medium_44k", "toy_8k"]
    for name in preset_names():
        config = load_config(name)
        data, sizes = config.data, PRESETS[config.model.name]
        assert config.model.name == config.experiment_id == name
        assert (data.audio_dim, data.latent_seq_len) == (sizes.latent_dim, sizes.latent_seq_len)
        assert (data.clip_seq_len, data.clip_dim) == (sizes.clip_seq_len, sizes.clip_dim)
        assert (data.sync_seq_len, data.sync_dim) == (sizes.sync_seq_len, sizes.sync_dim)
        assert (data.text_seq_len, data.text_dim) == (sizes.text_seq_len, sizes.text_dim)


def test_defaults_are_the_16k_system():
    config = Config()
    assert config.data.samples == 128_000
    assert config.data.latent_seq_len == 640
    assert config.sampling.num_steps == 50
    assert config.inference.cfg == 4.5
    assert config.training.peak_lr() == 1e-4


def test_base_is_merged_under_the_file_recursively(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "data: {audio_dim: 80, clip_dim: 64}\nexperiment_id: root\n")
    write(tmp_path / "sub/mid.yaml", "_base_: ../root.yaml\ndata: {clip_dim: 32}\n")
    leaf = write(tmp_path / "leaf.yaml", "_base_: sub/mid.yaml\ntraining: {lr: 2e-4}\n")
    config = load_config(leaf)
    assert (config.data.audio_dim, config.data.clip_dim) == (80, 32)
    assert (config.experiment_id, config.training.lr) == ("root", 2e-4)


def test_base_cycle_and_missing_base(tmp_path):
    write(tmp_path / "a.yaml", "_base_: b.yaml\n")
    write(tmp_path / "b.yaml", "_base_: a.yaml\n")
    with pytest.raises(InputError, match="_base_ leads back"):
        load_config(tmp_path / "a.yaml")
    write(tmp_path / "c.yaml", "_base_: nowhere.yaml\n")
    with pytest.raises(InputError, match=r"c\.yaml: _base_ names .*nowhere\.yaml"):
        load_config(tmp_path / "c.yaml")


def test_overrides_are_yaml_values():
    config = load_config(
        "toy_8k",
        [
            "training.lr=null",
            "training.batch_size=64",
            "training.blr=4e-4",
            "training.lr_schedule_steps=[3,7]",
            "model.use_ema=ema2",
            "experiment_id=run 1",
        ],
    )
    assert config.training.peak_lr() == pytest.approx(1e-4)
    assert config.training.lr_schedule_steps == [3, 7]
    assert config.model.ema == "ema2"
    assert config.experiment_id == "run 1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.batchsize=3",
            r"unknown key training\.batchsize; did you mean training\.batch_size",
        ),
        ("traning.batch_size=3", r"unknown key traning; did you mean training"),
        ("audio_dim=80", r"unknown key audio_dim; did you mean data\.audio_dim"),
        ("checkpoint.initial_load_pth=x", r"did you mean checkpoint\.initial_load_path"),
        ("training.batch_size=many", r"training\.batch_size is 'many' \(str\); wanted int"),
        ("training.batch_size=2.5", r"training\.batch_size is 2\.5 \(float\); wanted int"),
        ("training.batch_size=true", r"training\.batch_size is True \(bool\); wanted int"),
        ("training.batch_size=0", r"training\.batch_size is 0; wanted > 0"),
        ("training.lr=-1", r"training\.lr is -1\.0; wanted > 0"),
        ("training.lr=.nan", r"training\.lr is nan; wanted a finite number"),
        ("training.lr_schedule_steps=[a]", r"lr_schedule_steps is \['a'\]"),
        (
            "data.source_weights=3",
            r"source_weights is 3 \(int\); wanted dict\[str, float\] or null",
        ),
        ("data.source_weights={1: 2}", r"source_weights is \{1: 2\} \(dict\); wanted dict"),
        ("data.source_weights.a=b", r"data\.source_weights\.a is 'b' \(str\); wanted float"),
        ("data.source_weights.a=-1", r"data\.source_weights\.a is -1\.0; wanted >= 0"),
        ("data.source_weights.a=.inf", r"source_weights\.a is inf; wanted a finite number"),
        ("data.crop=last", r"data\.crop is 'last'; wanted one of first, random"),
        ("training=3", r"training is 3; wanted a mapping"),
        ("sampling.prediction_type=eps", r"prediction_type is 'eps'; wanted one of x, v"),
        (
            "model.encoder_dtype=float16",
            r"encoder_dtype is 'float16'; wanted one of float32, bfloat16",
        ),
        ("model.use_ema=ema3", r"model\.use_ema is 'ema3'"),
        (
            "model.atn_dropout=0",
            r"key model\.atn_dropout; did you mean model\.attn_dropout",
        ),
        ("eval.eval_frq=1", r"unknown key eval\.eval_frq; did you mean eval\.eval_freq"),
        ("eval.rank_zero_only=1", r"unknown key eval\.rank_zero_only; did you mean "),
        ("metrics.compact=1", r"unknown key metrics\.compact; did you mean metrics\.compact_log"),
        ("metrics=3", r"metrics is 3; wanted a mapping of keys"),
        ("eval_freq=3", r"unknown key eval_freq; did you mean eval\.eval_freq"),
        ("nonsense", r"override 'nonsense': wanted key=value"),
    ],
)
def test_bad_values_name_the_key(override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config("toy_8k", [override])
    assert "\n" not in str(caught.value)


def test_keys_without_effect_are_listed_once(tmp_path, caplog):
    text = "eval: {eval_freq: 3}\nmetrics: {compact_logging: true}\nmodel: {class_num: 9}\n"
    load_config(write(tmp_path / "public.yaml", text))
    assert len(caplog.records) == 1
    assert caplog.text.endswith("here: eval.eval_freq, metrics.compact_logging, model.class_num\n")


def test_a_null_is_the_default_unless_it_means_something():
    nulls = {
        "system": None,
        "experiment_id": None,
        "metrics": None,
        "model": {"name": None, "clip_pretrained": None, "use_ema": None},
        "training": {"lr": None, "batch_size": None},
    }
    config = config_from_dict(nulls)
    assert config.model == Config().model
    assert config.training.batch_size == Config().training.batch_size
    assert config.training.lr is None and config.experiment_id == ""


@pytest.mark.parametrize("text", ["{", "- a\n- b\n", "\t:"])
def test_broken_yaml_names_the_file(tmp_path, text):
    with pytest.raises(InputError, match="broken.yaml"):
        load_config(write(tmp_path / "broken.yaml", text))


def test_missing_file_names_the_packaged_ones():
    with pytest.raises(InputError, match="nothere.yaml: no such config file.*toy_8k"):
        load_config("nothere.yaml")


def test_saved_config_reads_back(tmp_path):
    config = load_config(
        "medium_44k", ["training.max_seconds=3", "data.source_weights={a: 1, b c: 0}"]
    )
    assert config.data.source_weights == {"a": 1.0, "b c": 0.0}
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config.to_dict()) == config


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().experiment_id = "x"


def test_solvers_are_those_there_are():
    from wavflow.base.names import METHODS
    from wavflow.flow.matching import INFERENCE_MODES
    from wavflow.flow.solvers import SOLVERS

    assert METHODS == INFERENCE_MODES == (*SOLVERS, "adaptive")
