"""Windows and scaled rotations of the network, for clips much longer than in training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.golden_weights import relative_error
from support.networks import LOCAL_SIZES, inputs, local_model
from support.paths import PYTHONPATH

import wavflow_kernels as wk
from wavflow.base.errors import InputError
from wavflow.base.flops import count_flops
from wavflow.config.load import load_config
from wavflow.layers.prepare import prepare_inference
from wavflow.systems.wavflow.build import build_model
from wavflow.systems.wavflow.config import WavflowConfig
from wavflow.systems.wavflow.network import WavflowModel
from wavflow_kernels import AttentionWindow


def prediction(model: WavflowModel, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """By conditions and a step, as in sampling."""
    latent, *features, t = given
    with torch.inference_mode():
        return model.predict_flow(latent, t, model.preprocess_conditions(*features))


# Windows


def test_a_window_as_long_as_the_clip_is_none():
    model = local_model()
    given = inputs(model, 2)
    wanted = prediction(model, given)
    model.update_attention(100, "none")
    assert torch.equal(prediction(model, given), wanted)
    model.update_attention(99, "none")
    assert model.config.window == AttentionWindow(99, 100, 13)
    assert relative_error(prediction(model, given), wanted) < 1e-5
    model.update_attention(20, "none")
    assert relative_error(prediction(model, given), wanted) > 1e-3


def test_every_window_of_a_step():
    model = local_model(attention_window=9)
    seen = []
    attend = wk.rope_attention

    def recorded(q, k, v, *, window):
        seen.append((q.shape[2], k.shape[2], window))
        return attend(q, k, v, window=window)

    model.joint_blocks.append(model.joint_blocks[0])  # its clip and text streams are not updated
    del model.joint_blocks[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wk, "rope_attention", recorded)
        prediction(model, inputs(model, 1))
    joint, alone = AttentionWindow(9, 100, 13), AttentionWindow(9, 100)
    assert seen == [(100, 116, joint), *[(100, 100, alone)] * 3]


@pytest.mark.parametrize("joint_depth", [1, 2])
@torch.no_grad()
def test_a_token_hears_its_receptive_field(joint_depth):
    """Attention's window and convolutions on either side, block by block.

    Text tokens hear the whole clip; where later blocks hear them, so does every token.
    """
    window, n, at = 5, 300, 150
    model = local_model(latent_seq_len=n, attention_window=window, fused_depth=4 - joint_depth)
    latent, *rest = (x.double() for x in inputs(model.double(), 1))
    changed = latent.clone()
    changed[:, at] += 1
    difference = (model(changed, *rest) - model(latent, *rest)).abs().amax((0, 2))
    # Widths 7, 7 and 7 before the blocks, 7 after them; 3, 3 and 3 in each.
    reach = 4 * 3 + 4 * (window + 3)
    far = (torch.arange(n) - at).abs() > reach
    if joint_depth == 1:
        assert difference[far].max() < 1e-14
        assert difference[at - reach] > 0 and difference[at + reach] > 0
    else:
        assert difference[far].min() > 1e-12
    model.update_attention(None, "none")
    full = (model(changed, *rest) - model(latent, *rest)).abs().amax((0, 2))
    assert full[far].min() > 1e-12


@torch.no_grad()
def test_far_frames_are_not_heard_in_a_window():
    """A clip row changes near tokens, and, through the mean over all rows, the others evenly."""
    model = local_model(latent_seq_len=300, clip_seq_len=60, attention_window=4).double()
    latent, clip, *rest = (x.double() for x in inputs(model, 1))
    model.clip_cond_proj.weight.zero_()
    changed = clip.clone()
    changed[:, 30] += 1
    difference = (model(latent, changed, *rest) - model(latent, clip, *rest)).abs().amax((0, 2))
    tokens = torch.arange(300)
    # Row 30 lies at token 150; two convolutions of width 3 spread it over two rows of 5 tokens.
    far = (tokens - 150).abs() > 2 * 5 + 3 + 4 * (4 + 3)
    assert difference[far].max() < 1e-14 and difference[150] > 1e-6


def test_both_backends_prepared_weights_and_pairs_agree():
    model = local_model(attention_window=7, fused_depth=2)
    latent, *features, t = given = inputs(model, 2)
    wanted = prediction(model.double(), tuple(x.double() for x in given))
    model.float()
    with wk.use_backend("reference"):
        assert relative_error(prediction(model, given), wanted) < 1e-5
    assert relative_error(prediction(model, given), wanted) < 1e-5
    assert relative_error(prediction(prepare_inference(model, torch.float32), given), wanted) < 1e-5
    with torch.inference_mode():
        conditions, empty = model.preprocess_conditions(*features), model.get_empty_conditions(2)
        pair = model.predict_flow_pair(latent, t[0], conditions, empty)
        for one, of in zip(pair, (conditions, empty), strict=True):
            assert relative_error(one, model.predict_flow(latent, t[:1].expand(2), of)) < 1e-5


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_are_those_of_the_mathematics(backend):
    grads = []
    for checkpointing, kind in ((False, "reference"), (False, backend), (True, backend)):
        model = local_model(attention_window=7, gradient_checkpointing=checkpointing)
        given = inputs(model, 2)
        if not grads:
            model, given = model.double(), tuple(x.double() for x in given)
        with wk.use_backend(kind):
            model(*given).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    truth, plain, checkpointed = grads
    for name, wanted in truth.items():
        if wanted.any():
            assert relative_error(plain[name], wanted) < 1e-4, name
            assert torch.allclose(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled_in_one_graph(backend):
    model = local_model(attention_window=7, depth=2, fused_depth=1)
    given = inputs(model, 1)
    with wk.use_backend(backend):
        wanted = model(*given)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(*given)
    assert relative_error(found, wanted) < 1e-6


def test_arithmetic_is_counted():
    model = local_model(attention_window=7)
    given = inputs(model, 1)
    local = count_flops(lambda: model(*given))
    model.update_attention(None, "none")
    full = count_flops(lambda: model(*given))
    keys = 15 + 14 * 13 // 100 + 1 + 3  # audio, clip and text tokens that an audio token sees
    assert full - local == 4 * 16 * 100 * ((116 - keys) + 3 * (100 - 15))


# Rotations


def angles(table: torch.Tensor) -> torch.Tensor:
    """Turns of a table's pairs, (tokens, pairs), in radians from -pi to pi."""
    cos, sin = table.double().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.atan2(sin, cos)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk"])
@pytest.mark.parametrize("tokens", [50, 100, 170])
def test_rotations_are_the_formulas(scaling, tokens):
    model = local_model(rope_scaling=scaling, hidden_dim=32)
    model.update_seq_lengths(tokens, 20, 24)
    stretch = max(tokens / 100, 1)
    base = 10000 * (stretch ** (16 / 14) if scaling == "ntk" else 1)
    place = torch.cat((torch.arange(tokens), torch.arange(20) * tokens / 20, torch.zeros(3)))
    place = place.double() / (stretch if scaling == "linear" else 1)
    wanted = place[:, None] * base ** (-torch.arange(0, 16, 2) / 16).double()
    turned = torch.remainder(angles(model.rope()) - wanted + 1, 2 * torch.pi) - 1
    assert turned.abs().max() < 1e-4


def test_scaling_keeps_to_the_turns_of_training():
    """Linear: no position beyond those of training. NTK: the slowest pair turns no further."""
    model = local_model(hidden_dim=32)
    last = angles(model.rope()[99:100])
    model.update_seq_lengths(400, 13, 24)
    for scaling, pairs in (("linear", slice(None)), ("ntk", slice(-1, None))):
        model.update_attention(None, scaling)
        of_training = angles(model.rope()[[396]])[:, pairs]
        assert (of_training - last[:, pairs]).abs().max() < 1e-5
    assert (model.rope()[:400, :2] - rotations_of_training(400)[:, :2]).abs().max() < 1e-6


def rotations_of_training(tokens: int) -> torch.Tensor:
    return wk.rope_table(tokens, 16)


# Settings


def test_conditions_of_other_settings_are_refused():
    model = local_model()
    latent, *features, t = inputs(model, 2)
    conditions = model.preprocess_conditions(*features)
    for setting, message in (
        (
            (20, "none"),
            r"conditions have window None, the model has AttentionWindow\(size=20, local=100",
        ),
        ((None, "ntk"), "conditions have rope_scaling none, the model has ntk"),
    ):
        model.update_attention(*setting)
        with pytest.raises(ValueError, match=message):
            model.predict_flow(latent, t, conditions)
    later = model.preprocess_conditions(*features)
    model.predict_flow(latent, t, later)
    model.update_attention(100, "none")
    model.predict_flow(latent, t, conditions)
    with pytest.raises(ValueError, match="conditions have rope_scaling ntk, the model has none"):
        model.predict_flow(latent, t, later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_window": -1}, "attention_window is -1, wanted at least 0"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', wanted one of none, linear, ntk"),
        ({"rope_scaling": "ntk", "num_heads": 448}, "'ntk' wants heads of more than 2 channels"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        WavflowConfig(**change)


def test_settings_of_a_file():
    overrides = ["model.attention_window=0.25", "model.rope_scaling=ntk"]
    sizes = build_model(load_config("toy_8k", overrides)).config
    assert (sizes.attention_window, sizes.rope_scaling) == (25, "ntk")  # 100 tokens a second
    sizes = build_model(load_config("toy_8k")).config
    assert (sizes.attention_window, sizes.rope_scaling) == (None, "none")
    for wrong, message in (
        ("attention_window=0", "model.attention_window is 0"),
        ("rope_scaling=yarn", "model.rope_scaling is 'yarn'"),
    ):
        with pytest.raises(InputError, match=message):
            load_config("toy_8k", [f"model.{wrong}"])


# Lengths


@pytest.mark.parametrize("seconds", [2.0, 8.0, 10.3, 61.0, 600.0])
def test_features_stay_beside_their_sound_at_any_length(seconds):
    """Synchformer's segments of 0.64 s start every 0.32 s; tokens take rows by interpolation.

    At any length, 8 s too, a token lies in its segment, but for up to 0.28 s of frames without one
    at the end; CLIP's rows lie within 0.125 s of their places.
    """
    tokens, clips = int(seconds * 80), int(seconds * 8)
    segments = (int(seconds * 25) - 16) // 8 + 1
    with torch.device("meta"):
        model = WavflowModel(**LOCAL_SIZES)
    model.to_empty(device="cpu").update_seq_lengths(tokens, clips, 8 * segments)
    time = (torch.arange(tokens) + 0.5) / 80
    middle = 0.32 * (model.sync_tokens().index // 8 + 1)
    left_out = seconds - (8 * segments + 8) / 25
    assert (middle - time).abs().max() < 0.32 + left_out
    frame = torch.arange(clips) / 8
    assert (frame - torch.arange(clips) * (tokens / clips) / 80).abs().max() < 0.125


LONG = """
import sys, torch
from support.networks import LOCAL_SIZES, local_model
from support.networks import inputs
from wavflow.systems.wavflow.footprint import clip_bytes

torch.set_num_threads(1)
torch.set_grad_enabled(False)
n, window = map(int, sys.argv[1:])
sizes = {"hidden_dim": 32, "depth": 12, "fused_depth": 8, "text_seq_len": 77}
model = local_model(**sizes, latent_seq_len=n, clip_seq_len=n // 10, sync_seq_len=n // 10 // 3 * 8)


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def step(size):
    model.update_attention(size, "linear")
    latent, *features, t = inputs(model, 1)
    assert model.predict_flow(latent, t, model.preprocess_conditions(*features)).isfinite().all()


model.update_seq_lengths(200, 20, 48)
step(10)
model.update_seq_lengths(n, n // 10, n // 10 // 3 * 8)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
step(window)
estimate = clip_bytes(model.config, torch.float32, False, torch.device("cpu"))
print(status("VmHWM") - before, estimate)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_ten_minutes_fit_the_estimate():
    """Twelve blocks on 48,000 tokens: one mask of all pairs would take 2.3 GB."""
    child = subprocess.run(
        [sys.executable, "-c", LONG, "48000", "640"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, estimate = map(int, child.stdout.split())
    assert 0.1 * estimate < taken < estimate < 2e9
