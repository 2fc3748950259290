"""Building blocks of the multimodal diffusion transformer. Tensors are (b n c), channels last."""

from __future__ import annotations

from torch import Tensor, nn

from wavflow.layers.attention import AttentionInput, Entered, attention
from wavflow.layers.modulation import Modulation, Stream
from wavflow.layers.sequence_parallel import Sharing
from wavflow.layers.token_layers import SwiGLU, TokenConv, TokenLinear
from wavflow_kernels import AttentionWindow


class TransformerBlock(nn.Module):
    """A block's layers for one stream: adaLN, attention input, output projection, feed-forward.

    ``kernel_size`` None makes the projection and the feed-forward Linears, else convolutions.
    A ``pre_only`` block only supplies keys and values to the joint attention.
    """

    sharing: Sharing | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_width: int,
        *,
        kernel_size: int | None,
        pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.chunks = 2 if pre_only else 6
        self.attn = AttentionInput(dim, num_heads, with_query=not pre_only)
        if not pre_only:
            self.linear1 = (
                TokenLinear(dim, dim) if kernel_size is None else TokenConv(dim, dim, kernel_size)
            )
            self.ffn = SwiGLU(dim, ffn_width, kernel_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), TokenLinear(dim, self.chunks * dim))

    def enter(self, stream: Stream, c: Modulation) -> Entered:
        """What comes before the attention: the stream's queries, keys and values."""
        modulation = self.adaLN_modulation(c.rows).chunk(self.chunks, dim=-1)
        shift, scale = modulation[:2]
        x, h = stream.adaln(shift, scale, c.tokens)
        return Entered(x, self.attn(h), modulation, c.tokens)

    def leave(self, entered: Entered, attended: Tensor) -> Stream:
        """What comes after the attention, whose result is `attended` (b n c)."""
        x, _, (_, _, gate1, shift2, scale2, gate2), tokens = entered
        stream = Stream(x, self.linear1(attended), gate1, tokens)
        x, h = stream.adaln(shift2, scale2, tokens)
        return Stream(x, self.ffn(h), gate2, tokens)

    def forward(
        self, stream: Stream, c: Modulation, rope: Tensor, window: AttentionWindow | None
    ) -> Stream:
        """The block on its own: self-attention over its tokens."""
        entered = self.enter(stream, c)
        (attended,) = attention([self.attn], [entered.projected], rope, window, self.sharing)
        return self.leave(entered, attended)


class JointBlock(nn.Module):
    """Audio, clip and text streams under one attention; ``pre_only`` updates the audio alone."""

    def __init__(self, dim: int, num_heads: int, ffn_width: int, *, pre_only: bool = False) -> None:
        super().__init__()
        self.latent_block = TransformerBlock(dim, num_heads, ffn_width, kernel_size=3)
        self.clip_block = TransformerBlock(
            dim, num_heads, ffn_width, kernel_size=3, pre_only=pre_only
        )
        self.text_block = TransformerBlock(
            dim, num_heads, ffn_width, kernel_size=None, pre_only=pre_only
        )

    def forward(
        self,
        latent: Stream,
        clip: Stream,
        text: Stream,
        latent_c: Modulation,
        global_c: Modulation,
        rope: Tensor,
        window: AttentionWindow | None,
    ) -> tuple[Stream, ...]:
        """The streams that go on: all three, or the audio alone from a ``pre_only`` block."""
        blocks = (self.latent_block, self.clip_block, self.text_block)
        entered = [
            block.enter(stream, c)
            for block, stream, c in zip(
                blocks, (latent, clip, text), (latent_c, global_c, global_c), strict=True
            )
        ]
        projected = [e.projected for e in entered]
        attended = attention(
            [b.attn for b in blocks], projected, rope, window, self.latent_block.sharing
        )
        return tuple(
            block.leave(e, a) for block, e, a in zip(blocks, entered, attended, strict=False)
        )


class FinalLayer(nn.Module):
    """adaLN on the global condition, then a convolution to the samples of each token."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), TokenLinear(dim, 2 * dim))
        self.conv = TokenConv(dim, out_dim, 7)

    def forward(self, stream: Stream, c: Modulation) -> Tensor:  # (b n d)
        shift, scale = self.adaLN_modulation(c.rows).chunk(2, dim=-1)
        _, h = stream.adaln(shift, scale, c.tokens)
        return self.conv(h)
