"""WavFlow's network (arXiv 2605.18749): a multimodal diffusion transformer on waveform tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavflow.base.shapes import check_shape
from wavflow.layers.embeddings import TimestepEmbedding, rope_scale
from wavflow.layers.modulation import Modulation, Stream
from wavflow.layers.prepare import PreparedNetwork, Preparing
from wavflow.layers.sequence_parallel import Sharing
from wavflow.layers.token_layers import SwiGLU, TokenConv, TokenLinear
from wavflow.systems.wavflow.blocks import FinalLayer, JointBlock, TransformerBlock
from wavflow.systems.wavflow.conditions import Conditions
from wavflow.systems.wavflow.config import PRESETS, SYNC_SEGMENT, WavflowConfig
from wavflow_kernels import AttentionWindow, TokenRows, rope_table


class WavflowModel(Preparing):
    """Predicts clean waveform tokens, or velocities, from noisy ones, video and text features.

    With b clips, n audio tokens of d samples and hidden width c: latent (b n d), clip features
    (b n_clip clip_dim), sync features (b n_sync sync_dim), text features (b n_text text_dim) and
    timesteps t (b) in [0, 1], 0 being noise. A tensor of another shape raises a ValueError naming
    the argument, its shape and the wanted one.
    """

    #: Tables that older checkpoints store; they are computed here.
    ignored_keys = frozenset({"t_embed.freqs", "latent_rot", "clip_rot"})

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
        # Says which audio tokens this process computes.
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

    def with_seq_lengths(
        self, latent_seq_len: int, clip_seq_len: int, sync_seq_len: int
    ) -> WavflowModel:
        """This network for clips of other lengths; it shares all modules and weights with it."""
        view = copy.copy(self)
        view.update_seq_lengths(latent_seq_len, clip_seq_len, sync_seq_len)
        return view

    def update_attention(self, attention_window: int | None, rope_scaling: str) -> None:
        """Sets what tokens see and how longer clips are rotated; earlier conditions do not fit."""
        self.config = replace(
            self.config, attention_window=attention_window, rope_scaling=rope_scaling
        )

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads a whole state dict; what is missing, unknown or misshapen raises a ValueError."""
        given = {name: value for name, value in state_dict.items() if name not in self.ignored_keys}
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
        """Conditions of raw clip, sync and text features, which are projected once for all steps.

        clip_f: (b n_clip clip_dim); sync_f: (b n_sync sync_dim); text_f: (b n_text text_dim).
        """
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
            sync_tokens=self.sync_tokens(),
            rope=self.rope(),
            rope_scaling=config.rope_scaling,
            window=config.window,
        )

    def sync_tokens(self) -> TokenRows:
        """The sync row that each audio token hears, the nearest in time."""
        # Interpolating the row numbers gives torch's own rounding where a token lies on an edge.
        rows = torch.arange(self.sync_seq_len, device=self.device, dtype=torch.float32)
        index = F.interpolate(rows[None, None], size=self.latent_seq_len, mode="nearest-exact")
        return TokenRows.of_sorted(index.flatten(), self.sync_seq_len)

    def rope(self) -> Tensor:  # (n + n_clip + n_text, head_dim), float32 at least
        """The rotations of the joint attention's tokens: audio, clip, text."""
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
        """The network that computes a step with these conditions: this or its prepared copy."""
        if self.is_prepared or conditions.prepared is None:
            return self
        return conditions.prepared.of(self)

    def _transform(self, x: Tensor, t_embedding: Tensor, conditions: Conditions) -> Tensor:
        """Blocks and final layer: x (b n c), t_embedding (b or 1, c) -> (b n d)."""
        together = (conditions.clip_f_c + conditions.text_f_c).unsqueeze(1)
        global_c = t_embedding.unsqueeze(1) + self.global_cond_mlp(together)  # b 1 c
        # The audio streams' condition, before its rows are repeated along the tokens.
        conditions = self._own(conditions)
        extended = Modulation(global_c + conditions.sync_rows, conditions.sync_tokens)
        everywhere = Modulation(global_c)

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
        """What this process needs of the conditions for its stretch of the audio tokens."""
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
        self, block: nn.Module, *args: Stream | Modulation | Tensor | AttentionWindow | None
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
    """Applies `layer` in its own precision, whatever autocast says; the result has x's dtype.

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

    Raises:
        ValueError: an unknown name.
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
