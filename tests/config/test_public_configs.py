"""The public system's YAML files, as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.public import PUBLIC, write_public

from wavflow.base.errors import InputError
from wavflow.config.load import load_config
from wavflow.config.schema import Config

#: What the public programs never read.
UNREAD = {
    "train.yaml": {
        *("model.attn_dropout", "model.proj_dropout", "model.class_num"),
        "training.global_batch_size",
        *(f"eval.{key}" for key in PUBLIC["train.yaml"]["eval"] if key != "cfg"),
        *(
            f"checkpoint.{key}"
            for key in PUBLIC["train.yaml"]["checkpoint"]
            if not key.startswith("initial_")
        ),
        *(f"metrics.{key}" for key in PUBLIC["train.yaml"]["metrics"]),
        *(f"parallelism.{key}" for key in PUBLIC["train.yaml"]["parallelism"]),
        "comm.train_timeout_seconds",
    },
    # Here it is the table and the processes that say what is done when.
    "extract_t2a.yaml": {
        f"extraction.{key}" for key in ("target_sample_rate", "batch_size", "save_interval", "seed")
    },
}
UNREAD["extract_vt2a.yaml"] = UNREAD["extract_t2a.yaml"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_key_is_taken_or_named(name, tmp_path, caplog):
    config = load_config(write_public(tmp_path) / name).to_dict()
    unread = UNREAD.get(name, set())
    assert len(caplog.records) == bool(unread)
    if unread:
        assert set(caplog.text.partition("no effect here: ")[2].strip().split(", ")) == unread
    default = Config().to_dict()
    for section, values in PUBLIC[name].items():
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if f"{section}.{key}" not in unread:
                held = default[section][key] if value is None else value
                assert config[section][key] == held, f"{section}.{key}"


def test_the_files_stand_on_their_base(tmp_path):
    config = load_config(write_public(tmp_path) / "infer.yaml")
    assert config.data.audio_duration == 8.0 and config.model.name == "medium_16k"
    assert config.model.clip_pretrained == "dfn5b" and config.experiment_id == ""
    assert load_config(tmp_path / "train.yaml").experiment_id == "test_wavflow"


def test_one_letter_more_is_an_error(tmp_path):
    files = json.loads(json.dumps(PUBLIC))
    files["train.yaml"]["parallelism"]["tensor_paralel_degree"] = 1
    with pytest.raises(InputError, match=r"did you mean parallelism\.tensor_parallel_degree\?"):
        load_config(write_public(tmp_path, files) / "train.yaml")


def test_a_process_of_many_is_silent_about_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_config(write_public(tmp_path) / "train.yaml")
    assert not caplog.records


def test_the_fixture_is_small():
    assert Path(__file__).with_name("public_configs.json").stat().st_size < 8000
