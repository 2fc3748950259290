"""Building blocks of the multimodal diffusion transformer. Tensors are (b n c), channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import wavflow_kernels as wk
from wavflow.model.sharing import Sharing
from wavflow_kernels import AttentionWindow, PreparedConv, TokenRows

# RMSNorm's eps is float32's machine epsilon whatever the input's dtype.
RMS_NORM_EPS = torch.finfo(torch.float32).eps
# What inference holds of a feed-forward's inner values. The CPU's caches are small, and glibc has
# the kernel map and clear larger tensors every time.
INNER_BYTES = {"cpu": 32 << 20}
INNER_BYTES_ELSEWHERE = 1 << 30
SHORTEST_STRETCH = 1024


def stretch(device: torch.device, inner: int, rows: int, itemsize: int) -> int:
    """Tokens of `rows` rows that go through a feed-forward of `inner` channels together."""
    held = INNER_BYTES.get(device.type, INNER_BYTES_ELSEWHERE)
    return max(held // (3 * inner * rows * itemsize), SHORTEST_STRETCH)  # a pair, its product


class Preparable:
    """A layer with a weight that :func:`wavflow.model.inference.prepare_inference` can prepare."""

    weight: Tensor
    prepared: PreparedConv | None = None

    def prepare(self, dtype: torch.dtype, winograd: bool | None = None) -> None:
        """Hold the weight as inference in `dtype` wants it, in place of the parameter."""
        self.prepared = wk.prepare_conv(self.weight, dtype=dtype, winograd=winograd)
        del self.weight

    @property
    def operand(self) -> Tensor | PreparedConv:
        return self.weight if self.prepared is None else self.prepared


class TokenConv(Preparable, nn.Conv1d):
    """``nn.Conv1d``'s parameters and initialisation on (b n c) tensors, "same" zero padding."""

    sharing: Sharing | None = None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_dim, out_dim, kernel_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        def convolve(x: Tensor) -> Tensor:
            return wk.conv1d(x, self.operand, self.bias, activation=self.activation)

        if self.sharing is None:
            return convolve(x)
        return self.sharing.convolved(x, self.kernel_size[0] // 2, convolve)


class TokenLinear(Preparable, nn.Linear):
    """``nn.Linear`` on (b n c) tensors: a convolution of width 1."""

    def forward(self, x: Tensor) -> Tensor:
        return wk.conv1d(x, self.operand, self.bias)


def swiglu_inner(width: int) -> int:
    """The inner width of a :class:`SwiGLU`: two thirds of ``width``, up to a multiple of 256."""
    return -(-(2 * width // 3) // 256) * 256


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases; the layers are convolutions if given a kernel size.

    The inner width is :func:`swiglu_inner`.
    """

    prepared: PreparedConv | None = None
    sharing: Sharing | None = None

    def __init__(self, dim: int, width: int, kernel_size: int | None = None) -> None:
        super().__init__()
        self.edge = 0 if kernel_size is None else 2 * (kernel_size // 2)
        self.inner = inner = swiglu_inner(width)

        def layer(in_dim: int, out_dim: int) -> TokenLinear | TokenConv:
            if kernel_size is None:
                return TokenLinear(in_dim, out_dim, bias=False)
            return TokenConv(in_dim, out_dim, kernel_size, bias=False)

        self.w1 = layer(dim, inner)
        self.w2 = layer(inner, dim)
        self.w3 = layer(dim, inner)

    def prepare(self, dtype: torch.dtype, winograd: bool | None = None) -> None:
        """Hold w1 and w3 joined as inference in `dtype` wants them, and w2 likewise."""
        pair = [self.w1.weight, self.w3.weight]
        self.prepared = wk.prepare_conv(pair, dtype=dtype, winograd=winograd)
        del self.w1, self.w3
        self.w2.prepare(dtype, winograd)

    def forward(self, x: Tensor) -> Tensor:
        if self.sharing is None:
            return self._in_stretches(x)
        return self.sharing.convolved(x, self.edge, self._in_stretches)

    def _in_stretches(self, x: Tensor) -> Tensor:
        """Of a long x stretch by stretch in inference, each with the tokens that it sees."""
        tokens, length = x.shape[1], stretch(x.device, self.inner, len(x), x.element_size())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens < 2 * length:
            return self._whole(x)
        made: Tensor | None = None
        for begin in range(0, tokens, length):
            end = min(begin + length, tokens)
            first = max(begin - self.edge, 0)
            part = self._whole(x[:, first : end + self.edge])
            made = part.new_empty(*x.shape[:2], part.shape[2]) if made is None else made
            made[:, begin:end] = part[:, begin - first : end - first]
        assert made is not None
        return made

    def _whole(self, x: Tensor) -> Tensor:
        if self.prepared is None:
            return self.w2(wk.conv_swiglu(x, self.w1.weight, self.w3.weight))
        return self.w2(wk.conv_swiglu(x, self.prepared))


class Conditioning(NamedTuple):
    """Modulation input: distinct rows (b r c), and which of them each token takes.

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


class AttentionInput(nn.Module):
    """Projects tokens to queries, keys and values; holds the weights of the norms of q and k.

    Without queries the parameters are the same; the rows of the queries are left out at run time.
    """

    prepared: PreparedConv | None = None

    def __init__(self, dim: int, num_heads: int, *, with_query: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.with_query = with_query
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=RMS_NORM_EPS)

    def prepare(self, dtype: torch.dtype, winograd: bool | None = None) -> None:
        """Hold the projection's weight as inference in `dtype` wants it."""
        weight, self.bias = self._projection()
        self.prepared = wk.prepare_conv(weight, dtype=dtype, winograd=winograd)
        del self.qkv

    def _projection(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.with_query:
            return weight, bias
        weight, bias = (x.unflatten(0, (-1, 3))[:, 1:].flatten(0, 1) for x in (weight, bias))
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(b n 3c), channels laid out as (head, channel, {q, k, v}); (b n 2c) without queries."""
        if self.prepared is not None:
            return wk.conv1d(x, self.prepared, self.bias)
        return wk.conv1d(x, *self._projection())


class Entered(NamedTuple):
    """One stream on its way through a block."""

    x: Tensor  # b n c
    projected: Tensor  # b n 3c or 2c
    modulation: tuple[Tensor, ...]  # (b r c) each
    tokens: TokenRows | None


class TransformerBlock(nn.Module):
    """One stream: adaLN, attention input, output projection and feed-forward.

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

    def enter(self, stream: Stream, c: Conditioning) -> Entered:
        modulation = self.adaLN_modulation(c.rows).chunk(self.chunks, dim=-1)
        shift, scale = modulation[:2]
        x, h = stream.adaln(shift, scale, c.tokens)
        return Entered(x, self.attn(h), modulation, c.tokens)

    def leave(self, entered: Entered, attended: Tensor) -> Stream:
        x, _, (_, _, gate1, shift2, scale2, gate2), tokens = entered
        stream = Stream(x, self.linear1(attended), gate1, tokens)
        x, h = stream.adaln(shift2, scale2, tokens)
        return Stream(x, self.ffn(h), gate2, tokens)

    def forward(
        self, stream: Stream, c: Conditioning, rope: Tensor, window: AttentionWindow | None
    ) -> Stream:
        """The block on its own: self-attention over its tokens."""
        entered = self.enter(stream, c)
        (attended,) = attention([self.attn], [entered.projected], rope, window, self.sharing)
        return self.leave(entered, attended)


def attention(
    inputs: Sequence[AttentionInput],
    projected: Sequence[Tensor],
    rope: Tensor,
    window: AttentionWindow | None,
    sharing: Sharing | None,
) -> tuple[Tensor, ...]:
    """Joint attention of the streams, (b n 3c) or (b n 2c) each -> (b n c) of those with queries.

    rope: (tokens of all streams, head_dim) rotations; window: over the tokens of all streams;
    sharing: of the first stream's.
    """
    q, k, v = wk.qkv_rope(
        projected,
        [a.q_norm.weight.to(rope.dtype) for a in inputs],
        [a.k_norm.weight.to(rope.dtype) for a in inputs],
        rope,
        heads=inputs[0].num_heads,
    )
    dim = v.shape[1] * v.shape[3]
    lengths = [p.shape[1] for p in projected if p.shape[2] == 3 * dim]
    if sharing is not None and sharing.size > 1:
        own = projected[0].shape[1]
        k, v = (torch.cat((sharing.whole(x[:, :, :own], 2), x[:, :, own:]), dim=2) for x in (k, v))
    return wk.rope_attention(q, k, v, window=window).split(lengths, dim=1)


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
        latent_c: Conditioning,
        global_c: Conditioning,
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

    def forward(self, stream: Stream, c: Conditioning) -> Tensor:  # (b n d)
        shift, scale = self.adaLN_modulation(c.rows).chunk(2, dim=-1)
        _, h = stream.adaln(shift, scale, c.tokens)
        return self.conv(h)
