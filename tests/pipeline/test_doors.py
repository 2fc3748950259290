"""The names that scripts use: `wavflow.train` as function and module, `wavflow.load` by names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.networks import save_tiny

import wavflow
from wavflow.base.errors import InputError
from wavflow.training import checkpoint

omegaconf = pytest.importorskip("omegaconf")

CALL = """
try:
    wavflow.train("gone.yaml")
except wavflow.InputError as error:
    assert "gone.yaml: no such config file" in str(error), error
else:
    raise AssertionError("it trains")
"""


@pytest.mark.parametrize(
    "lines",
    [
        ["import wavflow", "import wavflow.train", CALL],
        ["import wavflow.train", CALL, "import wavflow.pipeline.train", CALL],
        ["import wavflow", CALL, "import wavflow.train", CALL],
        ["from wavflow import train", "import wavflow", "assert train", CALL, "train.__call__"],
    ],
    ids=["module first", "module alone", "function first", "from"],
)
def test_training_can_be_called_whatever_was_imported(lines):
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a training, one without a configuration, and the configuration."""
    root = tmp_path_factory.mktemp("run")
    whole = save_tiny(root / "checkpoint.pth")
    weights = checkpoint.read_weights(whole, "none")
    checkpoint.save(root / "flat.pth", weights.state)
    omegaconf.OmegaConf.save(omegaconf.OmegaConf.create(weights.config), root / "config.yaml")
    return root


def test_a_configuration_is_given_by_name_path_or_value(saved):
    path = saved / "config.yaml"
    for config in (path, str(path), wavflow.load_config(path)):
        sampler = wavflow.load(saved / "flat.pth", device="cpu", dtype="float32", config=config)
        assert sampler.sample_rate == 8000
    with pytest.raises(InputError, match="gone.yaml: no such config file"):
        wavflow.load(saved / "flat.pth", config="gone.yaml")
    # The preset is found, and is another model's.
    with pytest.raises(InputError, match=r"the model wants \(96, 80, 7\)"):
        wavflow.load(saved / "flat.pth", config="toy_8k")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_foreign_weights_sound_as_they_are(saved, tmp_path, prefix, dtype):
    state = checkpoint.read_weights(saved / "flat.pth").state
    half = {name: value.to(dtype) for name, value in state.items()}
    rounded = {name: value.float() for name, value in half.items()}
    checkpoint.save(tmp_path / "given.pth", {prefix + name: v for name, v in half.items()})
    checkpoint.save(tmp_path / "plain.pth", rounded)
    sounds = [
        wavflow.load(tmp_path / name, device="cpu", dtype="float32", config=saved / "config.yaml")(
            "a bell", steps=1, seconds=0.5, seed=1
        ).audio
        for name in ("given.pth", "plain.pth")
    ]
    assert torch.equal(*sounds)
