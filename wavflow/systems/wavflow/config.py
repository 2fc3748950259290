"""Sizes of WavFlow's network, and the named ones."""

from __future__ import annotations

from dataclasses import dataclass

from wavflow.layers.embeddings import ROPE_SCALINGS
from wavflow_kernels import Window

# One segment of sync features is 8 tokens; their positions inside it have a learned embedding.
SYNC_SEGMENT = 8


@dataclass(frozen=True)
class WavflowConfig:
    """Sizes of a network. Sequence lengths are those of one clip; ``latent_dim`` is in samples.

    ``attention_window`` is how many audio tokens away a token may be to be seen, None: any number.
    Clip tokens have places among the audio tokens; text tokens see and are seen by all, so that
    what they hear is of the whole clip. ``rope_scaling`` is of clips longer than in training
    (:func:`wavflow.layers.embeddings.rope_scale`).
    """

    latent_dim: int = 200
    clip_dim: int = 1024
    sync_dim: int = 768
    text_dim: int = 1024
    hidden_dim: int = 896
    depth: int = 12
    fused_depth: int = 8
    num_heads: int = 14
    mlp_ratio: float = 4.0
    latent_seq_len: int = 640
    clip_seq_len: int = 64
    sync_seq_len: int = 192
    text_seq_len: int = 77
    attention_window: int | None = None
    rope_scaling: str = "none"

    def __post_init__(self) -> None:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}, wanted a multiple of 2 * num_heads "
                f"= {2 * self.num_heads}"
            )
        if not 0 <= self.fused_depth < self.depth:
            raise ValueError(f"fused_depth is {self.fused_depth}, wanted 0 to {self.depth - 1}")
        for name in ("latent_seq_len", "clip_seq_len", "sync_seq_len", "text_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.sync_seq_len % SYNC_SEGMENT:
            raise ValueError(
                f"sync_seq_len is {self.sync_seq_len}, wanted a multiple of {SYNC_SEGMENT}"
            )
        if self.attention_window is not None and self.attention_window < 0:
            raise ValueError(f"attention_window is {self.attention_window}, wanted at least 0")
        if self.rope_scaling not in ROPE_SCALINGS:
            raise ValueError(
                f"rope_scaling is {self.rope_scaling!r}, wanted one of {', '.join(ROPE_SCALINGS)}"
            )
        if self.rope_scaling == "ntk" and self.head_dim <= 2:
            raise ValueError("rope_scaling 'ntk' wants heads of more than 2 channels")

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def joint_depth(self) -> int:
        return self.depth - self.fused_depth

    @property
    def ffn_width(self) -> int:
        """The asked width of the blocks' feed-forwards."""
        return int(self.mlp_ratio * self.hidden_dim)

    @property
    def window(self) -> Window | None:
        """What audio, clip and text tokens see in the joint attention; None: all of it."""
        if self.attention_window is None or self.attention_window >= self.latent_seq_len:
            return None
        return Window(self.attention_window, self.latent_seq_len, self.clip_seq_len)


PRESETS: dict[str, WavflowConfig] = {
    "medium_16k": WavflowConfig(),
    "medium_44k": WavflowConfig(latent_seq_len=1764),
    "large_16k": WavflowConfig(depth=21, fused_depth=14),
    "large_44k": WavflowConfig(depth=21, fused_depth=14, latent_seq_len=1764),
    # 2 s at 8 kHz, with the embedded encoders' features.
    "toy_8k": WavflowConfig(
        latent_dim=80,
        clip_dim=64,
        sync_dim=4,
        text_dim=64,
        hidden_dim=96,
        depth=4,
        fused_depth=2,
        num_heads=2,
        latent_seq_len=200,
        clip_seq_len=16,
        sync_seq_len=48,
    ),
}
