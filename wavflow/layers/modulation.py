"""What modulates a stream of tokens, and the stream itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import TokenRows


class Modulation(NamedTuple):
    """What tokens are modulated by: distinct rows (b r c), and which of them each token takes.

    Without ``tokens`` there is one row, the same for all tokens. The nearest upsampling of the sync
    features repeats rows, so the modulation Linears run on the distinct ones.
    """

    rows: Tensor
    tokens: TokenRows | None = None


class Stream(NamedTuple):
    """Tokens between two blocks: ``x + gate * branch``, left to the next adaLN to add."""

    x: Tensor  # b n c
    branch: Tensor | None = None  # b n c
    gate: Tensor | None = None  # b r c
    gate_tokens: TokenRows | None = None

    def adaln(
        self, shift: Tensor, scale: Tensor, tokens: TokenRows | None
    ) -> tuple[Tensor, Tensor]:
        """The stream's sum, and its LayerNorm modulated by rows (b r c): both (b n c)."""
        if self.branch is None or self.gate is None:
            return self.x, wk.adaln(self.x, shift, scale, tokens)
        return wk.gated_residual_adaln(
            self.x, self.branch, self.gate, self.gate_tokens, shift, scale, tokens
        )
