r"""Convolution over tokens with zero padding that keeps their number, channels last.

:math:`z_{n,o} = \beta_o + \sum_{j,c} w_{o,c,j}\, x_{n + j - \lfloor k/2 \rfloor,\, c}`;
the result is :math:`z`, :math:`\mathrm{selu}(z)`, or :math:`r_n + g_{i(n)} z_n` with a residual r
and gate rows g that an index i gathers. Width 1 is a Linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _panels, _tuned, cpu
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import triton_launch
from .._registry import ON_BOTH, ON_TRITON, Op, Sample, no_double_backward, normals
from . import prepared_conv
from .prepared_conv import PreparedConv

if TYPE_CHECKING:
    from .._rows import TokenRows

# Klambauer et al., "Self-Normalizing Neural Networks" (arXiv 1706.02515).
SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
COMPILED = {"cpu": frozenset(FLOATS) - {torch.float64}}  # in float32, rounded once


def check_convolution(
    op: str, x: Tensor, bias: Tensor | None = None, grad: Tensor | None = None, **weights: Tensor
) -> dict[str, int]:
    """Bind b, n, c, o, k of x (b n c) and weights (o c k), and check them and the dtypes.

    A bias is (o), a gradient (b n o).
    """
    named = {name: (weight, "o c k") for name, weight in weights.items()}
    sizes = check(op, x=(x, "b n c"), **named, bias=(bias, "o"), grad=(grad, "b n o"))
    check_dtype(op, "x", x, *FLOATS)
    check_dtype(op, "bias", bias, x.dtype)
    check_dtype(op, "grad", grad, x.dtype)
    for name, weight in weights.items():
        check_dtype(op, name, weight, x.dtype)
    for name, dim in (("tokens", "n"), ("channels", "c"), ("output channels", "o")):
        require(sizes[dim] > 0, f"{op}: there must be at least one of the {name}, got none")
    require(sizes["k"] % 2 == 1, f"{op}: the width of the weight must be odd, got {sizes['k']}")
    return sizes


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, selu: bool, *after: Any) -> None:
    check_convolution("conv1d", x, bias, weight=weight)
    if any(t is not None for t in after):
        z = x[..., :1].expand(*x.shape[:2], weight.shape[0])
        check_finish(z, selu, *after)


def check_finish(
    z: Tensor,
    selu: bool,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_index: Tensor | None,
) -> None:
    """Check what is done to the convolution z (b n o) against it."""
    op = "conv1d"
    sizes = check(
        op,
        z=(z, "b n o"),
        residual=(residual, "b n o"),
        gate=(gate, "b r o"),
        gate_index=(gate_index, "n"),
    )
    check_dtype(op, "residual", residual, z.dtype)
    check_dtype(op, "gate", gate, z.dtype)
    check_dtype(op, "gate_index", gate_index, torch.int32)
    require(not selu or residual is None, f"{op}: an activation and a residual exclude each other")
    require(gate is None or residual is not None, f"{op}: a gate needs a residual")
    require(gate_index is None or gate is not None, f"{op}: gate_rows need a gate")
    require(
        gate is None or gate_index is not None or sizes["r"] == 1,
        f"{op}: gate must have one row where no gate_rows are given, got {sizes.get('r')}",
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of (b n c) and (o c k), (b n o), computed wide and rounded once."""
    wide = compute_dtype(x.dtype)
    z = F.conv1d(
        x.to(wide).transpose(1, 2),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        padding=weight.shape[2] // 2,
    )
    return z.transpose(1, 2).to(x.dtype)


def _gate_rows(gate: Tensor, gate_index: Tensor | None) -> Tensor:  # b n|1 o
    return gate if gate_index is None else gate.index_select(1, gate_index)


def _finish(
    z: Tensor,  # b n o
    selu: bool,
    residual: Tensor | None,  # b n o
    gate: Tensor | None,  # b r o
    gate_index: Tensor | None,  # n
) -> Tensor:  # b n o
    """Apply SELU to the convolution z, or gate it and add a residual."""
    if selu:
        return F.selu(z)
    if residual is None:
        return z
    wide = compute_dtype(z.dtype)
    out = z.to(wide)
    if gate is not None:
        out = out * _gate_rows(gate.to(wide), gate_index)
    return (residual.to(wide) + out).to(z.dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *after: Any) -> Tensor:  # b n o
    return _finish(plain(x, weight, bias), *after).contiguous()


class _OnCpu(torch.autograd.Function):
    """:func:`_on_cpu` with the gradients of :func:`convolve_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _on_cpu(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return convolve_backward(grad, x, weight, ctx.needs_input_grad)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = cpu.product_dtype(x.dtype)
    if wide != x.dtype:
        added = None if bias is None else bias.to(wide)
        return _on_cpu(x.to(wide), weight.to(wide), added).to(x.dtype)
    (o, c, k), tokens = weight.shape, x.shape[0] * x.shape[1]
    # F.conv1d copies tokens to channels-first and back, a picture copies weights to channels-last.
    # In float32 the former has a third of the latter's rounding error, at up to 1.6 times its time.
    if k > 1 and x.dtype.itemsize == 2 and 4 * tokens * (c + o) > weight.numel():
        return _picture(x, weight, bias)
    if k > 1:
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=k // 2).transpose(1, 2)
    weight = weight.squeeze(2)
    if x.dtype == torch.float32 and prepared_conv.fast(x) and not torch.compiler.is_compiling():
        # MKL, where F.linear goes, runs at half of oneDNN's speed on AMD CPUs. Inductor lowers
        # oneDNN's call with constant weights only.
        return prepared_conv.linear(x.contiguous(), weight.contiguous(), bias)
    return F.linear(x, weight, bias)


def _picture(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve a height-1 picture, channels-last in memory: oneDNN and cuDNN copy nothing."""
    padding = (0, weight.shape[2] // 2)
    z = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), bias, padding=padding)
    return z.squeeze(2).transpose(1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution (b n o) by torch's libraries, in the form that suits them best."""
    if x.device.type == "cpu":
        given = (x, weight, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            return _OnCpu.apply(*given)
        return _on_cpu(*given)
    if weight.shape[2] == 1:
        return F.linear(x, weight.squeeze(2), bias)
    return _picture(x, weight, bias)


def library(x: Tensor, weight: Tensor, bias: Tensor | None, *after: Any) -> Tensor:
    """Call oneDNN or cuDNN, and torch's elementwise operations after it."""
    return _finish(convolve(x, weight, bias), *after)


def _launch(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *after: Any) -> None:
    selu, residual, *_ = after
    done = out.dtype == torch.float32 and not selu and residual is None
    x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    z = _panels.multiply(x, _panels.pack(weight), len(weight), bias, out if done else None)
    if not done:
        out.copy_(_finish(z, *after))


# Weights from which their gradient is one matrix product: oneDNN's own takes 1.2 to 4 times as long
# at the medium model's sizes, half to all of the product's time at an eighth of its channels.
_WIDE = 1 << 20


def convolve_backward(
    grad: Tensor,  # b n o
    x: Tensor,  # b n c
    weight: Tensor,  # o c k
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve` in x, weight and bias, by torch's libraries; None unneeded."""
    on_cpu, k = x.device.type == "cpu", weight.shape[2]
    wide = cpu.product_dtype(x.dtype) if on_cpu else x.dtype
    if wide != x.dtype:
        made = convolve_backward(grad.to(wide), x.to(wide), weight.to(wide), needs)
        d_x, d_weight, d_bias = (None if d is None else d.to(x.dtype) for d in made)
        return d_x, d_weight, d_bias
    d_x = d_weight = None
    x_needs, weight_needs, bias_needs = needs
    products = k == 1 and not (on_cpu and x.dtype == torch.float32)
    if weight_needs and (products or (on_cpu and weight.numel() >= _WIDE)):
        d_weight = _weight_gradient(grad, x, k)
        weight_needs = False
    if x_needs and products:
        d_x = torch.matmul(grad, weight.squeeze(2))
        x_needs = False
    d_bias = _bias_gradient(grad) if bias_needs else None
    if x_needs or weight_needs:
        d_picture, d_taps, _ = torch.ops.aten.convolution_backward(
            *(t.transpose(1, 2).unsqueeze(2) for t in (grad, x)),
            weight.unsqueeze(2),
            None,
            [1, 1],
            [0, k // 2],
            [1, 1],
            False,
            [0, 0],
            1,
            [x_needs, weight_needs, False],
        )
        d_x = d_picture.squeeze(2).transpose(1, 2) if x_needs else d_x
        d_weight = d_taps.squeeze(2).contiguous() if weight_needs else d_weight
    return d_x, d_weight, d_bias


def _bias_gradient(grad: Tensor) -> Tensor:  # b n o -> o
    return grad.to(compute_dtype(grad.dtype)).sum((0, 1)).to(grad.dtype)


def _weight_gradient(grad: Tensor, x: Tensor, k: int) -> Tensor:  # o c k
    """Multiply the gradient (b n o) with the k tokens of x (b n c) that each output saw."""
    seen = F.pad(x, (0, 0, k // 2, k // 2)).unfold(1, k, 1) if k > 1 else x.unsqueeze(3)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        grad, seen = grad.flatten(0, 1).t(), seen.permute(2, 3, 0, 1).flatten(2)
        return convolve(grad[None], seen.flatten(0, 1)[..., None])[0].unflatten(1, (-1, k))
    return (grad.flatten(0, 1).t() @ seen.flatten(0, 1).flatten(1)).unflatten(1, (-1, k))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution (b n o) alone, the fastest way, for a backward that needs it again."""
    if x.device.type == "cpu" and _panels.fastest(x.dtype):
        return OP.torch_op(x, weight, bias, False, None, None, None)
    return convolve(x, weight, bias)


def gradients(
    grad: Tensor,  # b n o
    x: Tensor,  # b n c
    weight: Tensor,  # o c k
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution in x, weight and bias, the fastest way; None unneeded."""
    if x.device.type != "cpu" or not _panels.fastest(x.dtype):
        return convolve_backward(grad, x, weight, needs)
    x_needs, weight_needs, bias_needs = needs
    d_x, d_weight = BACKWARD.torch_op(grad, x, weight, x_needs, weight_needs)
    return (
        d_x if x_needs else None,
        d_weight if weight_needs else None,
        _bias_gradient(grad) if bias_needs else None,
    )


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    check_convolution("conv1d_backward", x, grad=grad, weight=weight)


def _outputs_backward(
    x: Tensor, weight: Tensor, x_needs: bool, weight_needs: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if x_needs else 0),
        x.new_empty(weight.shape if weight_needs else 0),
    )


def _reference_backward(
    grad: Tensor,  # b n o
    x: Tensor,  # b n c
    weight: Tensor,  # o c k
    x_needs: bool,
    weight_needs: bool,
) -> tuple[Tensor, Tensor]:  # b n c, or 0; o c k, or 0
    wide, k = compute_dtype(x.dtype), weight.shape[2]
    made = torch.ops.aten.convolution_backward(
        *(t.to(wide).transpose(1, 2) for t in (grad, x)),
        weight.to(wide),
        None,
        [1],
        [k // 2],
        [1],
        False,
        [0],
        1,
        [x_needs, weight_needs, False],
    )
    d_x = made[0].transpose(1, 2) if x_needs else x.new_empty(0)
    d_weight = made[1] if weight_needs else x.new_empty(0)
    return d_x.to(x.dtype).contiguous(), d_weight.to(x.dtype).contiguous()


def _launch_backward(
    out: tuple[Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_needs: bool,
    weight_needs: bool,
) -> None:
    grad, x, weight = (t.float() for t in (grad, x, weight))
    d_x, d_weight = out if out[0].dtype == torch.float32 else (None, None)
    if x_needs:
        packed = _panels.pack(weight, transposed=True)
        made = _panels.multiply(grad, packed, x.shape[2], out=d_x)
        if made is not d_x:
            out[0].copy_(made)
    if weight_needs:
        made = _panels.weight_gradient(grad, x, weight.shape[2], out=d_weight)
        if made is not d_weight:
            out[1].copy_(made)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def arguments(b: int, n: int, c: int, o: int, k: int, bias: bool = True) -> tuple[Any, ...]:
        weight = normal(o, c, k) * (c * k) ** -0.5
        return normal(b, n, c), weight, normal(o) if bias else None

    none = (None, None, None)
    every, x_w = (0, 1, 2), (0, 1)
    index = torch.tensor([0, 0, 1, 3, 3, 3, 4], dtype=torch.int32, device=device)
    gate = normal(2, 5, 120)[..., 40:80]  # a chunk of a modulation
    strided = list(arguments(2, 9, 16, 16, 3))
    strided[0] = normal(2, 9, 40)[..., 8:24]
    broadcast = list(arguments(3, 5, 16, 8, 3))
    broadcast[0] = normal(1, 5, 16).expand(3, 5, 16)
    transposed = list(arguments(2, 6, 10, 4, 3))
    transposed[0] = normal(2, 10, 6).transpose(1, 2)
    return [
        Sample((*arguments(2, 37, 24, 40, 3), False, *none), every, "width 3"),
        Sample((*arguments(2, 7, 33, 17, 7), True, *none), every, "width 7, odd sizes, SELU"),
        Sample((*arguments(2, 19, 64, 48, 1, False), False, *none), x_w, "width 1"),
        Sample((*arguments(1, 5, 30, 20, 1), True, *none), every, "width 1, SELU"),
        Sample(
            (*arguments(2, 7, 16, 40, 3), False, normal(2, 7, 40), gate, index),
            (0, 1, 2, 4, 5),
            "residual, gate rows",
        ),
        Sample(
            (*arguments(2, 6, 16, 24, 1, False), False, normal(2, 6, 24), normal(2, 1, 24), None),
            (0, 1, 4, 5),
            "residual, one gate",
        ),
        Sample(
            (*arguments(1, 4, 8, 8, 3, False), False, normal(1, 4, 8), None, None),
            (0, 1, 4),
            "residual",
        ),
        Sample((*strided, False, *none), every, "strided"),
        Sample((*broadcast, False, *none), every, "one item for the batch"),
        Sample((*transposed, False, *none), every, "channels apart"),
        Sample((*arguments(2, 2, 8, 8, 7, False), False, *none), x_w, "wider than the sequence"),
        Sample((*arguments(2, 1, 16, 16, 3), False, *none), every, "one token"),
        Sample((*arguments(0, 4, 8, 8, 3), False, *none), (), "empty batch"),
    ]


def key(x: Tensor, weight: Tensor, kind: str = "") -> str:
    """What decides the speed of a call: the key of its row in the tuning tables."""
    o, c, k = weight.shape
    tokens = _tuned.up_to_power_of_two(x.shape[0] * x.shape[1])
    return f"{str(x.dtype)[6:]} k{k} c{c} o{o} n{tokens}{kind}"


def _prefer(x: Tensor, weight: Tensor, selu: bool, residual: Tensor | None) -> str | None:
    if x.device.type == "cpu":
        return "cpp" if _panels.fastest(x.dtype) else "library"
    kind = " selu" if selu else "" if residual is None else " residual"
    return _tuned.lookup("conv1d", x.device, key(x, weight, kind)).get("backend", "library")


def _setup_context(
    ctx: Any,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selu: bool,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_index: Tensor | None,
) -> None:
    ctx.selu, ctx.has_bias, ctx.has_residual = selu, bias is not None, residual is not None
    kept_bias = bias if OP.needs(ctx, "gate") else None
    ctx.save_for_backward(x, weight, kept_bias, gate, gate_index, output if selu else None)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    x, weight, bias, gate, gate_index, out = ctx.saved_tensors
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    d_z, d_gate = grad, None
    if ctx.selu:
        # selu'(z) = scale where z > 0, else scale alpha e^z = selu(z) + scale alpha.
        y = out.to(wide)
        slope = torch.where(y > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA)
        d_z = (grad.to(wide) * slope).to(dtype)
    if gate is not None:
        d_z = (grad.to(wide) * _gate_rows(gate, gate_index).to(wide)).to(dtype)
    if OP.needs(ctx, "gate"):
        # Computed again: keeping z would cost (b n o) from every forward for a gradient that only
        # this argument needs, and (out - residual) / gate loses it where the gate is small.
        product = grad.to(wide) * convolved(x, weight, bias).to(wide)
        if gate_index is None:
            d_gate = product.sum(1, keepdim=True)
        else:
            rows = torch.arange(gate.shape[1], device=gate.device)
            # A matrix product in place of scattered additions, whose order is not fixed on a GPU.
            d_gate = (rows[:, None] == gate_index).to(wide) @ product
        d_gate = d_gate.to(dtype)
    needs_x, needs_weight, needs_bias = (OP.needs(ctx, name) for name in ("x", "weight", "bias"))
    d_x, d_weight, d_bias = gradients(
        d_z, x, weight, (needs_x, needs_weight, ctx.has_bias and needs_bias)
    )
    d_residual = grad if ctx.has_residual and OP.needs(ctx, "residual") else None
    return {"x": d_x, "weight": d_weight, "bias": d_bias, "residual": d_residual, "gate": d_gate}


def flops(x: Tensor, weight: Tensor) -> int:
    return 2 * x.shape[0] * x.shape[1] * weight.numel()


def _bytes(x: Tensor, weight: Tensor, residual: Tensor | None) -> int:
    out = x.shape[0] * x.shape[1] * weight.shape[0] * x.itemsize
    return x.nbytes + weight.nbytes + out * (1 if residual is None else 2)


def _workload(b: int, n: int, c: int, o: int, k: int, *, selu: bool = False, rows: int = 0) -> Any:
    """A call of (b n c) with an (o c k) weight; rows > 0: with a residual and that many gates."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        weight = normal(o, c, k) * (c * k) ** -0.5
        if not rows:
            return normal(b, n, c), weight, normal(o), selu, None, None, None
        gate = normal(b, rows, 6 * o).chunk(6, -1)[2]
        index = (torch.arange(n, device=device) * rows // n).int() if rows > 1 else None
        return normal(b, n, c), weight, normal(o), selu, normal(b, n, o), gate, index

    return make


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator, made = torch.Generator().manual_seed(seed + 1), []
    for i, sample in enumerate(_samples(device, dtype, seed)):
        x, weight = sample.args[:2]
        shape = *x.shape[:2], len(weight)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        needs = ((True, True), (True, False), (False, True))[i % 3]
        made.append(Sample((grad, x, weight, *needs), (), sample.name))
    return made


def _workload_backward(b: int, n: int, c: int, o: int, k: int) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        grad, x = (torch.randn(b, n, m, device=device, dtype=dtype) for m in (o, c))
        return grad, x, torch.randn(o, c, k, device=device, dtype=dtype), True, True

    return make


BACKWARD = Op(
    name="conv1d_backward",
    schema=(
        "(Tensor grad, Tensor x, Tensor weight, bool x_needs, bool weight_needs) "
        "-> (Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward},
    supported={"cpp": COMPILED},
    samples=_samples_backward,
    workloads={
        "demo": _workload_backward(16, 200, 96, 256, 3),
        "demo, width 7": _workload_backward(16, 200, 96, 1024, 7),
        "c256": _workload_backward(4, 640, 256, 768, 3),
    },
    bytes=lambda grad, x, weight: 2 * (grad.nbytes + x.nbytes + weight.nbytes),
    flops=lambda x, weight, x_needs, weight_needs: (x_needs + weight_needs) * flops(x, weight),
    tolerance="matrix",
    backward=no_double_backward("conv1d"),
    internal=True,
)


OP = Op(
    name="conv1d",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, bool selu, Tensor? residual, Tensor? gate, "
        "Tensor? gate_index) -> Tensor"
    ),
    reference=reference,
    check=_check,
    outputs=lambda x, weight: x.new_empty(*x.shape[:2], weight.shape[0]),
    launch={"cpp": _launch, "triton": triton_launch("conv1d", "forward")},
    library=library,
    supported={"cpp": COMPILED, "triton": ON_TRITON, "library": ON_BOTH},
    prefer=_prefer,
    samples=_samples,
    workloads={
        "projection 16k": _workload(2, 640, 896, 896, 3, rows=192),
        "down 16k": _workload(2, 640, 2560, 896, 3, rows=192),
        "down 44k b16": _workload(16, 1764, 2560, 896, 3, rows=192),
        "down clip": _workload(2, 64, 2560, 896, 3, rows=1),
        "audio in": _workload(1, 640, 200, 896, 7, selu=True),
        "audio out": _workload(2, 640, 896, 200, 7),
        "qkv": _workload(2, 640, 896, 2688, 1),
        "modulation": _workload(2, 192, 896, 5376, 1),
    },
    bytes=_bytes,
    flops=flops,
    tolerance="matrix",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight", "bias", "residual", "gate"),
    bulk=("x", "weight", "residual"),
)


def conv1d(
    x: Tensor,  # b n c
    weight: Tensor | PreparedConv,  # o c k, or o c
    bias: Tensor | None = None,  # o
    *,
    activation: str | None = None,
    residual: Tensor | None = None,  # b n o
    gate: Tensor | None = None,  # b r o
    gate_rows: TokenRows | None = None,
) -> Tensor:  # b n o
    """Convolve over tokens, zero-padded by k // 2, with bias, SELU or a gated residual.

    Args:
        x: (b, n, c) tokens, any float dtype, any strides.
        weight: (o, c, k) with an odd width k, or (o, c) for a Linear; dtype of x. Or what
            :func:`prepare_conv` made of it: then there is no gradient.
        bias: (o,) in the dtype of x.
        activation: "selu" or None.
        residual: (b, n, o): the result is residual + gate * convolution. Excludes an activation.
        gate: (b, r, o) rows of gates; None: 1.
        gate_rows: which row each token takes, from :func:`token_rows`; None: r = 1.

    Returns:
        (b, n, o) in the dtype of x. Differentiable once in x, weight, bias, residual and gate.

    Raises:
        ValueError: shapes that do not fit, an even width, an unknown activation, no token.
        TypeError: an unsupported dtype.
    """
    require(
        activation in (None, "selu"),
        f"conv1d: activation must be None or 'selu', got '{activation}'",
    )
    index = None if gate_rows is None else getattr(gate_rows, "index", None)
    if gate_rows is not None and not isinstance(index, Tensor):
        raise TypeError(f"conv1d: gate_rows must be TokenRows, got {type(gate_rows).__name__}")
    selu = activation is not None
    if isinstance(weight, PreparedConv):
        require(not weight.gated, "conv1d: weight was prepared for conv_swiglu")
        if weight.packed:
            z = prepared_conv.call("conv1d", x, weight, bias)
            check_finish(z, selu, residual, gate, index)
            return _finish(z, selu, residual, gate, index)
        weight = prepared_conv.weights_for("conv1d", x, weight)[0]
    if isinstance(weight, Tensor) and weight.dim() == 2:
        weight = weight.unsqueeze(2)
    return OP(x, weight, bias, selu, residual, gate, index)
