"""What WavFlow's network is told of a clip at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from wavflow.layers.prepare import PreparedNetwork
from wavflow_kernels import AttentionWindow, TokenRows


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
    rope_scaling: str = "none"  # how these rotations are scaled
    window: AttentionWindow | None = None  # which tokens see each other in the joint attention
    prepared: PreparedNetwork | None = None

    @property
    def sync_f(self) -> Tensor:  # (b n c)
        """The sync features, upsampled to the audio tokens."""
        return self.sync_rows.index_select(1, self.sync_tokens.index)

    def expand(self, batch: int) -> Conditions:
        """One clip's conditions repeated ``batch`` times, as views."""
        return self._map(lambda f: f.expand(batch, *f.shape[1:]))

    def cat(self, *others: Conditions) -> Conditions:
        """Conditions of the clips of all, one after the other; their token counts are the same."""
        return self._map(lambda *all: torch.cat(all), *others)

    def split(self) -> list[Conditions]:
        """The conditions of each clip on its own."""
        return [self._map(lambda f, i=i: f[i : i + 1]) for i in range(len(self.clip_f))]

    def _map(self, function: Callable[..., Tensor], *others: Conditions) -> Conditions:
        shared = ("sync_tokens", "rope", "rope_scaling", "window", "prepared")
        per_clip = [f.name for f in fields(self) if f.name not in shared]
        sources = (self, *others)
        made: dict[str, Any] = {
            name: function(*(getattr(s, name) for s in sources)) for name in per_clip
        }
        return replace(self, **made)
