"""Weights prepared for inference: the same network, and whose weights a step sees."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from support.golden_weights import relative_error
from support.networks import golden_model, inputs

import wavflow_kernels as wk
from wavflow.layers import prepare as inference
from wavflow.layers.prepare import prepare_inference
from wavflow_kernels import _panels

NAMES = ("model_tiny", "model_head64")
T = torch.tensor(0.4)


def guided(model, conditions, empty, latent, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model.ode_wrapper(T, latent, conditions, empty, 4.5).float()


def conditions_of(model, clip, sync, text, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        conditions = model.preprocess_conditions(clip, sync, text)
        return conditions, model.get_empty_conditions(len(clip))


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_prepared_weights_have_the_error_of_plain_ones(name):
    model, _ = golden_model(name)
    latent, *features, _ = inputs(model, 2)
    true = guided(model, *conditions_of(model, *features, torch.float32), latent, torch.float32)
    conditions, empty = conditions_of(model, *features)
    prepared = guided(model, conditions, empty, latent)
    with wk.use_backend("reference"):
        plain = guided(copy.deepcopy(model), *conditions_of(model, *features), latent)
    assert 0 < relative_error(prepared, true) < 1.5 * relative_error(plain, true)
    assert torch.equal(prepared, guided(model, conditions, empty, latent))
    explicit = prepare_inference(model, torch.bfloat16)
    again = guided(explicit, *conditions_of(explicit, *features), latent)
    assert relative_error(again, true) < 1.5 * relative_error(plain, true)


@pytest.mark.parametrize("mlp_ratio", [4.0, 16.0], ids=["direct", "Winograd"])
@torch.inference_mode()
def test_float32_has_the_error_of_its_parameters(mlp_ratio):
    model, _ = golden_model("model_head64", mlp_ratio=mlp_ratio)
    latent, *features, _ = inputs(model, 2)
    wide = copy.deepcopy(model).double()
    true = wide.ode_wrapper(
        T.double(),
        latent.double(),
        *conditions_of(wide, *(f.double() for f in features), torch.float32),
        4.5,
    )
    conditions, empty = conditions_of(model, *features, torch.float32)
    prepared = guided(model, conditions, empty, latent, torch.float32)
    plain = guided(model, replace(conditions, prepared=None), empty, latent, torch.float32)
    assert relative_error(prepared, true) < 1.5 * relative_error(plain, true) < 1e-5
    explicit = prepare_inference(model, torch.float32)
    assert torch.equal(guided(explicit, conditions, empty, latent, torch.float32), prepared)


@torch.no_grad()
def test_a_step_sees_the_weights_of_its_first_step_and_new_conditions_the_new_ones():
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 1)
    conditions, empty = conditions_of(model, *features)
    first = guided(model, conditions, empty, latent)
    for weight in model.parameters():
        weight.data.mul_(1.5)  # moves no version counter
    assert torch.equal(guided(model, conditions, empty, latent), first)
    assert not torch.equal(guided(model, *conditions_of(model, *features), latent), first)


@torch.no_grad()
def test_conditions_serve_two_models_and_are_copied_without_their_network():
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 1)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(1.5)
    conditions, empty = conditions_of(model, *features)
    first = guided(model, conditions, empty, latent)
    assert not torch.equal(guided(other, conditions, empty, latent), first)
    assert torch.equal(guided(model, conditions, empty, latent), first)
    assert copy.deepcopy(conditions).prepared is not conditions.prepared
    assert torch.equal(guided(model, copy.deepcopy(conditions), empty, latent), first)


def test_gradients_float64_and_compilation_use_the_parameters():
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 1)
    assert model.preprocess_conditions(*features).prepared is None
    with torch.no_grad():
        conditions = model.preprocess_conditions(*features)
        double = copy.deepcopy(model).double()
        assert conditions.prepared.of(double) is double
        assert conditions.expand(2).prepared is conditions.prepared
        assert conditions.prepared.of(model).is_prepared
        with torch.autocast("cpu", torch.bfloat16):
            assert conditions.prepared.of(model).is_prepared
    with torch.autocast("cpu", torch.bfloat16):
        assert conditions.prepared.of(model) is model
        model.predict_flow(latent, T[None], conditions).sum().backward()
    assert model.joint_blocks[0].latent_block.ffn.w1.weight.grad.abs().sum() > 0


def test_the_copy_shares_no_memory_and_leaves_the_model_alone():
    model, _ = golden_model("model_tiny")
    names = list(model.state_dict())
    prepared = prepare_inference(model, torch.bfloat16)
    assert list(model.state_dict()) == names and not model.is_prepared
    mine = {p.data_ptr() for p in model.parameters()}
    left = list(prepared.parameters())
    assert left and not any(p.data_ptr() in mine or p.requires_grad for p in left)
    assert sum(p.numel() for p in left) < 0.5 * sum(p.numel() for p in model.parameters())


def test_off_the_cpu_weights_of_the_dtype_stay_as_they_are(monkeypatch):
    model, _ = golden_model("model_tiny")
    elsewhere = copy.deepcopy(model).to("meta")
    assert prepare_inference(elsewhere, torch.float32) is elsewhere
    assert prepare_inference(elsewhere, torch.bfloat16).is_prepared
    monkeypatch.setattr(inference, "prepare_inference", lambda model, dtype: model)
    kept = weakref.ref(model)
    with torch.no_grad():
        network = inference.PreparedNetwork()
        assert network.of(model) is model
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("dtype", "mlp_ratio", "direct", "fast"),
    [
        (torch.bfloat16, 4.0, {1}, {1, 4}),
        (torch.float32, 4.0, {1, 2}, {1, 2}),  # Winograd is for large weights alone
        (torch.float32, 16.0, {1, 2}, {1, 2, 4}),
    ],
)
@torch.inference_mode()
def test_winograd_can_be_left_out(dtype, mlp_ratio, direct, fast):
    model, _ = golden_model("model_head64", mlp_ratio=mlp_ratio)
    latent, *features, _ = inputs(model, 1)

    def forms(winograd, wanted):
        network = prepare_inference(model, dtype, winograd=winograd)
        convs = [m.prepared for m in network.modules() if getattr(m, "prepared", None) is not None]
        assert {len(conv.weights) for conv in convs} == wanted
        return guided(network, *conditions_of(network, *features, dtype), latent, dtype)

    if _panels.fastest(dtype):  # w1 and w3 are joined in every dtype
        direct, fast = {1}, fast - {2}
    one, other = forms(False, direct), forms(True, fast)
    assert torch.equal(one, other) == (direct == fast)
    assert relative_error(one, other) < 20 * torch.finfo(dtype).eps


def test_wrong_calls():
    model, _ = golden_model("model_tiny")
    with pytest.raises(ValueError, match="dtype is torch.float64, wanted one of torch.bfloat16, "):
        prepare_inference(model, torch.float64)
    with pytest.raises(ValueError, match="prepared already"):
        prepare_inference(prepare_inference(model, torch.bfloat16), torch.bfloat16)
