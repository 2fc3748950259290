"""Layers over tokens, (b n c) in and out, that can be prepared for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import wavflow_kernels as wk
from wavflow.layers.sequence_parallel import Sharing
from wavflow_kernels import PreparedConv

#: Bytes of a feed-forward's inner values that inference holds at a time, by device. The caches of a
#: CPU are small, and glibc has the kernel map and clear larger tensors every time.
INNER_BYTES = {"cpu": 32 << 20}

#: The same on other devices.
INNER_BYTES_ELSEWHERE = 1 << 30

#: Tokens that go through a feed-forward together, at least.
SHORTEST_STRETCH = 1024


def stretch(device: torch.device, inner: int, rows: int, itemsize: int) -> int:
    """How many tokens of `rows` rows go through a feed-forward of `inner` channels together."""
    held = INNER_BYTES.get(device.type, INNER_BYTES_ELSEWHERE)
    return max(held // (3 * inner * rows * itemsize), SHORTEST_STRETCH)  # a pair, its product


class Preparable:
    """A layer with a weight that :func:`wavflow.layers.prepare.prepare_inference` can prepare."""

    weight: Tensor
    prepared: PreparedConv | None = None

    def prepare(self, dtype: torch.dtype, winograd: bool | None = None) -> None:
        """Holds the weight as inference in `dtype` wants it, in place of the parameter."""
        self.prepared = wk.prepare_conv(self.weight, dtype=dtype, winograd=winograd)
        del self.weight

    @property
    def operand(self) -> Tensor | PreparedConv:
        """The weight as the op takes it: prepared, or the parameter."""
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
        """Holds w1 and w3 joined as inference in `dtype` wants them, and w2 likewise."""
        pair = [self.w1.weight, self.w3.weight]
        self.prepared = wk.prepare_conv(pair, dtype=dtype, winograd=winograd)
        del self.w1, self.w3
        self.w2.prepare(dtype, winograd)

    def forward(self, x: Tensor) -> Tensor:
        if self.sharing is None:
            return self._in_stretches(x)
        return self.sharing.convolved(x, self.edge, self._in_stretches)

    def _in_stretches(self, x: Tensor) -> Tensor:
        """Computes a long x stretch by stretch in inference, each with the tokens that it sees."""
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
