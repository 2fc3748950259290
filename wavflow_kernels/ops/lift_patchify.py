r"""Amplitude lifting and waveform patchify in two passes over the audio.

With :math:`r` the RMS of the whole clip, the gain is :math:`g = r^*/r` where :math:`r > 10^{-8}`
and 1 elsewhere. If the lifted peak :math:`p = g \max|x|` exceeds 1 while RMS / peak after the gain
is above 0.3, the clip is divided by :math:`p`. Tokens are :math:`s\,\mathrm{clamp}(g x/p, -1, 1)`,
zero-padded or cropped on the right to ``tokens * token_size`` samples. With levels given, :math:`r`
and :math:`\max|x|` are those of a longer recording, and one pass is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, target
from .._registry import ON_BOTH, Op, Sample, Workload

_CHUNK = 16384  # samples a CUDA block reduces; kChunk in csrc/cuda/lift_patchify.cu


def _check(
    wave: Tensor,
    lengths: Tensor | None,
    levels: Tensor | None,
    token_size: int,
    tokens: int,
    target_rms: float,
    audio_scale: float,
    out_dtype: torch.dtype | None,
) -> None:
    op = "lift_patchify"
    sizes = check(op, wave=(wave, "b t"), lengths=(lengths, "b"), levels=(levels, "b 2"))
    check_dtype(op, "wave", wave, *FLOATS)
    check_dtype(op, "lengths", lengths, torch.int64)
    check_dtype(op, "levels", levels, compute_dtype(wave.dtype))
    require(sizes["t"] > 0, f"{op}: wave must hold at least 1 sample, got {tuple(wave.shape)}")
    require(token_size > 0, f"{op}: token_size must be positive, got {token_size}")
    require(tokens > 0, f"{op}: tokens must be positive, got {tokens}")
    require(target_rms > 0, f"{op}: target_rms must be positive, got {target_rms}")
    require(audio_scale > 0, f"{op}: audio_scale must be positive, got {audio_scale}")
    possible = [None, wave.dtype]
    if wave.dtype == torch.float32:
        possible += [torch.bfloat16, torch.float16]
    if out_dtype not in possible:
        raise TypeError(
            f"{op}: out_dtype must be wave's dtype, or bfloat16 / float16 for a float32 wave; "
            f"got {out_dtype} for {wave.dtype}"
        )


def _check_lengths(wave: Tensor, lengths: Tensor | None) -> None:
    if lengths is None or lengths.device.type != "cpu" or not lengths.numel():
        return
    low, high = int(lengths.min()), int(lengths.max())
    require(
        low >= 1 and high <= wave.shape[1],
        f"lift_patchify: lengths must lie in [1, {wave.shape[1]}], got [{low}, {high}]",
    )


def _outputs(wave: Tensor, token_size: int, tokens: int, out_dtype: torch.dtype | None) -> Tensor:
    return wave.new_empty((wave.shape[0], tokens, token_size), dtype=out_dtype or wave.dtype)


def _gain(
    wave: Tensor, lengths: Tensor | None, levels: Tensor | None, target_rms: float
) -> tuple[Tensor, ...]:
    """The masked wave (b t); (b 1) gain, divisor, sum of squares, peak, audible, peak rule."""
    x = wave.to(compute_dtype(wave.dtype))
    count: Any = x.shape[1]
    if lengths is not None:
        x = torch.where(torch.arange(x.shape[1], device=x.device) < lengths[:, None], x, 0.0)
        count = lengths[:, None]
    power, peak = x.square().sum(1, keepdim=True), x.abs().amax(1, keepdim=True)
    mean_square = power / count
    if levels is not None:
        mean_square, peak = levels.split(1, dim=1)
    rms = mean_square.sqrt()
    audible = rms > 1e-8
    gain = torch.where(audible, target_rms / rms, 1.0)
    lifted_rms = torch.where(audible, target_rms, rms)
    fit = (peak * gain > 1) & (lifted_rms / (peak * gain) > 0.3)
    return x, gain, torch.where(fit, peak * gain, 1.0), power, peak, audible, fit


def reference(
    wave: Tensor,  # b t
    lengths: Tensor | None,  # b
    levels: Tensor | None,  # b 2
    token_size: int,
    tokens: int,
    target_rms: float,
    audio_scale: float,
    out_dtype: torch.dtype | None,
) -> Tensor:  # b n d
    x, gain, divisor, *_ = _gain(wave, lengths, levels, target_rms)
    y = (x * gain / divisor).clamp(-1, 1) * audio_scale
    kept = tokens * token_size
    y = torch.nn.functional.pad(y[:, :kept], (0, max(kept - y.shape[1], 0)))
    return y.view(-1, tokens, token_size).to(out_dtype or wave.dtype)


def _launch(
    out: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    levels: Tensor | None,
    token_size: int,
    tokens: int,
    target_rms: float,
    audio_scale: float,
) -> None:
    batch, samples = wave.shape
    if not batch:
        return
    wave, lengths, levels = dense(wave, lengths, levels)
    partials = None
    if wave.device.type == "cuda" and levels is None:
        chunks = -(-samples // _CHUNK)
        partials = wave.new_empty(batch * chunks * 2, dtype=compute_dtype(wave.dtype))
    C.lift_patchify(
        target(wave),
        DTYPE_CODE[wave.dtype],
        DTYPE_CODE[out.dtype],
        address(wave),
        address(lengths),
        address(levels),
        address(out),
        address(partials),
        batch,
        samples,
        tokens * token_size,
        target_rms,
        audio_scale,
    )


def _setup_context(
    ctx: Any,
    output: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    levels: Tensor | None,
    target_rms: float,
    audio_scale: float,
) -> None:
    ctx.save_for_backward(wave, lengths, levels)
    ctx.target_rms, ctx.audio_scale = target_rms, audio_scale


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    # y = s clamp(g x). dy/dx has a direct part s g and a part through g: with the RMS rule
    # dg/dx_i = -g x_i / sum x^2; with the peak rule g = 1 / max|x| and only the peaks count.
    wave, lengths, levels = ctx.saved_tensors
    x, gain, divisor, power, peak, audible, fit = _gain(wave, lengths, levels, ctx.target_rms)
    g = gain / divisor
    grad = grad.flatten(1).to(x.dtype)[:, : x.shape[1]] * ctx.audio_scale
    grad = torch.nn.functional.pad(grad, (0, x.shape[1] - grad.shape[1]))
    grad = torch.where((x * gain / divisor).abs() <= 1, grad, 0.0)
    d_wave = grad * g
    if levels is None:
        through_gain = (grad * x).sum(1, keepdim=True)
        peaks = (x.abs() == peak).to(x.dtype)
        d_fit = -g.square() * x.sign() * peaks / peaks.sum(1, keepdim=True)
        d_rms = torch.where(audible, -g * x / power, 0.0)
        d_wave = d_wave + through_gain * torch.where(fit, d_fit, d_rms)
    if lengths is not None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        d_wave = torch.where(inside, d_wave, 0.0)
    return {"wave": d_wave.to(wave.dtype)}


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def wave(batch: int, samples: int, level: float) -> Tensor:
        x = torch.randn(batch, samples, generator=generator, dtype=torch.float64) * level
        return x.to(device, dtype)

    peaky = wave(2, 997, 0.05)
    peaky[:, ::97] = 0.8
    square = wave(2, 640, 1e-3) + torch.where(torch.arange(640, device=device) % 40 < 20, 0.4, -0.4)
    lengths = torch.tensor([300, 1, 211], device=device)
    levels = torch.tensor([[0.01, 0.9], [0.16, 0.4], [0.0, 0.0]], device=device)
    levels = levels.to(compute_dtype(dtype))
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    return [
        Sample((wave(3, 1000, 0.1), None, None, 40, 25, 0.33, 3.0, None), (0,), "even"),
        Sample((wave(3, 300, 0.02), lengths, None, 7, 50, 0.33, 3.0, None), (0,), "lengths"),
        Sample((wave(3, 300, 0.1), lengths, levels, 7, 50, 0.33, 3.0, None), (0,), "levels"),
        Sample((peaky, None, None, 10, 30, 0.33, 3.0, None), (0,), "peaky and cropped"),
        Sample((square.to(dtype), None, None, 16, 40, 0.33, 1.0, dtype), (0,), "peak rule"),
        Sample(
            (torch.zeros(1, 50, device=device, dtype=dtype), None, None, 10, 5, 0.33, 3.0, dtype),
            (),
            "silence",
        ),
        Sample((wave(2, 40_000, 0.1), None, None, 200, 199, 0.33, 3.0, half), (), "several blocks"),
        Sample((wave(0, 10, 0.1), None, None, 5, 2, 0.33, 3.0, dtype), (), "empty batch"),
    ]


def _workload(batch: int) -> Workload:
    """Clips of 8 s at 16 kHz, lifted to 640 tokens of the given dtype."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        wave = 0.1 * torch.randn(batch, 128_000, device=device, dtype=compute_dtype(dtype))
        return wave, None, None, 200, 640, 0.33, 3.0, dtype

    return make


OP = Op(
    name="lift_patchify",
    schema=(
        "(Tensor wave, Tensor? lengths, Tensor? levels, SymInt token_size, SymInt tokens, "
        "float target_rms, float audio_scale, ScalarType? out_dtype) -> Tensor"
    ),
    reference=reference,
    check=_check,
    check_values=_check_lengths,
    outputs=_outputs,
    launch={"cpp": _launch},
    supported={"cpp": ON_BOTH},
    samples=_samples,
    workloads={f"{batch} clips of 8 s": _workload(batch) for batch in (8, 256)},
    # Read for the level, read again to write: a clip does not stay on chip.
    bytes=lambda wave, levels, token_size, tokens, out_dtype: (
        (2 if levels is None else 1) * wave.nbytes
        + wave.shape[0] * tokens * token_size * (out_dtype or wave.dtype).itemsize
    ),
    flops=lambda wave: 8 * wave.numel(),
    tolerance="reduction",
    setup_context=_setup_context,
    backward=_backward,
)


def lift_patchify(
    wave: Tensor,  # b t
    lengths: Tensor | None = None,  # b
    *,
    levels: Tensor | None = None,  # b 2
    token_size: int,
    tokens: int,
    target_rms: float = 0.33,
    audio_scale: float = 3.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # b n d
    """Lift the loudness of each clip to a target RMS and cut it into tokens.

    Args:
        wave: (b, t) mono audio, nominally in [-1, 1]; float32, float64, bfloat16 or float16.
        lengths: (b,) int64 valid samples of each row, each in [1, t]; None: all. The level is
            measured over the whole valid row, before cropping.
        levels: (b, 2) mean square and peak of the recordings that rows are windows of, which are
            lifted as these are; float32 (float64 for a float64 wave), without gradient. None: of
            the rows themselves.
        token_size: d, samples per token.
        tokens: n; rows are zero-padded or cropped on the right to n * d samples.
        target_rms: level after lifting, where the clip's RMS exceeds 1e-8.
        audio_scale: factor applied after clamping to [-1, 1].
        out_dtype: wave's dtype by default; bfloat16 or float16 for a float32 wave.

    Returns:
        (b, n, d) tokens.

    Raises:
        ValueError: shapes, sizes or lengths that do not fit, or empty audio.
        TypeError: an unsupported dtype.

    Source: WavFlow (arXiv 2605.18749), amplitude lifting and waveform patchify.
    """
    return OP(wave, lengths, levels, token_size, tokens, target_rms, audio_scale, out_dtype)
