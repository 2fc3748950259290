"""Philox 4x32-10 normals in torch, bit for bit those of csrc/random.h.

Only IEEE +, -, *, / and sqrt are used, in the same order, so eager torch gives the same bits.
Integers are held in int64 and masked to 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, from 16-bit halves: the product would wrap in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # both below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit integers (in int64) for each pair of int64 counter and key."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _log_unit(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 127
    m = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    large = m > 1.41421356
    m = torch.where(large, m * 0.5, m)
    e = torch.where(large, exponent + 1, exponent).float()
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = z * (0.333333333 + z * (0.2 + z * (0.142857143 + z * 0.111111111)))
    return e * 0.693145752 + (s * 2.0 + (s * 2.0 * series + e * 1.42860677e-6))


def _cos_sin_turn(x: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = ((x + 0x20000000) & _MASK) >> 30
    reduced = (x - (quadrant << 30)) & _MASK
    reduced = torch.where(reduced >= 1 << 31, reduced - (1 << 32), reduced)
    a = reduced.to(torch.int32).float() * 1.46291808e-9
    z = a * a
    s = a + a * (
        z * (-1.66666667e-1 + z * (8.33333333e-3 + z * (-1.98412698e-4 + z * 2.75573192e-6)))
    )
    c = 1.0 + z * (
        -0.5 + z * (4.16666667e-2 + z * (-1.38888889e-3 + z * (2.48015873e-5 + z * -2.75573192e-7)))
    )
    swap = quadrant % 2 == 1
    c0, s0 = torch.where(swap, s, c), torch.where(swap, c, s)
    cosine = torch.where((quadrant == 1) | (quadrant == 2), -c0, c0)
    return cosine, torch.where(quadrant >= 2, -s0, s0)


def _normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = (a >> 1).to(torch.int32).float() * 4.65661287e-10 + 2.32830644e-10
    # torch.sqrt of float32 is not correctly rounded on every CPU; through float64 it is.
    radius = torch.sqrt((-2.0 * _log_unit(u)).double()).float()
    cosine, sine = _cos_sin_turn(b)
    return radius * cosine, radius * sine


def normal(seeds: Tensor, count: int, offset: int = 0) -> Tensor:
    """Standard normals (b, count) in float32; row i is the stream of ``seeds[i]`` (int64).

    They begin at number ``offset`` of the stream, a multiple of 4.
    """
    blocks = offset // 4 + torch.arange(-(-count // 4), device=seeds.device)
    counter, key = torch.broadcast_tensors(blocks[None, :], seeds[:, None])
    x0, x1, x2, x3 = philox(counter, key)
    values = torch.stack([*_normal_pair(x0, x1), *_normal_pair(x2, x3)], dim=-1)
    return values.flatten(1)[:, :count]
