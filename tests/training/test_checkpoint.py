from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.state_dict import unwrapped
from wavflow.config.load import load_config
from wavflow.systems.wavflow.build import empty_caption
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.training import checkpoint
from wavflow.training.ema import initial_share


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def public_file(path, step=100, **more):
    model = tiny()
    state = model.state_dict()
    checkpoint.save(
        path,
        {
            "model": state,
            "optimizer": {},
            "epoch": 3,
            "global_step": step,
            "model_ema1": {k: v + 1 for k, v in state.items()},
            "model_ema2": {k: v + 2 for k, v in state.items()},
            **more,
        },
    )
    return model


def test_each_set_of_weights_is_read(tmp_path):
    path = tmp_path / "c.pth"
    model = public_file(path, step=10**6)
    for ema, shift in (("none", 0), ("ema1", 1), ("ema2", 2)):
        weights = checkpoint.read_weights(path, ema)
        assert weights.global_step == 10**6 and weights.config is None
        torch.testing.assert_close(weights.state["0.weight"], model[0].weight + shift)
        state_dict.load_into(tiny(), weights.state, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_wrapped_model_are_read(tmp_path, prefix, suffix):
    model, path = tiny(), tmp_path / f"c{suffix}"
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    if suffix == ".pth":
        average = {name: value + 1 for name, value in state.items()}
        content = {"model": state, "optimizer": {}, "epoch": 1, "global_step": 10**6}
        checkpoint.save(path, {**content, "model_ema1": average})
        ema = checkpoint.read_weights(path, "ema1").state
        torch.testing.assert_close(ema["0.weight"], model[0].weight + 1)
        assert list(checkpoint.load_training(path)["model_ema1"]) == list(model.state_dict())
    else:
        save_file(state, path)
    state_dict.load_into(tiny(), checkpoint.read_weights(path, "none").state, path)
    checkpoint.save(tmp_path / "flat.pth", state)
    flat = checkpoint.read_weights(tmp_path / "flat.pth").state
    assert list(flat) == list(model.state_dict())


def test_a_prefix_of_some_names_is_a_name():
    assert unwrapped({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert unwrapped({}) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_half_precision_are_read(tmp_path, dtype, suffix):
    state = {name: value.to(dtype) for name, value in tiny().state_dict().items()}
    path = tmp_path / f"half{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    model = tiny()
    with torch.no_grad():
        model[0].weight.zero_()
    state_dict.load_into(model, checkpoint.read_weights(path).state, path)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, state["0.weight"].float())


def test_a_folder_is_answered_with_the_command_that_makes_a_file(tmp_path):
    shards = tmp_path / "run/checkpoint_latest"
    shards.mkdir(parents=True)
    (shards / "whole.json").write_text("{}")
    for given in (shards, shards.parent):
        with pytest.raises(InputError) as caught:
            checkpoint.read_weights(given)
        assert str(caught.value) == (
            f"{given}: a folder; wanted a file, as `wavflow convert {shards} FILE.pth` writes it "
            "from a checkpoint in shards"
        )
    (shards.parent / "checkpoint_latest.pth").touch()
    with pytest.raises(InputError, match=r"wanted a file, such as .*run/checkpoint_latest\.pth"):
        checkpoint.read_weights(shards.parent)


@pytest.mark.parametrize(("number", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_numbers_that_are_none_are_said_at_load(number, word):
    state = tiny().state_dict()
    state["1.weight"][1, 2] = number
    with pytest.raises(InputError, match=rf"x\.pth: 1\.weight holds {word}; wanted finite"):
        state_dict.load_into(tiny(), state, "x.pth")


def test_flat_ema_file_with_public_buffers(tmp_path):
    path = tmp_path / "ema_epoch_1.pth"
    state = tiny().state_dict()
    checkpoint.save(path, {**state, "t_embed.freqs": torch.zeros(128), "clip_rot": torch.zeros(2)})
    weights = checkpoint.read_weights(path, "ema2")
    assert weights.which == "flat"
    model = tiny()
    with pytest.raises(InputError, match="it has foreign t_embed.freqs and 1 more"):
        state_dict.load_into(model, weights.state, path)
    model.ignored_keys = WavflowModel.ignored_keys
    state_dict.load_into(model, weights.state, path)


def test_safetensors_carry_configuration_and_provenance(tmp_path):
    path = tmp_path / "w.safetensors"
    state = {name: tensor.half() for name, tensor in tiny().state_dict().items()}
    about = {"seed": 3, "commands": ["a", "b"]}
    made = checkpoint.Weights(path, state, "ema1", {"model": {"depth": 2}}, 700, about)
    checkpoint.save_weights(path, made)
    read = checkpoint.read_weights(path, "ema2")
    assert (read.which, read.config, read.global_step) == ("ema1", {"model": {"depth": 2}}, 700)
    assert read.provenance == about
    assert all(torch.equal(read.state[name], state[name]) for name in state)
    model = tiny()
    with torch.no_grad():
        model[0].weight.zero_()
    state_dict.load_into(model, read.state, path)
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model[0].weight, state["0.weight"].float())
    # Of others: one set of weights, and no more is known of it.
    save_file(state, path)
    read = checkpoint.read_weights(path)
    assert (read.which, read.config, read.global_step, read.provenance) == ("flat", *[None] * 3)


def test_damaged_safetensors_name_themselves(tmp_path):
    state = tiny().state_dict()
    whole = save(state, {"wavflow": "{}"})
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello, world\n" * 10,
        "broken": save(state, {"wavflow": "{no JSON"}),
        "list": save(state, {"wavflow": "[1]"}),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.safetensors: not a readable") as caught:
            checkpoint.read_weights(path)
        assert "\n" not in str(caught.value)


def test_packaged_weights_have_names_and_files_win(tmp_path, monkeypatch):
    named = checkpoint.find("toy_8k")
    assert named.name == "toy_8k.safetensors" and "toy_8k" in checkpoint.packaged()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy_8k").mkdir()  # a run's folder
    assert checkpoint.find(Path("toy_8k")) == named
    (tmp_path / "toy_8k").rmdir()
    public_file(tmp_path / "toy_8k")
    assert checkpoint.find("toy_8k") == Path("toy_8k")
    assert checkpoint.read_weights("toy_8k", "none").which == "model"
    for unknown in ("toy_9k", "weights/toy_8k", "", "toy_8k.pth"):
        with pytest.raises(InputError, match="no such checkpoint; packaged ones: .*toy_8k"):
            checkpoint.find(unknown)


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save(path, {"a": torch.ones(3)})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"a": lambda: None})
    assert os.listdir(tmp_path) == ["c.pth"]
    assert state_dict.load(path)["a"].tolist() == [1, 1, 1]


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_unreadable_files_name_themselves(tmp_path):
    whole = tmp_path / "whole.pth"
    public_file(whole)
    data = whole.read_bytes()
    cases = {
        "truncated.pth": data[: len(data) // 2],
        "empty.pth": b"",
        "text.pth": b"hello, world\n" * 10,
        "payload.pth": pickle.dumps({"model": Payload(tmp_path / "ran")}, protocol=2),
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=name) as caught:
            state_dict.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="gone.pth: no such checkpoint"):
        state_dict.load(tmp_path / "gone.pth")
    assert not (tmp_path / "ran").exists()


def test_foreign_dicts(tmp_path):
    path = tmp_path / "foreign.pth"
    checkpoint.save(path, {"weights": 3, "note": "x"})
    with pytest.raises(InputError, match="not a WavFlow checkpoint; it holds weights, note"):
        checkpoint.read_weights(path)
    checkpoint.save(path, {"model": {}, "epoch": 1})
    with pytest.raises(InputError, match="lacks optimizer, global_step"):
        checkpoint.load_training(path)
    with pytest.raises(InputError, match="no model_ema1; ask for ema=none"):
        checkpoint.read_weights(path)


def test_size_mismatch_names_the_tensor(tmp_path):
    state = tiny().state_dict()
    other = {**state, "1.weight": torch.zeros(2, 5)}
    with pytest.raises(
        InputError, match=r"x\.pth: 1\.weight is \(2, 5\); the model wants \(2, 4\)"
    ):
        state_dict.load_into(tiny(), other, "x.pth")
    del other["1.weight"], other["1.bias"]
    with pytest.raises(InputError, match=r"it lacks 1\.weight and 1 more"):
        state_dict.load_into(tiny(), other, "x.pth")
    with pytest.raises(InputError, match="it has foreign extra;"):
        state_dict.load_into(tiny(), {**state, "extra": torch.zeros(1)}, "x.pth")


def test_initial_share_by_hand():
    assert initial_share(0.9999, 1000, warmed_up=False) == pytest.approx(0.9048, abs=1e-4)
    assert initial_share(0.9999, 3, warmed_up=True) == pytest.approx((1 / 10) * (2 / 11) * (3 / 12))
    assert initial_share(0.5, 4, warmed_up=True) == pytest.approx(
        (1 / 10) * (2 / 11) * (3 / 12) * (4 / 13)
    )
    assert initial_share(0.9999, 100, warmed_up=True) < 1e-6


def test_young_foreign_average_is_warned_about_with_the_figure(tmp_path, caplog):
    path = tmp_path / "c.pth"
    public_file(path, step=1000)
    checkpoint.read_weights(path, "ema1")
    assert (
        "after 1000 updates at decay 0.9999, 90 % of it is still the initialisation" in caplog.text
    )
    caplog.clear()
    checkpoint.read_weights(path, "none")
    public_file(path, step=200_000)
    checkpoint.read_weights(path, "ema1")
    public_file(path, step=1000, ema_age=1000, ema_decay={"ema1": 0.9999, "ema2": 0.9996})
    checkpoint.read_weights(path, "ema1")
    assert caplog.text == ""
    public_file(path, step=1000, ema_age=2, ema_decay={"ema1": 0.9999, "ema2": 0.9996})
    checkpoint.read_weights(path, "ema1")
    assert "2 % of it" in caplog.text


@pytest.mark.parametrize("shape", [(77, 64), (1, 77, 64)])
def test_the_empty_caption_of_a_file(tmp_path, caplog, shape):
    path = tmp_path / "empty_string.pth"
    rows = 3 * torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    torch.save(rows, path)
    config = load_config("toy_8k", [f"model.empty_string_ckpt={path}"])
    with caplog.at_level("INFO", "wavflow"):
        assert torch.equal(empty_caption(config), rows.view(77, 64))
    assert caplog.messages == [
        f"{path}: rows of mean length 3; CLIP's captions have rows of length 1"
    ]
    for wrong in (rows[..., :-1], {"text": rows}):
        torch.save(wrong, path)
        with pytest.raises(InputError, match=r"_string.pth: the empty caption is \(.*; wanted"):
            empty_caption(config)
