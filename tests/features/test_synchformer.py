"""The visual branch of Synchformer: golden vectors, the public file's names, segments."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from support.golden_weights import GOLDEN, uniform
from support.synchformer import TINY, content
from torch import Tensor

from bench import synchformer as benchmark
from wavflow.base.errors import InputError
from wavflow.features import synchformer
from wavflow.features.synchformer import (
    PREFIX,
    Synchformer,
    SynchformerConfig,
    convert,
    load_synchformer,
    normalize,
    segments,
    visual_state,
    weights_path,
)
from wavflow.features.weights import WeightFile


@functools.cache
def facts():
    return json.loads((GOLDEN / "synchformer.json").read_text())


def network(config: SynchformerConfig = TINY) -> Synchformer:
    model = Synchformer(config).eval().requires_grad_(False)
    model.load_state_dict(visual_state(content(config), "golden"))
    return model


def frames(batch: int, count: int) -> Tensor:  # (b t 3 224 224) float64
    values = uniform(1_000_000, batch * count * 3 * 224 * 224)
    return torch.from_numpy(values.reshape(batch, count, 3, 224, 224))


@pytest.fixture(scope="module")
def model() -> Synchformer:
    return network()


@pytest.fixture
def tiny_files(monkeypatch, tmp_path):
    """Files are of tiny networks; returns the path of one, and what it holds."""
    monkeypatch.setattr(synchformer, "SynchformerConfig", lambda: TINY)
    other = {name: torch.zeros(1) for name in facts()["ignored"]}
    torch.save(content() | other, tmp_path / "public.pth")
    return tmp_path / "public.pth", content()


def check(rows: Tensor, name: str, atol: float) -> None:
    vector = facts()["vectors"][name]
    assert list(rows.shape) == vector["shape"]
    flat = rows.double().flatten()
    for found, wanted in (
        (flat[:8], vector["first8"]),
        (flat[-8:], vector["last8"]),
        (flat.mean(), vector["mean"]),
        (flat.std(correction=0), vector["std"]),
    ):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# Golden vectors


@pytest.mark.parametrize(
    ("name", "batch", "count"),
    [("tiny_T16", 1, 16), ("tiny_B2_T24", 2, 24), ("tiny_B1_T200", 1, 200)],
)
def test_tiny_golden(model, name, batch, count):
    check(model(frames(batch, count).float()), name, atol=5e-6)


def test_tiny_golden_in_float64():
    # Their weights and pixels are float32's; their arithmetic is float64.
    check(network().double()(frames(1, 16).float().double()), "tiny_T16_f64", atol=1e-10)


def test_full_golden():
    rows = network(SynchformerConfig())(frames(1, 16).float())
    check(rows, "full_T16", atol=1e-5)


def test_bfloat16_products_stay_near(model):
    half = network().compute_in(torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {name.rsplit(".", 2)[-2] for name in kept if "norm" in name} == {
        "norm",
        *"norm1 norm2 norm3".split(),
    }
    assert {name for name in kept if "norm" not in name} == {
        "cls_token", "pos_embed", "temp_embed", "spatial_attn_agg.cls_token"
    }  # fmt: skip
    wide, rows = model(frames(1, 24).float()), half(frames(1, 24).float())
    assert rows.dtype == torch.float32
    near = torch.cosine_similarity(wide, rows, dim=-1)
    assert near.min() > 0.999 and not torch.equal(wide, rows)


# Segments


def test_segments_of_a_clip():
    assert [segments(t) for t in (0, 15, 16, 23, 24, 200, 207, 208)] == [0, 0, 1, 1, 2, 24, 24, 25]


def test_a_segment_knows_nothing_of_others_and_frames_behind_the_last_are_dropped(model):
    clip = frames(1, 46).float()
    rows = model(clip)
    assert rows.shape == (1, 32, 48)
    assert torch.equal(rows, model(clip[:, :40]))
    alone = torch.cat([model(clip[:, at : at + 16]) for at in range(0, 25, 8)], dim=1)
    torch.testing.assert_close(rows, alone, rtol=0, atol=5e-6)
    changed = clip.clone()
    changed[:, 18:22] = 0  # of segments 1 (frames 8 to 23) and 2 (16 to 31)
    moved = (model(changed) - rows).abs().amax(dim=-1)[0].view(4, 8)
    assert (moved[1:3] > 1e-3).all() and (moved[[0, 3]] < 5e-6).all()


def test_pixels_are_normalized():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(normalize(pixels), torch.tensor([-1.0, -0.6, 1.0]))


# Files


def test_names_and_shapes_are_the_public_ones():
    with torch.device("meta"):
        model = Synchformer()
    ours = {PREFIX + name: list(value.shape) for name, value in model.state_dict().items()}
    used = facts()["used"]
    unused = {"vfeat_extractor.patch_embed.proj.weight", "vfeat_extractor.patch_embed.proj.bias"}
    assert len(used) == 238 and ours == {k: v for k, v in used.items() if k not in unused}
    every = dict.fromkeys([*used, *facts()["ignored"]])
    assert len(every) == 513
    assert {PREFIX + name for name in visual_state(every, "public")} == set(ours)


def test_the_public_file_and_its_conversion_give_one_network(tiny_files, tmp_path):
    path, held = tiny_files
    convert(path, tmp_path / "visual.safetensors")
    kept = load_file(tmp_path / "visual.safetensors")
    assert kept.keys() == {name for name in held if ".patch_embed.proj." not in name}
    for source in (path, tmp_path / "visual.safetensors"):
        loaded = load_synchformer(source)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        check(loaded(frames(1, 16).float()), "tiny_T16", atol=5e-6)
    assert load_synchformer(path, dtype=torch.bfloat16).norm.weight.dtype == torch.float32


def drop(held):
    del held[PREFIX + "blocks.1.attn.qkv.bias"]


def rename(held):
    held[PREFIX + "blocks.2.norm1.weight"] = held[PREFIX + "blocks.1.norm1.weight"]


def reshape(held):
    held[PREFIX + "norm.weight"] = held[PREFIX + "norm.weight"][:-1]


def replace(held):
    held[PREFIX + "norm.bias"] = 3


def wrap(held):
    held["state_dict"] = {name: held.pop(name) for name in list(held)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"it lacks blocks\.1\.attn\.qkv\.bias"),
        (rename, r"it has foreign blocks\.2\.norm1\.weight"),
        (reshape, r"norm\.weight is \(47,\); the model wants \(48,\)"),
        (replace, r"norm\.bias is a int; wanted a tensor"),
        (wrap, r"it has foreign state_dict; wanted Synchformer's vfeat_extractor\.\*"),
    ],
)
def test_a_file_of_something_else_is_named_with_the_tensor(tiny_files, tmp_path, damage, message):
    _, held = tiny_files
    damage(held)
    torch.save(held, tmp_path / "other.pth")
    for use in (load_synchformer, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(InputError, match=f"other.pth: {message}") as caught:
            use(tmp_path / "other.pth")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_unreadable_files_are_named(tiny_files, tmp_path):
    path, _ = tiny_files
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=name):
            load_synchformer(tmp_path / name)
    with pytest.raises(InputError, match="gone.pth: no such file, named by model.synchformer_ckpt"):
        weights_path(str(tmp_path / "gone.pth"))


def test_the_public_file_is_fetched_and_converted_once(tiny_files, tmp_path, monkeypatch):
    path, _ = tiny_files
    held = path.read_bytes()
    file = WeightFile("public.pth", path.as_uri(), len(held), hashlib.sha256(held).hexdigest())
    monkeypatch.setattr(synchformer, "PUBLIC", file)
    monkeypatch.setenv("WAVFLOW_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WAVFLOW_OFFLINE", "1")
    with pytest.raises(InputError, match="cache/public.pth: no such file"):
        weights_path()
    monkeypatch.delenv("WAVFLOW_OFFLINE")
    found = weights_path()
    assert found.parent == tmp_path / "cache" and found.suffix == ".safetensors"
    check(load_synchformer(found)(frames(1, 16).float()), "tiny_T16", atol=5e-6)
    (tmp_path / "cache" / "public.pth").unlink()
    path.unlink()
    assert weights_path() == found
    assert weights_path(str(found)) == found


# Its benchmark


def test_the_benchmark_times_ways_that_agree(capsys):
    rows = [
        benchmark.measure(TINY, torch.device("cpu"), dtype, 2, 2, 0.0)
        for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        assert set(row["seconds"]) == {"ours", "torch's Linear", "a segment a call"}
        assert row["clip_frames"] == 24 and all(0 < share for share in row["mfu"].values())
        for way, rate in row["clips_a_second"].items():
            assert rate * row["seconds"][way]["median"] == pytest.approx(2)
    # Matrix products alone, of 2 clips of 2 segments: 16 c^2 a token and block, 4 c a key.
    tokens, dim, depth = 4 * 1569, TINY.dim, TINY.depth
    assert rows[0]["flops"] > 2 * tokens * 16 * dim**2 * depth
    benchmark.show(rows)
    printed = capsys.readouterr().out
    assert "a segment a call" in printed and "clips of 24 frames at 25 a second" in printed


def test_the_benchmark_refuses_ways_that_disagree(monkeypatch, capsys):
    def wrong(config, pixels, dtype):
        return {"ours": lambda: torch.ones(2), "other": lambda: torch.ones(2) * 1.001}

    monkeypatch.setattr(benchmark, "ways", wrong)
    with pytest.raises(SystemExit):
        benchmark.measure(TINY, torch.device("cpu"), "float32", 1, 1, 0.0)
    assert "rows of 'other' are off by 1.0e-03 in float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "--device tpu cannot be used"),
        ({"dtype": ["float16"]}, "--dtype is 'float16', wanted float32 or bfloat16"),
        ({"batch": [10**6]}, "1000000 clips of 24 segments need about"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_run(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(**{"segments": 24, "batch": None} | options)
    assert message in capsys.readouterr().err
