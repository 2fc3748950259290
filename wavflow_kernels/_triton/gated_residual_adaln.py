"""Launchers of gated_residual_adaln: the kernels of adaln with GATED."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .adaln import launch_backward, launch_forward


def forward(
    outs: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    gate_offsets: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    launch_forward(outs, x, y, gate, gate_index, shift, scale, index, eps)


def backward(outs: tuple[Any, ...], *args: Any) -> None:
    launch_backward(*outs, *args)
