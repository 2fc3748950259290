"""The visual branch of Synchformer: what happens in a video, and when, eight rows per 0.64 s.

A vision transformer with attention divided in time and space (Bertasius et al., "Is Space-Time
Attention All You Need for Video Understanding?", arXiv 2102.05095) on segments of 16 frames, whose
tokens one more layer gathers place by place (Iashin et al., "Synchformer", arXiv 2401.16423).

A clip's segments begin 8 frames after each other, half a segment: rows 4 to 7 of a segment and 0 to
3 of the next see the same frames, and time does not grow along rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wavflow_kernels as wk
from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, locked
from wavflow.features.weights import WeightFile, cache_dir, fetch, given_file
from wavflow.layers.token_layers import TokenLinear
from wavflow.media.video import FrameStream

#: The frames that Synchformer wants.
SYNC_STREAM = FrameStream(25, 224, "crop")

if TYPE_CHECKING:
    pass

FRAMES, STRIDE = 16, 8  # of a segment and from one to the next, at 25 frames a second
TUBELET, PATCH, SIZE = 2, 16, 224  # frames and pixels of a token; pixels of a picture
ROWS, PLACES = FRAMES // TUBELET, (SIZE // PATCH) ** 2
EPS = 1e-6

PUBLIC = WeightFile(
    name="synchformer_state_dict.pth",
    url="https://huggingface.co/hkchengrex/MMAudio/resolve/main/ext_weights/synchformer_state_dict.pth",
    size=950_058_171,
    sha256="8aff082f2df5c3bc52759db0c865c7ee772ae6400b860d1b7e90413f2defb67c",
)
PREFIX = "vfeat_extractor."
# Left out of the public file: the audio branch, the synchronisation head, and a projection of
# single pictures that the visual branch holds and never uses.
OTHER_PARTS = ("afeat_extractor.", "vproj.", "aproj.", "transformer.")
UNUSED = "patch_embed.proj."


@dataclass(frozen=True)
class SynchformerConfig:
    """Sizes of the network: channels of a token, blocks, attention heads."""

    dim: int = 768
    depth: int = 12
    num_heads: int = 12

    @property
    def mlp_dim(self) -> int:
        return 4 * self.dim


def segments(frames: int) -> int:
    """Number of segments in a clip of that many frames."""
    return max(0, (frames - FRAMES) // STRIDE + 1)


def normalize(frames: Tensor) -> Tensor:  # (... 3 h w) uint8 -> float32
    """Maps uint8 pixels to [-1, 1]."""
    return frames.float().div_(255).sub_(0.5).div_(0.5)


class Linear(TokenLinear):
    """A linear layer on (b n c) that computes in its weight's dtype, whatever the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Tubelets(nn.Module):
    """Turns two frames' patches into tokens. A matrix product: libraries' Conv3d takes longer."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        size = (TUBELET, PATCH, PATCH)
        self.proj = nn.Conv3d(3, config.dim, size, stride=size)

    def forward(self, frames: Tensor) -> Tensor:  # b t 3 h w -> b t/2 p c
        x = frames.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(1, (-1, TUBELET))
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).to(self.proj.weight.dtype)
        tokens = wk.conv1d(x.flatten(1, 3), self.proj.weight.flatten(1), self.proj.bias)
        return tokens.unflatten(1, (x.shape[1], -1))


class DividedAttention(nn.Module):
    """Attention among the tokens of a group and the class token; that one attends to all.

    A group is what has one place (`over` "time") or one time ("space").
    """

    def __init__(self, config: SynchformerConfig, over: str) -> None:
        super().__init__()
        self.heads, self.over = config.num_heads, over
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.proj = Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:  # b 1+tp c, the patches time by time
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # b 1+tp 3 h d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # b h 1+tp d
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2)

        patches = self._swap(qkv[:, 1:].unflatten(1, (ROWS, -1)))  # b g m 3 h d
        shared = qkv[:, None, :1].expand(-1, patches.shape[1], -1, -1, -1, -1)
        groups = torch.cat([shared, patches], dim=2).flatten(0, 1)  # bg 1+m 3 h d
        q, k, v = groups.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q[:, :, 1:], k, v).transpose(1, 2).flatten(2)
        out = self._swap(out.unflatten(0, (len(x), -1))).flatten(1, 2)  # b tp c
        return self.proj(torch.cat([first, out], dim=1))

    def _swap(self, x: Tensor) -> Tensor:
        """(b t p ...) to groups (b g m ...), and back."""
        return x.transpose(1, 2) if self.over == "time" else x


class Mlp(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block: attention over time, then over space, then the MLP."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim, EPS) for _ in range(3))
        self.timeattn = DividedAttention(config, "time")
        self.attn = DividedAttention(config, "space")
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.timeattn(self.norm3(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SpatialAggregator(nn.Module):
    """A transformer layer of which only the class token's row is wanted, so only that is computed.

    The parameters are those of ``nn.TransformerEncoderLayer``.
    """

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.self_attn = nn.MultiheadAttention(config.dim, config.num_heads, batch_first=True)
        self.linear1 = Linear(config.dim, config.mlp_dim)
        self.linear2 = Linear(config.mlp_dim, config.dim)
        self.norm1, self.norm2 = (nn.LayerNorm(config.dim, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # b p c -> b c
        cls = self.cls_token.expand(len(x), -1, -1)
        keys = self.norm1(torch.cat([cls, x], dim=1)).to(self.self_attn.in_proj_weight.dtype)
        cls = cls + self.self_attn(keys[:, :1], keys, keys, need_weights=False)[0]
        return (cls + self.linear2(F.gelu(self.linear1(self.norm2(cls)))))[:, 0]


class Synchformer(nn.Module):
    """The visual branch: turns pixels (b t 3 224 224) in [-1, 1] into rows (b 8s c).

    t >= 16 frames have s = (t - 16) // 8 + 1 segments. Rows are float32 unless the parameters are
    float64; the state dict's names are the public ones.
    """

    def __init__(self, config: SynchformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SynchformerConfig()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PLACES, config.dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, ROWS, config.dim))
        self.patch_embed_3d = Tubelets(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, EPS)
        self.spatial_attn_agg = SpatialAggregator(config)

    def compute_in(self, dtype: torch.dtype) -> Synchformer:
        """Sets the dtype of matrix products; norms, residuals and positions stay as they are."""
        for module in self.modules():
            if isinstance(module, (Linear, nn.MultiheadAttention, nn.Conv3d)):
                module.to(dtype)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        batch, count = len(frames), segments(frames.shape[1])
        x = self._tokens(frames[:, : STRIDE * (count - 1) + FRAMES])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 1:]).unflatten(1, (ROWS, PLACES)).flatten(0, 1)  # bst p c
        return self.spatial_attn_agg(x).unflatten(0, (batch, count * ROWS))

    def _tokens(self, frames: Tensor) -> Tensor:  # b t 3 h w -> bs 1+tp c
        """Segments' tokens with positions. Two segments share a tubelet: it is embedded once."""
        x = self.patch_embed_3d(frames)  # b t p c
        x = x.unfold(1, ROWS, STRIDE // TUBELET).flatten(0, 1).permute(0, 3, 1, 2)  # bs t p c
        x = x + (self.temp_embed[:, :, None] + self.pos_embed[:, None, 1:])
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, x.flatten(1, 2)], dim=1)


def load_synchformer(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Synchformer:
    """The network with the weights of a file, for inference.

    Args:
        path: the public file, or what :func:`convert` made of it.
        device: where the network computes.
        dtype: dtype of matrix products.

    Raises:
        InputError: missing or unreadable file; a missing or foreign tensor, or one of another
            shape, by name.
    """
    with torch.device("meta"):
        model = Synchformer()
    model.to_empty(device="cpu")
    state_dict.load_into(model, visual_state(_read(path), path), path)
    return model.compute_in(dtype).to(device).eval().requires_grad_(False)


def visual_state(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a public file's `content` that the visual branch uses, by its names.

    Raises:
        InputError: a name that is of no part of Synchformer; `path` is named.
    """
    state = {}
    for name, value in content.items():
        name = str(name)
        if name.startswith(PREFIX):
            state[name.removeprefix(PREFIX)] = value
        elif not name.startswith(OTHER_PARTS):
            raise InputError(f"{path}: it has foreign {name}; wanted Synchformer's {PREFIX}*")
    return {name: value for name, value in state.items() if not name.startswith(UNUSED)}


def weights_path(given: str | None = None) -> Path:
    """The file of the weights: `given`, else the converted public one, fetched at its first use.

    Raises:
        InputError: `given` does not exist; or as `wavflow.features.weights.fetch`.
    """
    if given is not None:
        return given_file(given, "model.synchformer_ckpt")
    converted = cache_dir() / "synchformer_visual.safetensors"
    if not converted.is_file():
        with locked(converted):
            if not converted.is_file():
                convert(fetch(PUBLIC), converted)
    return converted


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes what the visual branch uses of the public file `source` to `target`, safetensors.

    Raises:
        InputError: as :func:`load_synchformer` raises.
    """
    from safetensors.torch import save

    state = visual_state(_read(source), source)
    with torch.device("meta"):
        state_dict.check_fit(Synchformer(), state, source)
    with atomic_write(target) as file:
        file.write(save({PREFIX + name: value.contiguous() for name, value in state.items()}))


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if Path(path).suffix != ".safetensors":
        return state_dict.load(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from None
