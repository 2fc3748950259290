r"""Tokens back to a waveform: unscale, flatten, trim, and cross-fade overlapping windows.

Window :math:`w` starts at token :math:`w h`. A sample is the weighted mean
:math:`\sum_w m_{j - wh}\,x_{w,\,j - wh} \big/ \sum_w m_{j - wh}` over the windows that hold its
token :math:`j`, divided by ``audio_scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._registry import DTYPE_CODE, Op, Sample, Workload, address, target


def _check(
    tokens: Tensor, window: Tensor | None, hop: int, samples: int, audio_scale: float
) -> None:
    op = "unpatchify"
    sizes = check(op, tokens=(tokens, "b w n d"), window=(window, "n"))
    check_dtype(op, "tokens", tokens, *FLOATS)
    check_dtype(op, "window", window, compute_dtype(tokens.dtype))
    for name in "wnd":
        require(sizes[name] > 0, f"{op}: tokens must not be empty, got {tuple(tokens.shape)}")
    require(hop > 0, f"{op}: hop must be positive, got {hop}")
    require(
        sizes["w"] == 1 or hop <= sizes["n"],
        f"{op}: hop must be at most the window's {sizes['n']} tokens, got {hop}",
    )
    longest = ((sizes["w"] - 1) * hop + sizes["n"]) * sizes["d"]
    require(0 < samples <= longest, f"{op}: samples must lie in [1, {longest}], got {samples}")
    require(audio_scale > 0, f"{op}: audio_scale must be positive, got {audio_scale}")


def _outputs(tokens: Tensor, window: Any, hop: int, samples: int, audio_scale: float) -> Tensor:
    return tokens.new_empty(tokens.shape[0], samples)


def _weights(tokens: Tensor, window: Tensor | None, hop: int) -> Tensor:
    """(w n): each window's weight at each of its tokens, normalised over the windows."""
    _, w, n, _ = tokens.shape
    weight = torch.ones(n, device=tokens.device) if window is None else window
    weight = weight.to(compute_dtype(tokens.dtype)).expand(w, n)
    at = torch.arange(w, device=tokens.device)[:, None] * hop + torch.arange(
        n, device=tokens.device
    )
    total = weight.new_zeros((w - 1) * hop + n).index_add(0, at.flatten(), weight.flatten())
    return torch.where(total[at] == 0, 0.0, weight / total[at])


def reference(
    tokens: Tensor,  # b w n d
    window: Tensor | None,  # n
    hop: int,
    samples: int,
    audio_scale: float,
) -> Tensor:  # b t
    b, w, n, d = tokens.shape
    x = tokens.to(compute_dtype(tokens.dtype))
    if w == 1 and window is None:
        wave = x.flatten(1)
    else:
        x = x * _weights(tokens, window, hop)[..., None]
        at = torch.arange(w, device=x.device)[:, None] * hop + torch.arange(n, device=x.device)
        wave = x.new_zeros(b, (w - 1) * hop + n, d).index_add(1, at.flatten(), x.flatten(1, 2))
        wave = wave.flatten(1)
    return (wave[:, :samples] / audio_scale).to(tokens.dtype)


def _launch(
    out: Tensor, tokens: Tensor, window: Tensor | None, hop: int, samples: int, audio_scale: float
) -> None:
    if not out.numel():
        return
    tokens = tokens.contiguous()
    window = None if window is None else window.contiguous()
    C.unpatchify(
        target(tokens),
        DTYPE_CODE[tokens.dtype],
        address(tokens),
        address(window),
        address(out),
        *tokens.shape,
        hop,
        samples,
        audio_scale,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, window, ctx.hop, ctx.samples, ctx.audio_scale = inputs
    if ctx.needs_input_grad[1]:
        raise RuntimeError("unpatchify: no gradient with respect to window")
    ctx.save_for_backward(tokens, window)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, window = ctx.saved_tensors
    b, w, n, d = tokens.shape
    length = (w - 1) * ctx.hop + n
    grad = grad.to(compute_dtype(grad.dtype)) / ctx.audio_scale
    grad = torch.nn.functional.pad(grad, (0, length * d - ctx.samples)).view(b, length, d)
    grad = grad.unfold(1, n, ctx.hop).transpose(2, 3)  # b w n d
    if w > 1 or window is not None:
        grad = grad * _weights(tokens, window, ctx.hop)[..., None]
    return grad.to(tokens.dtype), None, None, None, None


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    fade = torch.linspace(0.1, 1, 9, dtype=compute_dtype(dtype), device=device)
    gap = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=compute_dtype(dtype), device=device)
    return [
        Sample((tokens(3, 1, 25, 40), None, 25, 1000, 3.0), (0,), "even"),
        Sample((tokens(2, 1, 11, 7), None, 1, 75, 3.0), (0,), "trimmed"),
        Sample((tokens(2, 4, 9, 5), fade, 3, 88, 3.0), (0,), "overlap-add"),
        Sample((tokens(2, 3, 4, 5), gap, 2, 40, 2.0), (0,), "weights of zero"),
        Sample((tokens(2, 3, 6, 4), None, 6, 72, 1.0), (0,), "abutting windows"),
        Sample((tokens(2, 1, 200, 200), None, 200, 39_999, 3.0), (), "several blocks"),
        Sample((tokens(0, 1, 3, 4), None, 3, 12, 3.0), (), "empty batch"),
    ]


def _workload(batch: int) -> Workload:
    """Clips of 8 s at 16 kHz."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        tokens = torch.randn(batch, 1, 640, 200, device=device, dtype=dtype)
        return tokens, None, 640, 128_000, 3.0

    return make


OP = Op(
    name="unpatchify",
    schema=(
        "(Tensor tokens, Tensor? window, SymInt hop, SymInt samples, float audio_scale) -> Tensor"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch},
    supported={"cpp": {"cpu": frozenset(FLOATS), "cuda": frozenset(FLOATS)}},
    samples=_samples,
    workloads={f"{batch} clips of 8 s": _workload(batch) for batch in (8, 256)},
    bytes=lambda tokens, window, hop, samples, scale: (
        tokens.nbytes + tokens.shape[0] * samples * tokens.itemsize
    ),
    flops=lambda tokens, *_: tokens.numel(),
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
)


def unpatchify(
    tokens: Tensor,  # b n d, or b w n d
    *,
    samples: int | None = None,
    audio_scale: float = 3.0,
    hop: int | None = None,
    window: Tensor | None = None,  # n
) -> Tensor:  # b t
    """Join tokens to waveforms; overlapping windows are averaged by weight.

    Args:
        tokens: (b, n, d), or (b, w, n, d) windows that start `hop` tokens apart.
        samples: t, samples kept; None: all.
        audio_scale: the scale that :func:`lift_patchify` applied; divided out.
        hop: tokens between the starts of neighbouring windows, 1..n; needed with (b, w, n, d).
        window: (n,) float32 (float64 for float64 tokens) weight of each token of a window; None: 1.
            A sample that only weights of 0 reach is 0.

    Returns:
        (b, t) in the dtype of `tokens`. The lift's gain is not undone.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype.
    """
    if tokens.dim() == 3:
        require(hop is None, "unpatchify: hop needs windows, tokens of shape (b, w, n, d)")
        tokens = tokens[:, None]
        hop = tokens.shape[2]
    require(
        tokens.dim() == 4 and hop is not None,
        "unpatchify: tokens must have shape (b, n, d), or (b, w, n, d) with hop given, "
        f"got {tuple(tokens.shape)} and hop {hop}",
    )
    if samples is None:
        assert hop is not None
        samples = ((tokens.shape[1] - 1) * hop + tokens.shape[2]) * tokens.shape[3]
    return OP(tokens, window, hop, samples, audio_scale)
