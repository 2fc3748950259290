"""WavFlow's configuration: its sections `model` and `data`, the sizes of its network by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from wavflow.base.names import ROPE_SCALINGS
from wavflow.base.seconds import exact
from wavflow.config.schema import Config, DataConfig, EncodersConfig, ModelConfig, one_of, over
from wavflow.data.tracks import Even, Segments, Track

if TYPE_CHECKING:
    from wavflow_kernels import AttentionWindow

#: Keys of a features file, by what the table says is there.
VIDEO_KEYS = ("clip_features", "sync_features")
TEXT_KEYS = ("text_features",)

# One segment of sync features is 8 tokens; their positions inside it have a learned embedding.
SYNC_SEGMENT = 8
# It is made from 16 frames at 25 a second; the next one begins 8 frames on.
SYNC_STEP = Fraction(8, 25)


@dataclass(frozen=True)
class WavflowModelConfig(EncodersConfig, ModelConfig):
    """The network, the encoders whose features it hears, and the weights to generate from.

    A size left at null is the named preset's.

    Attributes:
        name: Preset of the network: `medium_16k`, `medium_44k`, `large_16k`, `large_44k` or
            `toy_8k`.
        hidden_dim: Channels of a token inside the network, a multiple of 2 x `num_heads`.
        depth: Blocks in all, joint and fused.
        fused_depth: How many of the blocks, the last ones, see the audio tokens alone; less than
            `depth`.
        num_heads: Attention heads.
        mlp_ratio: Nominal width of a block's feed-forward over `hidden_dim`. The inner width is two
            thirds of it, rounded up to a multiple of 256.
        attention_window: How many seconds away a token of sound or video may be to be attended to;
            null for any distance. Text tokens see, and are seen by, all.
        rope_scaling: Rotary positions in clips longer than those of the training: go on with them
            (`none`), squeeze them into the trained range (`linear`), or raise the base of the
            frequencies (`ntk`).
        empty_string_ckpt: File with the features of the empty caption; null asks the encoder.
    """

    name: str = "medium_16k"
    hidden_dim: int | None = over(None, 0)
    depth: int | None = over(None, 0)
    fused_depth: int | None = over(None, 0, equal=True)
    num_heads: int | None = over(None, 0)
    mlp_ratio: float | None = over(None, 0)
    attention_window: float | None = over(None, 0)
    rope_scaling: str = one_of(*ROPE_SCALINGS)
    empty_string_ckpt: str | None = None


@dataclass(frozen=True)
class WavflowDataConfig(DataConfig):
    """The table of clips, for training or for generation, and the sizes of a clip's data.

    Attributes:
        audio_scale: Factor from samples in [-1, 1] to what the network sees.
        audio_dim: Samples of a token.
        clip_seq_len: Rows of clip features (what is seen) in a clip.
        clip_dim: Width of a clip row.
        sync_seq_len: Rows of sync features (when it moves) in a clip.
        sync_dim: Width of a sync row.
        sync_layout: What a sync row stands for: a part of one of Synchformer's overlapping
            segments of 8 rows (`segments`), or an even stretch of time (`even`).
        text_seq_len: Rows of text features of a caption.
        text_dim: Width of a text row.
    """

    PACK_KEYS: ClassVar[tuple[str, ...]] = (
        *DataConfig.PACK_KEYS,
        "clip_seq_len",
        "clip_dim",
        "sync_seq_len",
        "sync_dim",
        "sync_layout",
        "text_seq_len",
        "text_dim",
    )
    TRAINED_KEYS: ClassVar[tuple[str, ...]] = (
        *DataConfig.TRAINED_KEYS,
        "audio_dim",
        "audio_scale",
    )

    audio_scale: float = over(3.0, 0)
    audio_dim: int = over(200, 0)
    clip_seq_len: int = over(64, 0)
    clip_dim: int = over(1024, 0)
    sync_seq_len: int = over(192, 0)
    sync_dim: int = over(768, 0)
    sync_layout: str = one_of("segments", "even")
    text_seq_len: int = over(77, 0)
    text_dim: int = over(1024, 0)

    @property
    def latent_seq_len(self) -> int:
        """Tokens in one clip, ceil(samples / audio_dim)."""
        return math.ceil(self.samples / self.audio_dim)

    @property
    def read_samples(self) -> int:
        """Samples that are read of one clip: those of its tokens."""
        return self.latent_seq_len * self.audio_dim

    @property
    def tracks(self) -> tuple[Track, ...]:
        """The tracks of a clip: appearance and motion of its video, and its caption."""
        duration = exact(self.audio_duration)
        even = self.sync_layout == "even"
        clip = Even(self.clip_seq_len / duration)
        sync = Even(self.sync_seq_len / duration) if even else Segments(SYNC_SEGMENT, SYNC_STEP)
        clip_key, sync_key, text_key = *VIDEO_KEYS, *TEXT_KEYS
        return (
            Track(clip_key, self.clip_seq_len, self.clip_dim, "video", clip, "data.clip_seq_len"),
            Track(sync_key, self.sync_seq_len, self.sync_dim, "video", sync, "data.sync_seq_len"),
            Track(text_key, self.text_seq_len, self.text_dim, "text"),
        )

    @property
    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (rows, width) of each feature of a clip, by its key in a features file."""
        return {track.key: track.shape for track in self.tracks}


#: A whole configuration of WavFlow.
RunConfig: TypeAlias = Config[WavflowModelConfig, WavflowDataConfig]


@dataclass(frozen=True)
class WavflowConfig:
    """Sizes of a network. Sequence lengths are those of one clip; ``latent_dim`` is in samples.

    ``attention_window`` is how many audio tokens away a token may be to be seen, None: any number.
    Clip tokens have places among the audio tokens; text tokens see and are seen by all, so that
    what they hear is of the whole clip. ``rope_scaling`` says how positions go on in clips longer
    than in training (:func:`wavflow.layers.embeddings.rope_scale`).

    Raises:
        ValueError: sizes that do not fit together, or one out of range.
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
        """Channels of an attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def joint_depth(self) -> int:
        """How many of the blocks are joint."""
        return self.depth - self.fused_depth

    @property
    def ffn_width(self) -> int:
        """Nominal width of the blocks' feed-forwards."""
        return int(self.mlp_ratio * self.hidden_dim)

    @property
    def window(self) -> AttentionWindow | None:
        """What audio, clip and text tokens see in the joint attention; None: all of it."""
        if self.attention_window is None or self.attention_window >= self.latent_seq_len:
            return None
        from wavflow_kernels import AttentionWindow

        return AttentionWindow(self.attention_window, self.latent_seq_len, self.clip_seq_len)


#: The sizes of the networks that have a name.
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
