"""CLIP's image and text features, by open_clip (the extra `wavflow[clip]`).

One model gives both. Pictures are what a `squash` to 384 pixels leaves, of which a model for 378
sees the top left; text features are all 77 token states behind the last norm, without pooling and
projection. Every row has length 1.
"""

from __future__ import annotations

import difflib
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wavflow.base.errors import InputError
from wavflow.base.precision import resolve_device, resolve_dtype
from wavflow.features.encoder import TEXT_LENGTH
from wavflow.features.weights import identity, offline
from wavflow.media.video import FrameStream

#: The frames that CLIP wants.
CLIP_STREAM = FrameStream(8, 384, "squash")

if TYPE_CHECKING:
    pass

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def import_open_clip() -> ModuleType:
    """Imports open_clip.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise InputError(f"CLIP needs open_clip ({error}): pip install 'wavflow[clip]'") from None
    except Exception as error:  # a torchvision for another torch raises what it likes
        raise InputError(
            f"CLIP needs open_clip, which cannot be imported ({type(error).__name__}: {error})"
        ) from None
    return open_clip


def model_sizes(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model.

    Raises:
        InputError: no open_clip, an unknown model, or one whose patches are not those of
            384 pixels or that does not read 77 tokens.
    """
    open_clip = import_open_clip()
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 1, 0.0)[0]
        raise InputError(
            f"model.clip_model_name is {name!r}, unknown to open_clip; did you mean {near}?"
        )
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    size, patch = vision.get("image_size"), vision.get("patch_size")
    square = isinstance(size, int) and isinstance(patch, int)
    if not square or size // patch != CLIP_STREAM.size // patch:
        raise InputError(
            f"model.clip_model_name is {name!r}, which sees {size} pixels in patches of {patch}; "
            f"wanted as many patches as {CLIP_STREAM.size} pixels have"
        )
    if "width" not in text or text.get("context_length", TEXT_LENGTH) != TEXT_LENGTH:
        raise InputError(
            f"model.clip_model_name is {name!r}, whose text tower is {text}; "
            f"wanted a transformer of {TEXT_LENGTH} tokens"
        )
    return config


class _Unfilled(TorchFunctionMode):
    """Leaves out random initial weights: a billion of them cost 17 s, and all are then loaded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        initial = func in (Tensor.normal_, Tensor.uniform_)
        if initial or getattr(func, "__module__", None) == "torch.nn.init":
            return given[0]
        return func(*args, **(kwargs or {}))


class Clip:
    """A CLIP model that loads its weights when they are first needed.

    Args:
        model_name: open_clip's name of an architecture.
        pretrained: open_clip's name of its weights, or a file of them.
        device: where the towers compute; each is moved there at its own first use.
        dtype: "float32", or "bfloat16" for autocast.
        batch: number of pictures that are encoded at a time.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: str,
        device: torch.device | str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        self.model_name, self.pretrained = model_name, pretrained
        self.batch = batch
        self._where, self._dtype = device, dtype

    def facts(self) -> dict[str, Any]:
        """What features depend on: the model, its weights and the dtype.

        Weights are known by their SHA-256, where they are a file or have been fetched from Hugging
        Face, and open_clip's by their name too.
        """
        facts = {"clip_model_name": self.model_name, "encoder_dtype": self._dtype}
        weights: Path | None = Path(self.pretrained)
        if import_open_clip().is_pretrained_cfg(self.model_name, self.pretrained):
            facts["clip_pretrained"] = self.pretrained
            weights = self._cached()
        if weights is not None and weights.is_file():
            facts["clip_sha256"] = identity(weights)
        return facts

    @property
    def image_dim(self) -> int:
        return model_sizes(self.model_name)["embed_dim"]

    @property
    def text_dim(self) -> int:
        return model_sizes(self.model_name)["text_cfg"]["width"]

    @cached_property
    def image_tower(self) -> nn.Module:
        """The network that turns pixels (b 3 s s) into features (b image_dim).

        Raises:
            InputError: weights that cannot be had or do not fit; as `model_sizes`.
        """
        return self._towers[0].to(self.device)

    @cached_property
    def text_tower(self) -> nn.Module:
        """The CLIP model without its image tower; raises as `image_tower`."""
        return self._towers[1].to(self.device)

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self._where)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Encodes pictures (t 3 384 384) uint8 to (t image_dim) float32 on the CPU."""
        vision = model_sizes(self.model_name)["vision_cfg"]
        seen = vision["image_size"] // vision["patch_size"] * vision["patch_size"]
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (MEAN, STD))
        rows = []
        for some in pictures[..., :seen, :seen].split(self.batch):
            pixels = some.to(self.device).float().div_(255).sub_(mean).div_(std)
            with self._autocast():
                rows.append(F.normalize(self.image_tower(pixels).float(), dim=-1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Encodes b captions to (b 77 text_dim) float32 on the CPU."""
        if isinstance(captions, str):
            raise TypeError("captions is a str, wanted a list of str")
        tokens = self._tokenizer(captions).to(self.device)
        with self._autocast():
            tower: Any = self.text_tower
            states = tower.forward_intermediates(
                text=tokens, text_indices=1, normalize_intermediates=True, intermediates_only=True
            )["text_intermediates"][-1]
        return F.normalize(states.float(), dim=-1).cpu()

    @cached_property
    def _tokenizer(self) -> Any:
        return import_open_clip().get_tokenizer(self.model_name)

    @cached_property
    def _towers(self) -> tuple[nn.Module, nn.Module]:
        """The image tower and what is left of the model, both on the CPU."""
        model_sizes(self.model_name)
        weights = self._weights()
        try:
            with _Unfilled():
                model = import_open_clip().create_model(self.model_name, pretrained=weights)
        except Exception as error:  # of the network, of torch.load, of load_state_dict
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"model.clip_pretrained {weights}: no weights of {self.model_name} "
                f"({type(error).__name__}: {reason})"
            ) from None
        model.eval().requires_grad_(False)
        image_tower, model.visual = model.visual, None
        return image_tower, model

    def _weights(self) -> str:
        """What open_clip is asked for: a name of weights, or a file."""
        open_clip, given = import_open_clip(), self.pretrained
        if not open_clip.is_pretrained_cfg(self.model_name, given):
            if Path(given).is_file():
                return given
            names = ", ".join(open_clip.list_pretrained_tags_by_model(self.model_name)) or "none"
            raise InputError(
                f"model.clip_pretrained is {given!r}: no such file, and open_clip's weights of "
                f"{self.model_name} are {names}"
            )
        if not offline():
            return given
        if (path := self._cached()) is None:
            raise InputError(
                f"{self.model_name} {given}: not in Hugging Face's cache, and WAVFLOW_OFFLINE=1 "
                "forbids to fetch it; model.clip_pretrained may name a file"
            )
        return str(path)

    def _cached(self) -> Path | None:
        """The file of open_clip's weights in Hugging Face's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        known = import_open_clip().get_pretrained_cfg(self.model_name, self.pretrained)
        repository, _, name = known.get("hf_hub", "").rpartition("/")
        for file in ((name,) if name else HUB_FILES) if repository else ():
            path = try_to_load_from_cache(repository, file)
            if isinstance(path, str):
                return Path(path)
        return None

    def _autocast(self) -> torch.autocast:
        dtype = resolve_dtype(self._dtype, self.device)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
