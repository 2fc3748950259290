"""CLIP's features and the encoders of the public system.

Where open_clip cannot be imported, a stand-in with the functions that are used takes its place.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest
import torch
from support.payload import Payload
from support.synchformer import TINY, content
from torch import Tensor, nn

from wavflow.base.errors import InputError
from wavflow.base.files import read_json
from wavflow.config.load import load_config
from wavflow.features import encode, extract, synchformer
from wavflow.features import public as clip_synchformer
from wavflow.features.clip import CLIP_STREAM, MEAN, STD, Clip
from wavflow.features.encode import load_encoders
from wavflow.features.registry import get_encoders
from wavflow.features.synchformer import SYNC_STREAM
from wavflow.systems.wavflow.build import empty_caption
from wavflow.toy.world import write_toy_world

NAME = "Test-378"
SIZES = {
    "embed_dim": 6,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 378, "layers": 2, "width": 32, "head_width": 16, "patch_size": 126
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 10, "heads": 2, "layers": 2
    },
}  # fmt: skip


class ImageTower(nn.Module):
    """Pixels (b 3 s s) to the mean colours of two halves; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.saw: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:  # b 6
        self.saw.append(pixels)
        return self.gain * pixels.unflatten(2, (2, -1)).mean(dim=(3, 4)).flatten(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = ImageTower()
        self.embedding = nn.Embedding(128, 10)
        self.ln_final = nn.LayerNorm(10)

    def forward_intermediates(self, image=None, text=None, **options) -> dict[str, list[Tensor]]:
        assert image is None
        assert options == {
            "text_indices": 1,
            "normalize_intermediates": True,
            "intermediates_only": True,
        }
        return {"text_intermediates": [self.ln_final(self.embedding(text)).cumsum(dim=1)]}


def tokenize(captions: list[str]) -> Tensor:  # b 77
    tokens = torch.zeros(len(captions), 77, dtype=torch.int64)
    for row, caption in zip(tokens, captions, strict=True):
        ids = [1, *(ord(letter) % 128 for letter in caption), 2]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@pytest.fixture
def stand_in(monkeypatch):
    """A module in open_clip's place; `made` holds the weights its models were made with.

    `cached` stands for Hugging Face's cache: (repository, file) -> path.
    """
    module = types.ModuleType("open_clip")
    module.made, module.cached = [], {}
    hub = types.ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda repository, file: module.cached.get((repository, file))
    models = {
        NAME: SIZES,
        "Small-224": SIZES | {"vision_cfg": SIZES["vision_cfg"] | {"image_size": 224}},
        "Short-64": SIZES | {"text_cfg": SIZES["text_cfg"] | {"context_length": 64}},
        "Other-towers": SIZES | {"vision_cfg": {"timm_model_name": "x"}},
    }

    def create_model(name: str, pretrained: str) -> Model:
        module.made.append(pretrained)
        if pretrained == "broken":
            raise RuntimeError("size mismatch\nfor visual.proj")
        model = Model()
        model.load_state_dict(weights)
        return model

    torch.manual_seed(0)
    weights = Model().state_dict()
    tags = {"first": {"hf_hub": "someone/clip/"}, "broken": {"url": "https://example.org/x"}}
    module.list_models = lambda: list(models)
    module.get_model_config = models.get
    module.is_pretrained_cfg = lambda name, tag: tag in tags
    module.get_pretrained_cfg = lambda name, tag: tags[tag]
    module.list_pretrained_tags_by_model = lambda name: list(tags)
    module.create_model = create_model
    module.get_tokenizer = lambda name: tokenize
    monkeypatch.setitem(sys.modules, "open_clip", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.delenv("WAVFLOW_OFFLINE", raising=False)
    return module


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (5, 3, 384, 384), dtype=torch.uint8)


def norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1)


# Pictures and captions


def test_the_tower_sees_the_top_left_normalized_and_rows_have_length_1(stand_in, pictures):
    clip = Clip(NAME, "first", "cpu", batch=2)
    rows = clip.encode_pictures(pictures)
    assert rows.shape == (5, 6) and rows.dtype == torch.float32
    torch.testing.assert_close(norms(rows), torch.ones(5))
    saw = clip.image_tower.saw
    assert [len(pixels) for pixels in saw] == [2, 2, 1]
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    wanted = (pictures[..., :378, :378] / 255 - mean) / std
    torch.testing.assert_close(torch.cat(saw), wanted)


def test_all_77_token_states_are_kept_with_length_1(stand_in):
    clip = Clip(NAME, "first", "cpu")
    rows = clip.encode_captions(["a bell", ""])
    assert rows.shape == (2, 77, 10) and rows.dtype == torch.float32
    torch.testing.assert_close(norms(rows), torch.ones(2, 77))
    torch.testing.assert_close(rows[1:], clip.encode_captions([""]))
    tower = clip.text_tower
    states = tower.ln_final(tower.embedding(tokenize(["a bell"]))).cumsum(dim=1)
    torch.testing.assert_close(rows[:1], states / norms(states)[..., None])
    with pytest.raises(TypeError, match="list of str"):
        clip.encode_captions("a bell")


def test_one_load_serves_both_towers(stand_in, pictures):
    clip = Clip(NAME, "first", "cpu")
    assert stand_in.made == []
    clip.encode_captions(["a bell"])
    assert "image_tower" not in vars(clip)
    clip.encode_pictures(pictures)
    assert stand_in.made == ["first"]
    assert not any(p.requires_grad for p in clip.image_tower.parameters())


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tast-378", f"'Tast-378', unknown to open_clip; did you mean {NAME}"),
        ("Small-224", "'Small-224', which sees 224 pixels in patches of 126; wanted"),
        ("Other-towers", "'Other-towers', which sees None pixels in patches of None"),
        ("Short-64", "'Short-64', whose text tower is .*'context_length': 64"),
    ],
)
def test_models_of_another_geometry(stand_in, name, message):
    with pytest.raises(InputError, match=f"model.clip_model_name is {message}"):
        Clip(name, "first", "cpu").encode_captions([""])
    assert stand_in.made == []


def test_weights_that_are_not_there(stand_in, tmp_path):
    with pytest.raises(InputError, match="clip_pretrained is 'frist': no such file, .* first, bro"):
        Clip(NAME, "frist", "cpu").encode_captions([""])
    with pytest.raises(InputError, match=r"broken: no weights of .*size mismatch for visual") as e:
        Clip(NAME, "broken", "cpu").encode_captions([""])
    assert "\n" not in str(e.value)
    (tmp_path / "mine.bin").write_bytes(b"")
    Clip(NAME, str(tmp_path / "mine.bin"), "cpu").encode_captions([""])
    assert stand_in.made == ["broken", str(tmp_path / "mine.bin")]


def test_offline_takes_the_hubs_cache_or_nothing(stand_in, monkeypatch):
    monkeypatch.setenv("WAVFLOW_OFFLINE", "1")
    for tag in ("first", "broken"):
        with pytest.raises(
            InputError, match=f"{tag}: not in Hugging Face's cache, and WAVFLOW_OFF"
        ):
            Clip(NAME, tag, "cpu").encode_captions([""])
    stand_in.cached["someone/clip", "open_clip_pytorch_model.bin"] = "/cached/model.bin"
    Clip(NAME, "first", "cpu").encode_captions([""])
    assert stand_in.made == ["/cached/model.bin"]


def test_an_absent_or_broken_open_clip_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    encoders = get_encoders("clip_synchformer", device="cpu")
    with pytest.raises(InputError, match=r"needs open_clip \(.*\): pip install 'wavflow\[clip\]'"):
        encoders.text.encode([""])
    monkeypatch.delitem(sys.modules, "open_clip")
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('no operator nms')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"cannot be imported \(RuntimeError: no operator nms\)"):
        encoders.text.load()


# Both encoders


@pytest.fixture
def tiny(stand_in, monkeypatch, tmp_path) -> dict[str, str]:
    """Options of encoders with a tiny Synchformer."""
    monkeypatch.setattr(synchformer, "SynchformerConfig", lambda: TINY)
    monkeypatch.setattr(clip_synchformer.ClipSynchformerVideo, "sync_dim", TINY.dim)
    torch.save(content(), tmp_path / "sync.pth")
    return {
        "clip_model_name": NAME,
        "clip_pretrained": "first",
        "synchformer_ckpt": str(tmp_path / "sync.pth"),
    }


def clip_frames(seconds: float) -> list[Tensor]:
    return [
        torch.randint(0, 256, (stream.count(seconds), 3, stream.size, stream.size)).byte()
        for stream in (CLIP_STREAM, SYNC_STREAM)
    ]


def test_the_interface(tiny, monkeypatch):
    encoders = get_encoders("clip_synchformer", **tiny, device="cpu")
    video, text = encoders.video, encoders.text
    assert (video.clip_dim, video.sync_dim, text.dim, text.length) == (6, 48, 10, 77)
    assert [video.clip_rows(s) for s in (8.0, 1.28)] == [64, 10]
    assert [video.sync_rows(s) for s in (8.0, 1.28, 0.64, 0.6)] == [192, 24, 8, 0]
    frames = clip_frames(2.0)
    clip, sync = video.encode(frames, 2.0)
    assert clip.shape == (16, 6) and sync.shape == (40, 48) == (video.sync_rows(2.0), 48)
    assert clip.dtype == sync.dtype == torch.float32
    for count in (1, 2, 5):  # segments in one call
        monkeypatch.setattr(clip_synchformer, "SEGMENTS", count)
        torch.testing.assert_close(video.encode(frames, 2.0)[1], sync, rtol=0, atol=5e-6)
    pixels = synchformer.normalize(frames[1])[None]
    wanted = synchformer.load_synchformer(tiny["synchformer_ckpt"])(pixels)[0]
    torch.testing.assert_close(sync, wanted, rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match=r"25 fps are torch.uint8 \(49, .*wanted torch.uint8 \(50"):
        video.encode([frames[0], frames[1][1:]], 2.0)
    with pytest.raises(InputError, match=r"0.6 s are 15 frames; wanted at least 16"):
        video.encode(clip_frames(0.6), 0.6)


@pytest.mark.parametrize("seconds", [2.0, 2.04, 3.52])
def test_pieces_share_the_segments_that_lie_in_both(tiny, seconds):
    video = get_encoders("clip_synchformer", **tiny, device="cpu").video
    frames = clip_frames(seconds)
    pieces = zip(frames[0].split(8), frames[1].split(25), strict=False)
    if len(frames[0]) % 8 == 0 and len(frames[1]) % 25:  # the last piece has no picture of CLIP's
        pieces = [*pieces, (frames[0][:0], frames[1][len(frames[1]) // 25 * 25 :])]
    for found, wanted in zip(
        video.encode_pieces(pieces), video.encode(frames, seconds), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    with pytest.raises(InputError, match=r"0.6 s are 15 frames; wanted at least 16"):
        video.encode_pieces([clip_frames(0.6)])


def test_bfloat16_is_near_and_comes_as_float32(tiny):
    frames = clip_frames(1.0)
    wide = get_encoders("clip_synchformer", **tiny, device="cpu")
    half = get_encoders("clip_synchformer", **tiny, device="cpu", dtype="bfloat16")
    assert wide.video.facts() != half.video.facts()
    for a, b in zip(wide.video.encode(frames, 1.0), half.video.encode(frames, 1.0), strict=True):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a, b, dim=-1).min() > 0.999
    assert not torch.equal(wide.video.encode(frames, 1.0)[1], half.video.encode(frames, 1.0)[1])


def test_facts_tell_other_weights_apart(tiny, tmp_path, stand_in):
    def facts(**changes: str) -> dict[str, str]:
        return get_encoders("clip_synchformer", **tiny | changes).video.facts()

    sha256 = hashlib.sha256((tmp_path / "sync.pth").read_bytes()).hexdigest()
    named = {"clip_model_name": NAME, "encoder_dtype": "float32", "clip_pretrained": "first"}
    assert facts() == {**named, "synchformer_sha256": sha256}
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "sync.pth").write_bytes((tmp_path / "sync.pth").read_bytes())
    assert facts(synchformer_ckpt=str(tmp_path / "moved" / "sync.pth")) == facts()
    # Of the same size, under the same name.
    (tmp_path / "sync.pth").write_bytes(bytes((tmp_path / "sync.pth").stat().st_size))
    others = [
        facts(clip_pretrained="broken"),
        facts(clip_model_name="Small-224"),
        facts(dtype="bfloat16"),
        facts(),
    ]
    moved = facts(synchformer_ckpt=str(tmp_path / "moved" / "sync.pth"))
    assert all(each != moved for each in others)
    public = get_encoders("clip_synchformer", clip_model_name=NAME, clip_pretrained="first")
    assert public.video.facts()["synchformer_sha256"] == synchformer.PUBLIC.sha256

    (tmp_path / "mine.bin").write_bytes(b"mine")
    mine = facts(clip_pretrained=str(tmp_path / "mine.bin"))
    assert mine["clip_sha256"] == hashlib.sha256(b"mine").hexdigest()
    assert "clip_pretrained" not in mine
    stand_in.cached["someone/clip", "open_clip_pytorch_model.bin"] = str(tmp_path / "mine.bin")
    assert facts() == {**mine, "clip_pretrained": "first"}


def test_a_given_checkpoint_that_is_missing_is_refused_at_once():
    with pytest.raises(InputError, match="gone.pth: no such file, named by model.synchformer_ckpt"):
        get_encoders("clip_synchformer", synchformer_ckpt="gone.pth")


@pytest.fixture
def world(tmp_path):
    write_toy_world(tmp_path / "toy", 3, 3, heldout=0, seconds=1.0, workers=1)
    return tmp_path / "toy" / "train.csv"


def table(path: Path, **columns: str) -> Path:
    """The table with some columns the same in every row."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row | columns for row in csv.DictReader(file)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_extraction_by_a_configuration(tiny, world, tmp_path, monkeypatch):
    overrides = [f"model.{key}={value}" for key, value in tiny.items()]
    config = load_config(
        "toy_8k", [*overrides, "model.encoders=clip_synchformer", "data.audio_duration=1.0"]
    )
    both = table(world, caption="a bell rings", video_exist="1", text_exist="1")
    result = extract.extract(both, tmp_path / "out", config=config)
    assert (result.done, result.failed) == (3, 0)
    held = torch.load(next((tmp_path / "out/features").iterdir()), weights_only=True)
    shapes = {key: tuple(held[key].shape) for key in held if key.endswith("_features")}
    assert shapes == {
        "clip_features": (8, 6),
        "sync_features": (16, 48),
        "text_features": (77, 10),
    }
    assert held["source"]["video"]["clip_pretrained"] == "first"
    assert stand_in_made() == ["first"]
    assert extract.extract(both, tmp_path / "out", config=config).kept == 3
    model = replace(config.model, encoder_dtype="bfloat16")
    half = replace(config, model=model)
    with pytest.raises(InputError, match="json: video.encoder_dtype is float32, wanted b"):
        extract.extract(both, tmp_path / "out", config=half)
    changed = extract.extract(both, tmp_path / "out", config=half, overwrite=True)
    assert (changed.done, changed.kept) == (3, 0)


def test_fetched_weights_must_be_those_of_the_folder(tiny, stand_in, world, tmp_path, monkeypatch):
    """open_clip's weights have a name before they are there, and a SHA-256 from then on."""
    file, load = tmp_path / "model.bin", stand_in.create_model

    def fetch(content: bytes) -> None:
        """What the next loading of the weights leaves in the cache."""

        def create_model(name: str, pretrained: str) -> Model:
            file.write_bytes(content)
            stand_in.cached["someone/clip", "open_clip_pytorch_model.bin"] = str(file)
            return load(name, pretrained)

        monkeypatch.setattr(stand_in, "create_model", create_model)
        stand_in.cached.clear()
        encode._encoders.cache_clear()

    def run(table: Path) -> extract.ExtractResult:
        return extract.extract(table, tmp_path / "out", config=config)

    overrides = [f"model.{key}={value}" for key, value in tiny.items()]
    config = load_config(
        "toy_8k", [*overrides, "model.encoders=clip_synchformer", "data.audio_duration=1.0"]
    )
    captions = table(world, caption="a bell rings", video_exist="0", text_exist="1")
    fetch(b"one")
    assert run(captions).done == 3
    record = read_json(tmp_path / "out" / "features.json")
    assert record["text"]["clip_sha256"] == hashlib.sha256(b"one").hexdigest()
    fetch(b"two")
    assert run(captions).kept == 3 and not stand_in.cached  # nothing was to be encoded
    changed = table(world, caption="a drum")
    with pytest.raises(InputError, match="features.json: text.clip_sha256 is "):
        run(changed)
    fetch(b"one")
    assert run(changed).done == 3


class Turns:
    """Counts how many calls of the functions it wraps run at the same time."""

    def __init__(self) -> None:
        self._lock, self._inside, self.most = Lock(), 0, 0

    def wrap(self, function: Callable) -> Callable:
        def counted(*arguments, **options):
            with self._lock:
                self._inside += 1
                self.most = max(self.most, self._inside)
            time.sleep(0.005)  # for another to come in
            try:
                return function(*arguments, **options)
            finally:
                with self._lock:
                    self._inside -= 1

        return counted


def test_many_threads_load_once_and_encode_in_turns(tiny, stand_in, monkeypatch):
    encoders = get_encoders("clip_synchformer", device="cpu", **tiny)
    frames = clip_frames(0.64)

    def encode(kind: str) -> Tensor:
        if kind == "text":
            return encoders.text.encode(["a bell"])
        return torch.cat([part.flatten() for part in encoders.video.encode(frames, 0.64)])

    alone = {kind: encode(kind) for kind in ("text", "video")}
    encoders = get_encoders("clip_synchformer", device="cpu", **tiny)
    stand_in.made.clear()
    turns = Turns()
    for owner, name in (
        (stand_in, "create_model"),
        (Model, "forward_intermediates"),
        (ImageTower, "forward"),
        (synchformer, "load_synchformer"),
        (synchformer.Synchformer, "forward"),
    ):
        monkeypatch.setattr(owner, name, turns.wrap(getattr(owner, name)))
    kinds = ["text", "video"] * 8
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(encode, kinds))
    assert turns.most == 1 and len(stand_in.made) == 1
    assert all(torch.equal(found, alone[kind]) for found, kind in zip(rows, kinds, strict=True))


def stand_in_made() -> list[str]:
    return sys.modules["open_clip"].made


def test_captions_alone_load_no_synchformer_and_videos_alone_no_text(tiny, world, tmp_path):
    (tmp_path / "sync.pth").write_bytes(b"not weights")
    overrides = [f"model.{key}={value}" for key, value in tiny.items()]
    config = load_config("toy_8k", [*overrides, "data.audio_duration=1.0"])
    config = replace(config, model=replace(config.model, encoders="clip_synchformer"))
    captions = table(world, caption="a bell rings", video_exist="0", text_exist="1")
    assert extract.extract(captions, tmp_path / "text", config=config).done == 3
    encoders = load_encoders(config.model)
    assert "image_tower" not in vars(encoders.text._clip)

    videos = table(world, video_exist="1", text_exist="0")
    with pytest.raises(InputError, match="sync.pth: not a readable checkpoint"):
        extract.extract(videos, tmp_path / "video", config=config)
    assert not (tmp_path / "video" / "features").exists()
    torch.save(content(), tmp_path / "sync.pth")
    config = replace(config, model=replace(config.model, clip_pretrained="broken"))
    with pytest.raises(InputError, match="model.clip_pretrained broken"):
        extract.extract(videos, tmp_path / "video", config=config)
    (tmp_path / "mine.bin").write_bytes(b"")
    mine = replace(config.model, clip_pretrained=str(tmp_path / "mine.bin"))
    config = replace(config, model=mine)
    assert extract.extract(videos, tmp_path / "video", config=config).done == 3
    assert "text_tower" not in vars(load_encoders(config.model).text._clip)


def test_the_empty_caption_goes_the_way_of_captions(tiny):
    overrides = [f"model.{key}={value}" for key, value in tiny.items()]
    config = load_config(
        "toy_8k", [*overrides, "model.encoders=clip_synchformer", "data.text_dim=10"]
    )
    wanted = get_encoders("clip_synchformer", **tiny, device="cpu").text.encode([""])[0]
    assert torch.equal(empty_caption(config), wanted)


# The real open_clip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """open_clip with a tiny model of the public one's geometry, and a file of its weights."""
    try:
        import open_clip
    except Exception as error:
        pytest.skip(f"open_clip cannot be imported here: {error}")
    folder = tmp_path_factory.mktemp("clip")
    text = SIZES["text_cfg"] | {"width": 32}
    (folder / f"{NAME}.json").write_text(json.dumps(SIZES | {"text_cfg": text}))
    open_clip.add_model_config(folder / f"{NAME}.json")
    model = open_clip.create_model(NAME).eval()
    torch.save(model.state_dict(), folder / "weights.pth")
    return model, Clip(NAME, str(folder / "weights.pth"), "cpu")


@torch.no_grad()
def test_real_pictures(real, pictures):
    model, clip = real
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    whole = model.encode_image((pictures / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(clip.encode_pictures(pictures), whole, rtol=0, atol=2e-6)
    other = pictures.clone()
    other[..., 378:, :] = other[..., 378:] = 0
    assert torch.equal(clip.encode_pictures(other), clip.encode_pictures(pictures))


@torch.no_grad()
def test_real_captions(real):
    model, clip = real
    captions = ["Dog  barking", "", "word " * 100]
    states = model.token_embedding(clip._tokenizer(captions)) + model.positional_embedding
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
    rows = clip.encode_captions(captions)
    torch.testing.assert_close(rows, states / norms(states)[..., None], rtol=0, atol=2e-6)
    torch.testing.assert_close(rows[1:2], clip.encode_captions([""]), rtol=0, atol=2e-6)
    assert clip.encode_captions([]).shape == (0, 77, 32)


def test_real_tokens(real):
    _, clip = real
    tokens = clip._tokenizer(["", "dog barking", "Dog  barking", "word " * 100])
    assert tokens.shape == (4, 77) and tokens.dtype == torch.int64
    assert tokens[:2, :5].tolist() == [[49406, 49407, 0, 0, 0], [49406, 1929, 32676, 49407, 0]]
    assert torch.equal(tokens[1], tokens[2]) and tokens[3, -1] == 49407


def test_real_errors_are_one_line(real, tmp_path):
    model, _ = real
    state = model.state_dict()
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(InputError, match=r"less.pth: no weights of Test-378.*ln_final.weight"):
        Clip(NAME, str(tmp_path / "less.pth"), "cpu").encode_captions([""])
    torch.save({"logit_scale": Payload(tmp_path / "ran")}, tmp_path / "payload.pth")
    with pytest.raises(InputError, match="payload.pth: no weights of Test-378 .Unpickling"):
        Clip(NAME, str(tmp_path / "payload.pth"), "cpu").encode_captions([""])
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="open_clip's weights of ViT-H-14-378-quickgelu are dfn5b"):
        Clip("ViT-H-14-378-quickgelu", "dfn", "cpu").encode_captions([""])
    with pytest.raises(InputError, match="'ViT-B-32', which sees 224 pixels in patches of 32"):
        Clip("ViT-B-32", "openai", "cpu").encode_captions([""])
