"""The network: golden vectors, checkpoint names, sizes, shape errors and options."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_weights import GOLDEN, golden_state_dict, load_golden, relative_error, uniform
from support.networks import golden_model, inputs

import wavflow_kernels as wk
from wavflow.layers import token_layers
from wavflow.layers.token_layers import SwiGLU
from wavflow.systems.wavflow.config import WavflowConfig
from wavflow.systems.wavflow.network import get_wavflow_model

GOLDEN_MODELS = ("model_tiny", "model_head64")
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def test_counter_generator():
    wanted = torch.tensor([-0.32370722, 0.68529129, -0.96646678, -0.67546773])
    assert torch.allclose(torch.from_numpy(uniform(5, 4)).float(), wanted, atol=1e-7)


# Golden vectors


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_golden_forward(name):
    model, golden = golden_model(name)
    conditions = model.preprocess_conditions(
        golden["in.clip"], golden["in.sync"], golden["in.text"]
    )
    empty = model.get_empty_conditions(3)
    t = torch.tensor(0.37)
    got = {
        "out.t_embed": model.t_embed(golden["in.t"]),
        "out.predict_flow": model.predict_flow(golden["in.latent"], golden["in.t"], conditions),
        "out.ode_cfg1.0_t0.37": model.ode_wrapper(t, golden["in.latent"], conditions, empty, 1.0),
        "out.ode_cfg4.5_t0.37": model.ode_wrapper(t, golden["in.latent"], conditions, empty, 4.5),
        "fm.pred": model.predict_flow(golden["fm.xt_shift3"], golden["fm.t_shifted3"], conditions),
    }
    for field in ("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c"):
        got[f"cond.{field}"] = getattr(conditions, field)
        got[f"empty.{field}"] = getattr(empty, field)
    for key, value in got.items():
        assert value.shape == golden[key].shape, key
        assert relative_error(value, golden[key]) < TOLERANCE, key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_gradients(name, checkpointing):
    model, golden = golden_model(name, gradient_checkpointing=checkpointing)
    t = golden["fm.t_shifted3"]
    pred = model(golden["fm.xt_shift3"], golden["in.clip"], golden["in.sync"], golden["in.text"], t)
    residual = (pred - golden["in.latent"]) / (1 - t)[:, None, None].clamp(min=1e-6)
    loss = residual.square().mean(dim=(1, 2))[:2].mean()
    loss.backward()
    assert relative_error(loss.detach(), golden["grad.loss"].squeeze()) < TOLERANCE

    wanted = {key.removeprefix("gradnorm."): golden[key] for key in golden if "gradnorm." in key}
    parameters = dict(model.named_parameters())
    without = {key for key, parameter in parameters.items() if parameter.grad is None}
    assert without == {"empty_string_feat", "empty_clip_feat", "empty_sync_feat"}
    assert set(wanted) == set(parameters) - without
    zeros = set()
    for key, norm in wanted.items():
        got = parameters[key].grad.norm()
        if norm == 0:
            zeros.add(key)
            assert got == 0, key
        else:
            assert abs(got - norm) <= GRADIENT_TOLERANCE * norm, key
    last = f"joint_blocks.{model.config.joint_depth - 1}"
    assert zeros == {f"{last}.{s}_block.attn.q_norm.weight" for s in ("clip", "text")}


@torch.no_grad()
def test_golden_edges():
    model, golden = golden_model("model_tiny")
    edge, _ = load_golden("edge_tiny")
    conditions = model.preprocess_conditions(
        golden["in.clip"], golden["in.sync"], golden["in.text"]
    )
    empty = model.get_empty_conditions(3)
    negative = model.get_empty_conditions(3, negative_text_features=edge["negative_text"])
    t = torch.tensor(0.37)
    got = {
        "ode_cfg0.5_t0.37": model.ode_wrapper(t, golden["in.latent"], conditions, empty, 0.5),
        "ode_cfg3_negative_t0.37": model.ode_wrapper(
            t, golden["in.latent"], conditions, negative, 3.0
        ),
        "negative.clip_f": negative.clip_f,
        "negative.text_f": negative.text_f,
        "negative.text_f_c": negative.text_f_c,
    }
    longer = {key: edge[f"longer.{key}"] for key in ("latent", "clip", "sync")}
    model.update_seq_lengths(*(longer[key].shape[1] for key in ("latent", "clip", "sync")))
    got["longer.out_t0.37"] = model(
        longer["latent"], longer["clip"], longer["sync"], golden["in.text"], t.expand(3)
    )
    wide, _ = golden_model("model_tiny", mlp_ratio=40)
    got["ratio40.out_t0.37"] = wide(
        golden["in.latent"], golden["in.clip"], golden["in.sync"], golden["in.text"], t.expand(3)
    )
    for key, value in got.items():
        assert relative_error(value, edge[key]) < TOLERANCE, key


# Checkpoints


@pytest.mark.parametrize(
    ("name", "group", "latent_seq_len", "parameters"),
    [
        ("medium_16k", "medium", 640, 623_813_064),
        ("medium_44k", "medium", 1764, 623_813_064),
        ("large_16k", "large", 640, 1_032_009_288),
        ("large_44k", "large", 1764, 1_032_009_288),
    ],
)
def test_presets_have_the_checkpoints_names_shapes_and_order(
    name, group, latent_seq_len, parameters
):
    with torch.device("meta"):
        model = get_wavflow_model(name)
    wanted = json.loads((GOLDEN / "state_dict_keys.json").read_text())[group]
    got = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(got.items()) == list(wanted.items())
    assert [key for key, _ in model.named_parameters()] == list(wanted)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.latent_seq_len == latent_seq_len
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == ["empty_string_feat"]


def test_load_weights_is_strict_but_for_old_tables():
    model, _ = golden_model("model_tiny")
    state = golden_state_dict(model)
    stale = {key: torch.ones(2) for key in ("t_embed.freqs", "latent_rot", "clip_rot")}
    model.load_weights({**state, **stale})
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    missing = {key: value for key, value in state.items() if key != "sync_pos_emb"}
    with pytest.raises(ValueError, match="sync_pos_emb is missing"):
        model.load_weights(missing)
    with pytest.raises(ValueError, match="extra is unknown"):
        model.load_weights({**state, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"empty_clip_feat has shape \(2, 3\), wanted \(1, 12\)"):
        model.load_weights({**state, "empty_clip_feat": torch.ones(2, 3)})


def test_initialisation():
    torch.manual_seed(0)
    model = get_wavflow_model("toy_8k")
    zero = ("adaLN_modulation", "final_layer.conv", "sync_pos_emb", "empty_")
    for name, parameter in model.named_parameters():
        if any(part in name for part in zero):
            assert not parameter.any(), name
    assert 0.018 < model.t_embed.mlp[0].weight.std() < 0.022
    width = model.config.hidden_dim
    bound = (6 / (width + 3 * width)) ** 0.5
    qkv = model.fused_blocks[0].attn.qkv
    assert not qkv.bias.any()
    assert 0.95 * bound < qkv.weight.abs().max() <= bound
    assert not model(*inputs(model, 2)).any()


def test_preset_options():
    feature = torch.randn(77, 64)
    model = get_wavflow_model("toy_8k", latent_seq_len=100, empty_string_feat=feature, mlp_ratio=8)
    assert model.latent_seq_len == 100
    assert torch.equal(model.get_empty_string_sequence(2), feature.expand(2, -1, -1))
    assert model.fused_blocks[0].ffn.w1.weight.shape == (512, 96, 3)
    assert model.audio_input_proj[2].w1.weight.shape == (256, 96, 7)
    with pytest.raises(ValueError, match="'huge', wanted one of medium_16k"):
        get_wavflow_model("huge")
    with pytest.raises(
        ValueError, match=r"empty_string_feat has shape \(7, 64\), wanted \(77, 64\)"
    ):
        get_wavflow_model("toy_8k", empty_string_feat=torch.zeros(7, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync_seq_len": 20}, "sync_seq_len is 20, wanted a multiple of 8"),
        ({"fused_depth": 12}, "fused_depth is 12, wanted 0 to 11"),
        ({"num_heads": 13}, r"hidden_dim is 896, wanted a multiple of 2 \* num_heads = 26"),
        ({"latent_seq_len": 0}, "latent_seq_len is 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        WavflowConfig(**change)


# Behaviour


@pytest.mark.parametrize(
    ("asked", "inner"), [(384, 256), (640, 512), (1024, 768), (3584, 2560), (385, 256)]
)
def test_swiglu_inner_width(asked, inner):
    with torch.device("meta"):
        assert SwiGLU(8, asked).w1.weight.shape == (inner, 8)


@settings(max_examples=25, deadline=None)
@given(
    kernel_size=st.sampled_from([None, 3, 7]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 60),
    shortest=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_stretches_of_a_long_sequence_equal_the_whole(kernel_size, batch, tokens, shortest, seed):
    torch.manual_seed(seed)
    layer = SwiGLU(8, 384, kernel_size).double()
    x = torch.randn(batch, tokens, 8, dtype=torch.float64)
    wanted = layer(x)  # with gradients: in one
    lengths = []
    whole = layer._whole
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(token_layers.INNER_BYTES, "cpu", 0)
        patch.setattr(token_layers, "SHORTEST_STRETCH", shortest)
        patch.setattr(layer, "_whole", lambda x: lengths.append(x.shape[1]) or whole(x))
        found = layer(x)
    assert relative_error(found, wanted) < 1e-12
    parts = -(-tokens // shortest) if tokens >= 2 * shortest else 1
    assert len(lengths) == parts
    assert max(lengths) <= (shortest + 2 * layer.edge if parts > 1 else tokens)


def test_checkpointing_equals_plain():
    plain, _ = golden_model("model_tiny")
    checkpointed, _ = golden_model("model_tiny", gradient_checkpointing=True)
    arguments = inputs(plain, 2)
    outputs = []
    for model in (plain, checkpointed):
        out = model(*arguments)
        out.square().sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    for (name, mine), other in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            assert torch.allclose(mine.grad, other.grad, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast(training):
    model, golden = golden_model("model_head64")
    arguments = [golden[f"in.{key}"] for key in ("latent", "clip", "sync", "text", "t")]
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*arguments)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.detach(), golden["out.predict_flow"]) < 3e-2
    if training:
        out.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_bfloat16_and_float64_weights():
    model, golden = golden_model("model_head64")
    arguments = [golden[f"in.{key}"] for key in ("latent", "clip", "sync", "text", "t")]
    exact = model.double()(*(x.double() for x in arguments))
    assert exact.dtype == torch.float64
    assert relative_error(exact, golden["out.predict_flow"]) < TOLERANCE
    half = model.bfloat16()(*(x.bfloat16() for x in arguments[:4]), arguments[4])
    assert half.dtype == torch.bfloat16
    assert relative_error(half, golden["out.predict_flow"]) < 3e-2


@torch.no_grad()
def test_an_item_does_not_depend_on_its_batch():
    model, _ = golden_model("model_tiny")
    latent, clip, sync, text, t = inputs(model, 4)
    together = model(latent, clip, sync, text, t)
    alone = model(latent[2:3], clip[2:3], sync[2:3], text[2:3], t[2:3])
    assert relative_error(together[2:3], alone) < TOLERANCE


@torch.no_grad()
def test_guidance_is_a_mix_of_two_predictions():
    model, _ = golden_model("model_tiny")
    latent, clip, sync, text, _ = inputs(model, 2)
    conditions = model.preprocess_conditions(clip, sync, text)
    empty = model.get_empty_conditions(2)
    t = torch.tensor(0.6)
    cond = model.predict_flow(latent, t.expand(2), conditions)
    uncond = model.predict_flow(latent, t.expand(2), empty)
    got = model.predict_flow_pair(latent, t, conditions, empty)
    assert relative_error(got[0], cond) < TOLERANCE
    assert relative_error(got[1], uncond) < TOLERANCE
    guided = model.ode_wrapper(t, latent, conditions, empty, 7.0)
    assert relative_error(guided, 7 * cond - 6 * uncond) < 1e-4


def test_empty_conditions_pass_gradients_to_the_learned_features():
    model, _ = golden_model("model_tiny")
    latent, _, _, _, t = inputs(model, 2)
    empty = model.get_empty_conditions(2)
    model.predict_flow(latent, t, empty).square().sum().backward()
    assert model.empty_clip_feat.grad.any()
    assert model.empty_sync_feat.grad.any()
    assert model.empty_string_feat.grad is None


def test_upsampled_sync_rows_are_the_nearest():
    model, _ = golden_model("model_tiny")
    for tokens in (24, 26, 640, 1764):
        model.update_seq_lengths(tokens, 8, 24)
        index, offsets = model.sync_tokens()
        centre = (torch.arange(tokens, dtype=torch.float64) + 0.5) * 24 / tokens
        assert ((index + 0.5 - centre).abs() <= 0.5 + 1e-5).all()
        wanted = wk.token_rows(index, 24)
        assert torch.equal(index, wanted.index) and torch.equal(offsets, wanted.offsets)


def test_shape_errors_name_argument_shape_and_wanted():
    model, _ = golden_model("model_tiny")
    latent, clip, sync, text, t = inputs(model, 2)
    conditions, empty = model.preprocess_conditions(clip, sync, text), model.get_empty_conditions(2)
    other = model.get_empty_conditions(3)
    scalar = torch.tensor(0.5)
    cases = [
        (lambda: model(latent[0], clip, sync, text, t), "latent", "(batch, 26, 10)"),
        (lambda: model(latent[:, :25], clip, sync, text, t), "latent", "(batch, 26, 10)"),
        (lambda: model(latent, clip[..., :3], sync, text, t), "clip_f", "(batch, 8, 12)"),
        (lambda: model(latent, clip, sync[:, :16], text, t), "sync_f", "(2, 24, 16)"),
        (lambda: model(latent, clip, sync, text[:1], t), "text_f", "(2, 7, 12)"),
        (lambda: model(latent, clip, sync, text, scalar), "t", "(2,)"),
        (lambda: model.predict_flow(latent, t[:1], conditions), "t", "(2,)"),
        (lambda: model.predict_flow(latent, t, other), "conditions.clip_f", "(2, 8, 16)"),
        (lambda: model.ode_wrapper(t, latent, conditions, empty, 4.0), "t", "()"),
        (lambda: model.ode_wrapper(t, latent, conditions, empty, 1.0), "t", "()"),
        (
            lambda: model.ode_wrapper(scalar, latent, conditions, other, 4.0),
            "empty_conditions.clip_f",
            "(2, 8, 16)",
        ),
        (
            lambda: model.get_empty_conditions(3, negative_text_features=text),
            "negative_text_features",
            "(3, 7, 12)",
        ),
    ]
    for call, argument, wanted in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"{argument} has shape ("), argument
        assert str(error.value).endswith(f", wanted {wanted}"), argument
        assert "\n" not in str(error.value)


def test_update_seq_lengths():
    model, _ = golden_model("model_tiny")
    latent, clip, sync, text, t = inputs(model, 2)
    stale = model.preprocess_conditions(clip, sync, text)
    model.update_seq_lengths(30, 8, 24)
    assert (model.latent_seq_len, model.clip_seq_len, model.sync_seq_len) == (30, 8, 24)
    longer = inputs(model, 2)[0]
    assert model(longer, clip, sync, text, t).shape == (2, 30, 10)
    with pytest.raises(
        ValueError, match=r"conditions.sync_tokens.index has shape \(26,\), wanted \(30,\)"
    ):
        model.predict_flow(longer, t, stale)
    with pytest.raises(ValueError, match="sync_seq_len is 25, wanted a multiple of 8"):
        model.update_seq_lengths(30, 8, 25)
