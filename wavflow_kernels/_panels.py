"""Convolution weights laid out for the compiled float32 product (``csrc/conv1d.h``), and its calls.

A panel holds 16 output channels side by side: packed weights are (panels, k c, 16), 0 where there
are no more outputs. All tensors are on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from ._backend import C
from ._launch import address, target

WIDTH = 16 if C is None else C.conv1d_panel


def fastest(dtype: torch.dtype) -> bool:
    """Whether the compiled product is the fastest there is for CPU tensors of `dtype`.

    Measured on AVX2, where torch's libraries reach 0.4 to 0.9 of its rate; with AVX-512 theirs are
    not slower.
    """
    known = cpu.current()
    return C is not None and known.level == "avx2" and cpu.product_dtype(dtype) == torch.float32


def pack(weight: Tensor, transposed: bool = False) -> Tensor:  # o c k -> p k*c 16
    """Lay out a float32 weight of any strides.

    transposed: with input and output channels exchanged and the taps reversed, as the gradient in
    the tokens needs it.
    """
    (outputs, channels, k), strides = weight.shape, weight.stride()
    first = weight.data_ptr()
    if transposed:
        first += (k - 1) * strides[2] * weight.element_size()
        outputs, channels = channels, outputs
        strides = strides[1], strides[0], -strides[2]
    packed = weight.new_empty(-(-outputs // WIDTH), k * channels, WIDTH)
    C.conv1d_pack(target(weight), first, *strides, packed.data_ptr(), outputs, channels, k)
    return packed


def unpacked(packed: Tensor, channels: int) -> Tensor:  # p k*c 16 -> o c k
    """The weight that :func:`pack` laid out, its outputs rounded up to whole panels."""
    return packed.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, channels)).transpose(1, 2)


def multiply(
    x: Tensor,  # b n c, float32
    packed: Tensor,
    outputs: int,
    bias: Tensor | None = None,  # o
    out: Tensor | None = None,  # b n o, contiguous
) -> Tensor:  # b n o
    """The convolution of x with a packed weight, plus a bias."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    b, n, c = x.shape
    out = x.new_empty(b, n, outputs) if out is None else out
    where = x.data_ptr(), packed.data_ptr(), address(bias), out.data_ptr()
    C.conv1d(target(x), *where, b, n, c, outputs, packed.shape[1] // c)
    return out


def weight_gradient(
    grad: Tensor,  # b n o, float32
    x: Tensor,  # b n c
    k: int,
    out: Tensor | None = None,  # o c k, contiguous
) -> Tensor:  # o c k
    """The gradient of the convolution in its weight."""
    grad, x = grad.contiguous(), x.contiguous()
    (b, n, c), o = x.shape, grad.shape[2]
    out = x.new_empty(o, c, k) if out is None else out
    where = grad.data_ptr(), x.data_ptr(), out.data_ptr()
    C.conv1d_weight_gradient(target(x), *where, b, n, c, o, k)
    return out
