"""WavFlow's network (arXiv 2605.18749): a multimodal diffusion transformer on waveform tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavflow.model.blocks import (
    Conditioning,
    FinalLayer,
    JointBlock,
    Stream,
    SwiGLU,
    TokenConv,
    TokenLinear,
    TransformerBlock,
)
from wavflow.model.embeddings import ROPE_SCALINGS, TimestepEmbedding, rope_scale
from wavflow.model.inference import PreparedNetwork, Preparing
from wavflow.model.shapes import check_shape
from wavflow.model.sharing import Sharing
from wavflow_kernels import AttentionWindow, TokenRows, rope_table

# One segment of sync features is 8 tokens; their positions inside it have a learned embedding.
SYNC_SEGMENT = 8
# Older checkpoints store these tables; they are computed here.
IGNORED_KEYS = frozenset({"t_embed.freqs", "latent_rot", "clip_rot"})


@dataclass(frozen=True)
class WavflowConfig:
    """Sizes of a network. Sequence lengths are those of one clip; ``latent_dim`` is in samples.

    ``attention_window`` is how many audio tokens away a token may be to be seen, None: any number.
    Clip tokens have places among the audio tokens; text tokens see and are seen by all, so that
    what they hear is of the whole clip. ``rope_scaling`` is of clips longer than in training
    (:func:`wavflow.model.embeddings.rope_scale`).
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
    def window(self) -> AttentionWindow | None:
        """What audio, clip and text tokens see in the joint attention; None: all of it."""
        if self.attention_window is None or self.attention_window >= self.latent_seq_len:
            return None
        return AttentionWindow(self.attention_window, self.latent_seq_len, self.clip_seq_len)


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


@dataclass(frozen=True)
class Conditions:
    """Projected features of b clips: what the network needs of them at every step.

    Made without gradients they also keep a copy of the network's weights as inference wants them,
    from the first step that uses them and while they live: steps with the same conditions do not
    see later changes. There is none in float64, nor off the CPU in the weights' own dtype.
    """

    clip_f: Tensor  # (b n_clip c)
    text_f: Tensor  # (b n_text c)
    clip_f_c: Tensor  # (b c), projected mean over the clip tokens
    text_f_c: Tensor  # (b c), projected mean over the text tokens
    sync_rows: Tensor  # (b n_sync c), before upsampling
    sync_tokens: TokenRows  # the sync row of each audio token
    rope: Tensor  # (n + n_clip + n_text, head_dim), rotations of the joint attention's tokens
    rope_scaling: str = "none"  # of these rotations
    window: AttentionWindow | None = None  # of the joint attention
    prepared: PreparedNetwork | None = None

    @property
    def sync_f(self) -> Tensor:  # (b n c)
        """The sync features, upsampled to the audio tokens."""
        return self.sync_rows.index_select(1, self.sync_tokens.index)

    def expand(self, batch: int) -> Conditions:
        """One clip's conditions repeated ``batch`` times, as views."""
        return self._map(lambda f: f.expand(batch, *f.shape[1:]))

    def cat(self, *others: Conditions) -> Conditions:
        """The clips of all, which have the same token counts."""
        return self._map(lambda *all: torch.cat(all), *others)

    def split(self) -> list[Conditions]:
        """Those of each clip."""
        return [self._map(lambda f, i=i: f[i : i + 1]) for i in range(len(self.clip_f))]

    def _map(self, function: Callable[..., Tensor], *others: Conditions) -> Conditions:
        shared = ("sync_tokens", "rope", "rope_scaling", "window", "prepared")
        per_clip = [f.name for f in fields(self) if f.name not in shared]
        sources = (self, *others)
        made: dict[str, Any] = {
            name: function(*(getattr(s, name) for s in sources)) for name in per_clip
        }
        return replace(self, **made)


class WavflowModel(Preparing):
    """Predicts clean waveform tokens (or velocities) from noisy ones and video and text features.

    With b clips, n audio tokens of d samples and hidden width c: latent (b n d), clip features
    (b n_clip clip_dim), sync features (b n_sync sync_dim), text features (b n_text text_dim) and
    timesteps t (b) in [0, 1], 0 being noise. A tensor of another shape raises a ValueError naming
    the argument, its shape and the wanted one.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        clip_dim: int,
        sync_dim: int,
        text_dim: int,
        hidden_dim: int,
        depth: int,
        fused_depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        latent_seq_len: int,
        clip_seq_len: int,
        sync_seq_len: int,
        text_seq_len: int = 77,
        attention_window: int | None = None,
        rope_scaling: str = "none",
        empty_string_feat: Tensor | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config = WavflowConfig(
            latent_dim=latent_dim,
            clip_dim=clip_dim,
            sync_dim=sync_dim,
            text_dim=text_dim,
            hidden_dim=hidden_dim,
            depth=depth,
            fused_depth=fused_depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            latent_seq_len=latent_seq_len,
            clip_seq_len=clip_seq_len,
            sync_seq_len=sync_seq_len,
            text_seq_len=text_seq_len,
            attention_window=attention_window,
            rope_scaling=rope_scaling,
        )
        self.latent_dim = latent_dim
        self.trained_seq_len = latent_seq_len
        self.gradient_checkpointing = gradient_checkpointing
        dim = hidden_dim

        if empty_string_feat is None:
            empty_string_feat = torch.zeros(text_seq_len, text_dim)
        check_shape("empty_string_feat", empty_string_feat, (text_seq_len, text_dim))
        self.sync_pos_emb = nn.Parameter(torch.zeros(1, 1, SYNC_SEGMENT, sync_dim))
        self.empty_string_feat = nn.Parameter(
            empty_string_feat.detach().clone(), requires_grad=False
        )
        self.empty_clip_feat = nn.Parameter(torch.zeros(1, clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.zeros(1, sync_dim))

        # The order of registration is the order of the checkpoints' optimiser states.
        self.audio_input_proj = nn.Sequential(
            TokenConv(latent_dim, dim, 7, activation="selu"),
            nn.Identity(),
            SwiGLU(dim, 4 * dim, 7),
        )
        self.clip_input_proj = nn.Sequential(TokenLinear(clip_dim, dim), SwiGLU(dim, 4 * dim, 3))
        self.sync_input_proj = nn.Sequential(
            TokenConv(sync_dim, dim, 7, activation="selu"),
            nn.Identity(),
            SwiGLU(dim, 4 * dim, 3),
        )
        self.text_input_proj = nn.Sequential(TokenLinear(text_dim, dim), SwiGLU(dim, 4 * dim))
        self.clip_cond_proj = nn.Linear(dim, dim)
        self.text_cond_proj = nn.Linear(dim, dim)
        self.global_cond_mlp = SwiGLU(dim, 4 * dim)
        self.final_layer = FinalLayer(dim, latent_dim)
        self.t_embed = TimestepEmbedding(dim)
        joint = [
            JointBlock(dim, num_heads, config.ffn_width, pre_only=i == config.joint_depth - 1)
            for i in range(config.joint_depth)
        ]
        self.joint_blocks = nn.ModuleList(joint)
        self.fused_blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, config.ffn_width, kernel_size=3)
            for _ in range(fused_depth)
        )
        # Who computes which audio tokens.
        self.sharing = Sharing()
        audio = [self.audio_input_proj, self.fused_blocks, self.final_layer]
        for part in (*audio, *(block.latent_block for block in joint)):
            for module in part.modules():
                if isinstance(module, (TokenConv, SwiGLU, TransformerBlock)):
                    module.sharing = self.sharing
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("t_embed."):
                    nn.init.normal_(module.weight, std=0.02)
                elif "adaLN_modulation" in name:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.final_layer.conv.parameters():
            nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.empty_clip_feat.device

    @property
    def latent_seq_len(self) -> int:
        return self.config.latent_seq_len

    @property
    def clip_seq_len(self) -> int:
        return self.config.clip_seq_len

    @property
    def sync_seq_len(self) -> int:
        return self.config.sync_seq_len

    def update_seq_lengths(self, latent_seq_len: int, clip_seq_len: int, sync_seq_len: int) -> None:
        """Sets the token counts of the clips to come; conditions made before no longer fit."""
        self.config = replace(
            self.config,
            latent_seq_len=latent_seq_len,
            clip_seq_len=clip_seq_len,
            sync_seq_len=sync_seq_len,
        )

    def update_attention(self, attention_window: int | None, rope_scaling: str) -> None:
        """Sets what tokens see and how longer clips are rotated; earlier conditions do not fit."""
        self.config = replace(
            self.config, attention_window=attention_window, rope_scaling=rope_scaling
        )

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads a whole state dict; what is missing, unknown or misshapen raises a ValueError."""
        given = {name: value for name, value in state_dict.items() if name not in IGNORED_KEYS}
        wanted = self.state_dict()
        problems = [f"{name} is missing" for name in wanted if name not in given]
        problems += [f"{name} is unknown" for name in given if name not in wanted]
        problems += [
            f"{name} has shape {tuple(value.shape)}, wanted {tuple(wanted[name].shape)}"
            for name, value in given.items()
            if name in wanted and value.shape != wanted[name].shape
        ]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(f"the state dict does not fit the model: {problems[0]}{more}")
        self.load_state_dict(given)

    # Features -> conditions, once per clip.

    def preprocess_conditions(self, clip_f: Tensor, sync_f: Tensor, text_f: Tensor) -> Conditions:
        """Projects raw features (b n_clip clip_dim), (b n_sync sync_dim), (b n_text text_dim)."""
        config = self.config
        check_shape("clip_f", clip_f, ("batch", config.clip_seq_len, config.clip_dim))
        batch = clip_f.shape[0]
        check_shape("sync_f", sync_f, (batch, config.sync_seq_len, config.sync_dim))
        check_shape("text_f", text_f, (batch, config.text_seq_len, config.text_dim))

        clip_f = self.clip_input_proj(clip_f)
        text_f = self.text_input_proj(text_f)
        segments = sync_f.unflatten(1, (-1, SYNC_SEGMENT)) + self.sync_pos_emb
        return Conditions(
            prepared=None if torch.is_grad_enabled() else PreparedNetwork(),
            clip_f=clip_f,
            text_f=text_f,
            clip_f_c=_few_rows(self.clip_cond_proj, clip_f.mean(dim=1)),
            text_f_c=_few_rows(self.text_cond_proj, text_f.mean(dim=1)),
            sync_rows=self.sync_input_proj(segments.flatten(1, 2)),
            sync_tokens=self._sync_tokens(),
            rope=self._rope(),
            rope_scaling=config.rope_scaling,
            window=config.window,
        )

    def _sync_tokens(self) -> TokenRows:
        # Interpolating the row numbers gives torch's own rounding where a token lies on an edge.
        rows = torch.arange(self.sync_seq_len, device=self.device, dtype=torch.float32)
        index = F.interpolate(rows[None, None], size=self.latent_seq_len, mode="nearest-exact")
        return TokenRows.of_sorted(index.flatten(), self.sync_seq_len)

    def _rope(self) -> Tensor:  # (n + n_clip + n_text, head_dim), float32 at least
        tokens, clip_tokens = self.latent_seq_len, self.clip_seq_len
        # Clip tokens run on the audio tokens' clock; text tokens are not rotated.
        head_dim, stretch = self.config.head_dim, tokens / self.trained_seq_len
        step, base = rope_scale(self.config.rope_scaling, stretch, head_dim)
        lengths = (tokens, clip_tokens, self.config.text_seq_len)
        steps = (step, step * (tokens / clip_tokens), 0.0)
        dtype = torch.promote_types(self.empty_clip_feat.dtype, torch.float32)
        return torch.cat(
            [
                rope_table(n, head_dim, step=step, base=base, device=self.device, dtype=dtype)
                for n, step in zip(lengths, steps, strict=True)
            ]
        )

    def get_empty_string_sequence(self, bs: int) -> Tensor:  # (b n_text text_dim)
        """Raw text features of the empty caption."""
        return self.empty_string_feat.expand(bs, -1, -1)

    def get_empty_clip_sequence(self, bs: int) -> Tensor:  # (b n_clip clip_dim)
        """Raw clip features that stand for a missing video."""
        return self.empty_clip_feat.expand(bs, self.clip_seq_len, -1)

    def get_empty_sync_sequence(self, bs: int) -> Tensor:  # (b n_sync sync_dim)
        """Raw sync features that stand for a missing video."""
        return self.empty_sync_feat.expand(bs, self.sync_seq_len, -1)

    def get_empty_conditions(
        self, bs: int, *, negative_text_features: Tensor | None = None
    ) -> Conditions:
        """Conditions without video, and with the empty caption or ``negative_text_features``.

        negative_text_features: raw (1 or bs, n_text, text_dim), what guidance leads away from.
        """
        text_f = self.get_empty_string_sequence(1)
        if negative_text_features is not None:
            text_f = negative_text_features
            rows = 1 if text_f.dim() == 3 and text_f.shape[0] == 1 else bs
            wanted = (rows, self.config.text_seq_len, self.config.text_dim)
            check_shape("negative_text_features", text_f, wanted)
        rows = text_f.shape[0]
        conditions = self.preprocess_conditions(
            self.get_empty_clip_sequence(rows), self.get_empty_sync_sequence(rows), text_f
        )
        return conditions if rows == bs else conditions.expand(bs)

    # One step.

    def forward(
        self,
        latent: Tensor,
        clip_f: Tensor,
        sync_f: Tensor,
        text_f: Tensor,
        t: Tensor,
        *,
        has_video: Tensor | None = None,
        has_text: Tensor | None = None,
    ) -> Tensor:  # (b n d)
        """The prediction from raw features: ``preprocess_conditions``, then ``predict_flow``.

        has_video, has_text: (b) bool; where False the model's empty features take the place of
        the given ones.
        """
        bs = latent.shape[0]
        if has_video is not None:
            check_shape("has_video", has_video, (bs,))
            given = has_video[:, None, None]
            clip_f = torch.where(given, clip_f, self.get_empty_clip_sequence(bs))
            sync_f = torch.where(given, sync_f, self.get_empty_sync_sequence(bs))
        if has_text is not None:
            check_shape("has_text", has_text, (bs,))
            empty = self.get_empty_string_sequence(bs)
            text_f = torch.where(has_text[:, None, None], text_f, empty)
        conditions = self.preprocess_conditions(clip_f, sync_f, text_f)
        return self.predict_flow(latent, t, replace(conditions, prepared=None))

    def predict_flow(self, latent: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The prediction (b n d) for latent (b n d) at t (b)."""
        self._check_latent(latent)
        check_shape("t", t, (latent.shape[0],))
        self._check_conditions("conditions", conditions, latent.shape[0])
        network = self._prepared(conditions)
        x = network.audio_input_proj(self.sharing.own(latent))
        made = network._transform(x, network.t_embed(t), conditions)
        return self.sharing.whole(made, 1)

    def predict_flow_pair(
        self, latent: Tensor, t: Tensor, conditions: Conditions, empty_conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """Predictions with and without conditions at a 0-d t, in one call on 2 b rows.

        Both share the latent, so its input projection runs once.
        """
        self._check_latent(latent)
        check_shape("t", t, ())
        self._check_conditions("conditions", conditions, latent.shape[0])
        self._check_conditions("empty_conditions", empty_conditions, latent.shape[0])
        network = self._prepared(conditions)
        x = network.audio_input_proj(self.sharing.own(latent))
        both = network._transform(
            torch.cat((x, x)), network.t_embed(t[None]), conditions.cat(empty_conditions)
        )
        cond, uncond = self.sharing.whole(both, 1).chunk(2)
        return cond, uncond

    def ode_wrapper(
        self,
        t: Tensor,
        latent: Tensor,
        conditions: Conditions,
        empty_conditions: Conditions,
        cfg_strength: float,
    ) -> Tensor:
        """The guided prediction w f(cond) + (1 - w) f(empty) at a 0-d t; f(cond) alone if w <= 1.

        It is the network's output, samples or velocity as trained.
        """
        if cfg_strength <= 1.0:
            check_shape("t", t, ())
            return self.predict_flow(latent, t.expand(latent.shape[0]), conditions)
        cond, uncond = self.predict_flow_pair(latent, t, conditions, empty_conditions)
        return torch.lerp(uncond, cond, cfg_strength)

    def _prepared(self, conditions: Conditions) -> WavflowModel:
        """What computes a step with these conditions."""
        if self.is_prepared or conditions.prepared is None:
            return self
        return conditions.prepared.of(self)

    def _transform(self, x: Tensor, t_embedding: Tensor, conditions: Conditions) -> Tensor:
        """Blocks and final layer: x (b n c), t_embedding (b or 1, c) -> (b n d)."""
        together = (conditions.clip_f_c + conditions.text_f_c).unsqueeze(1)
        global_c = t_embedding.unsqueeze(1) + self.global_cond_mlp(together)  # b 1 c
        # The audio streams' condition, before its rows are repeated along the tokens.
        conditions = self._own(conditions)
        extended = Conditioning(global_c + conditions.sync_rows, conditions.sync_tokens)
        everywhere = Conditioning(global_c)

        streams: tuple[Stream, ...]
        streams = (Stream(x), Stream(conditions.clip_f), Stream(conditions.text_f))
        window = conditions.window
        for block in self.joint_blocks:
            streams = self._run(block, *streams, extended, everywhere, conditions.rope, window)
        (audio,) = streams
        rope = conditions.rope[: x.shape[1]]
        window = None if window is None else window._replace(spread=0)
        for block in self.fused_blocks:
            audio = self._run(block, audio, extended, rope, window)
        return self.final_layer(audio, everywhere)

    def _own(self, conditions: Conditions) -> Conditions:
        """What this process needs of them, whose audio tokens are a stretch of all."""
        if self.sharing.size == 1:
            return conditions
        if conditions.window is not None:
            raise ValueError("attention windows cannot be shared among processes")
        tokens, rows = self.sharing.stretch(), conditions.sync_rows.shape[1]
        rope, index = conditions.rope, conditions.sync_tokens.index
        return replace(
            conditions,
            sync_tokens=TokenRows.of_sorted(index[tokens], rows),
            rope=torch.cat((rope[tokens], rope[len(index) :])),
        )

    def _run(
        self, block: nn.Module, *args: Stream | Conditioning | Tensor | AttentionWindow | None
    ) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _check_latent(self, latent: Tensor) -> None:
        check_shape("latent", latent, ("batch", self.latent_seq_len, self.latent_dim))

    def _check_conditions(self, argument: str, conditions: Conditions, batch: int) -> None:
        config, dim = self.config, self.config.hidden_dim
        check_shape(f"{argument}.clip_f", conditions.clip_f, (batch, config.clip_seq_len, dim))
        check_shape(f"{argument}.text_f", conditions.text_f, (batch, config.text_seq_len, dim))
        check_shape(
            f"{argument}.sync_rows", conditions.sync_rows, (batch, config.sync_seq_len, dim)
        )
        check_shape(
            f"{argument}.sync_tokens.index", conditions.sync_tokens.index, (config.latent_seq_len,)
        )
        for name in ("window", "rope_scaling"):
            found, wanted = getattr(conditions, name), getattr(config, name)
            if found != wanted:
                raise ValueError(f"{argument} have {name} {found}, the model has {wanted}")


def _few_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in its own precision, whatever autocast says; the result has the dtype of x.

    For so few rows half precision saves nothing, and torch's own has no fast product everywhere.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype)).to(x.dtype)


def get_wavflow_model(
    name: str,
    *,
    latent_seq_len: int | None = None,
    empty_string_feat: Tensor | None = None,
    gradient_checkpointing: bool = False,
    mlp_ratio: float | None = None,
) -> WavflowModel:
    """Builds the preset ``name`` (a key of PRESETS); None keeps the preset's value.

    Raises ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"model name is {name!r}, wanted one of {', '.join(PRESETS)}")
    sizes = asdict(PRESETS[name])
    if latent_seq_len is not None:
        sizes["latent_seq_len"] = latent_seq_len
    if mlp_ratio is not None:
        sizes["mlp_ratio"] = mlp_ratio
    return WavflowModel(
        **sizes,
        empty_string_feat=empty_string_feat,
        gradient_checkpointing=gradient_checkpointing,
    )
