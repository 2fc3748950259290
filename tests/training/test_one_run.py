"""A folder belongs to one run at a time."""

from __future__ import annotations

import multiprocessing

import pytest

from wavflow.base.errors import InputError
from wavflow.base.files import alone_in
from wavflow.config.load import load_config
from wavflow.pipeline.train import train


def _hold(folder, held, end) -> None:
    with alone_in(folder, "to wait"):
        held.set()
        end.wait(60)


def test_a_second_training_in_a_folder_is_refused(tmp_path) -> None:
    config = load_config(
        "toy_8k", [f"training.output_dir={tmp_path}", f"data.csv_path={tmp_path / 'none.csv'}"]
    )
    out = tmp_path / config.experiment_id
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(out, held, end))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(InputError, match="another process is at work in it") as caught:
            train(config)
        assert str(out) in str(caught.value) and "\n" not in str(caught.value)
        assert [path.name for path in out.iterdir()] == [".lock"]
    finally:
        end.set()
        other.join()
    with pytest.raises(InputError, match=r"none\.csv: no such file"):  # the door is open again
        train(config)


def test_a_run_replaces_no_configuration_of_somebody(tmp_path) -> None:
    config = load_config(
        "toy_8k", [f"training.output_dir={tmp_path}", f"data.csv_path={tmp_path / 'none.csv'}"]
    )
    out = tmp_path / config.experiment_id
    out.mkdir()
    (out / "config.yaml").write_text("# mine\n")
    with pytest.raises(InputError, match=r"config\.yaml: it is there, and no run"):
        train(config)
    assert (out / "config.yaml").read_text() == "# mine\n"
