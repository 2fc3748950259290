r"""Convolutions with weights prepared for inference: laid out for a product, joined, or Winograd's.

Winograd's F(2,3) computes two outputs of a width-3 convolution from four inputs d by four products
in place of six (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv
1509.09308): :math:`y_0 = m_0 + m_1 + m_2`, :math:`y_1 = m_1 - m_2 - m_3` with
:math:`m_0 = (d_0 - d_2) g_0`, :math:`m_1 = (d_1 + d_2)(g_0 + g_1 + g_2)/2`,
:math:`m_2 = (d_2 - d_1)(g_0 - g_1 + g_2)/2`, :math:`m_3 = (d_1 - d_3) g_2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _panels, cpu
from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, target
from .._registry import Op, Sample, Workload, normals
from . import swiglu

_HINT = 512  # tokens that oneDNN is told to lay weights out for; any number works
# Elements of the weights from which Winograd is worth its rounding error in float32.
_WIDE = 1 << 20


def _check(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, gated: bool) -> None:
    op = "prepared_conv"
    check_dtype(op, "x", x, *FLOATS)
    require(len(weights) in (1, 4), f"{op}: weights must be 1 or 4, got {len(weights)}")
    dims = {3: f"p d {_panels.WIDTH}", 4: "o c 1 k"}.get(weights[0].dim(), "o c")
    require(len(weights) == 1 or dims != "o c 1 k", f"{op}: 4 weights are (o, c) or panels")
    named = {f"weights[{i}]": (w, dims) for i, w in enumerate(weights)}
    sizes = check(op, x=(x, "b n c"), **named)
    c = max(sizes["c"], 1)
    if "d" in sizes:
        require(
            sizes["d"] % c == 0 and (len(weights) == 1 or sizes["d"] == c),
            f"{op}: panels of depth {sizes['d']} do not fit {c} channels",
        )
        sizes |= {"o": sizes["p"] * _panels.WIDTH, "k": sizes["d"] // c}
    found = sizes["o"] if bias is None else tuple(bias.shape)
    require(found in (sizes["o"], (sizes["o"],)), f"{op}: bias must be ({sizes['o']}), got {found}")
    for i, weight in enumerate(weights):
        check_dtype(op, f"weights[{i}]", weight, x.dtype)
    check_dtype(op, "bias", bias, x.dtype)
    for name, dim in (("tokens", "n"), ("channels", "c"), ("output channels", "o")):
        require(sizes[dim] > 0, f"{op}: there must be at least one of the {name}, got none")
    width = sizes.get("k", 1)
    require(width % 2 == 1, f"{op}: the width of the weight must be odd, got {width}")
    require(
        not gated or sizes["o"] % 2 == 0,
        f"{op}: a gate needs an even number of output channels, got {sizes['o']}",
    )


def _channels(weights: Sequence[Tensor]) -> int:
    """How many output channels the weights have, before a gate."""
    return weights[0].shape[0] * (_panels.WIDTH if weights[0].dim() == 3 else 1)


def _outputs(x: Tensor, weights: Sequence[Tensor], gated: bool) -> Tensor:
    channels = _channels(weights)
    return x.new_empty(*x.shape[:2], channels // 2 if gated else channels)


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.to_dense() if weight.is_mkldnn else weight).to(dtype)


def reference(
    x: Tensor,  # b n c
    weights: Sequence[Tensor],  # one: o c 1 k, o c or panels; or 4, transformed: o c or panels
    bias: Tensor | None,  # o
    gated: bool,
) -> Tensor:  # b n o, or half of o
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    w, x = [_dense(weight, wide) for weight in weights], x.to(wide)
    if w[0].dim() == 3:
        w = [_panels.unpacked(weight, x.shape[2]) for weight in w]
        w = [weight.squeeze(2) if len(w) == 4 else weight.unsqueeze(2) for weight in w]
    if len(w) == 4:
        n = x.shape[1]
        d = F.pad(x, (0, 0, 1, 2 + n % 2))
        d0, d1, d2, d3 = (d[:, i : i + n + n % 2 : 2] for i in range(4))
        # Transformed inputs and products are rounded, as factors and results of matrix products.
        u = [t.to(dtype).to(wide) for t in (d0 - d2, d1 + d2, d2 - d1, d1 - d3)]
        m = [F.linear(a, b).to(dtype).to(wide) for a, b in zip(u, w, strict=True)]
        y = torch.stack((m[0] + m[1] + m[2], m[1] - m[2] - m[3]), 2).flatten(1, 2)[:, :n]
    elif w[0].dim() == 2:
        y = F.linear(x, w[0])
    else:
        width = w[0].shape[3]
        y = F.conv1d(x.transpose(1, 2), w[0].squeeze(2), padding=width // 2).transpose(1, 2)
    y = y if bias is None else y + bias.to(wide)
    if gated:
        y = y if len(w) == 4 else y.to(dtype).to(wide)
        a, b = y.chunk(2, -1)
        y = F.silu(a) * b
    return y.to(dtype).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call oneDNN's ``F.linear``, where :func:`fast`; tensors are dense or in its layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _winograd(
    out: Tensor, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, gated: bool
) -> None:
    b, n, c = x.shape
    code, where = DTYPE_CODE[x.dtype], target(x)
    inputs = x.new_empty(4, b * ((n + 1) // 2), c)
    C.winograd_input(where, code, address(x), address(inputs), b, n, c)
    outputs = _channels(weights)
    products = [
        _panels.multiply(u[None], w, outputs) if w.dim() == 3 else linear(u, w).contiguous()
        for u, w in zip(inputs.unbind(), weights, strict=True)
    ]
    C.winograd_output(
        where,
        code,
        [address(m) for m in products],
        address(None if bias is None else bias.contiguous()),
        address(out),
        gated,
        b,
        n,
        outputs,
    )


def _launch(
    out: Tensor, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, gated: bool
) -> None:
    if not out.numel():
        return
    # The product of panels is float32's.
    wide = torch.float32 if weights[0].dim() == 3 else cpu.product_dtype(x.dtype)
    if wide != x.dtype:
        made = out.new_empty(out.shape, dtype=wide)
        given = [w.to(wide) for w in weights], None if bias is None else bias.to(wide)
        _launch(made, x.to(wide), *given, gated)
        out.copy_(made)
        return
    # oneDNN's choice of a kernel, and with it the last bits, would follow the strides.
    x = x.contiguous()
    weights = [w if w.is_mkldnn else w.contiguous() for w in weights]
    if len(weights) == 4:
        return _winograd(out, x, weights, bias, gated)
    if weights[0].dim() == 3:
        z = _panels.multiply(x, weights[0], _channels(weights), bias, None if gated else out)
        return swiglu.launch(out, *z.chunk(2, -1)) if gated else None
    if weights[0].dim() == 2:
        z = linear(x, weights[0], bias)
    else:
        pad = weights[0].shape[3] // 2
        z = torch.ops.mkldnn._convolution_pointwise(
            # The height-1 picture is channels-last in memory: no copy.
            x.transpose(1, 2).unsqueeze(2),
            weights[0],
            bias,
            [0, pad],
            [1, 1],
            [1, 1],
            1,
            "none",
            [],
            "",
        )
        z = z.squeeze(2).transpose(1, 2)
    if gated:
        swiglu.launch(out, *z.chunk(2, -1))
    else:
        result: Any = z.contiguous()  # torch's type of set_ knows storages alone
        out.set_(result)  # oneDNN has allocated a result already: nothing is copied


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def four(o: int, c: int) -> list[Tensor]:
        return [w.to(dtype) for w in winograd_weights(normal(o, c, 3).double() * (3 * c) ** -0.5)]

    def panels(weight: Tensor) -> Tensor:  # o c k, or o c
        o, c, *_ = weight.shape
        return (
            weight.view(o // _panels.WIDTH, _panels.WIDTH, c, -1).permute(0, 3, 2, 1).flatten(1, 2)
        )

    strided = normal(2, 9, 40)[..., 8:24]
    laid_out = (
        []
        if dtype not in (torch.float32, torch.float64)
        else [
            Sample(
                (normal(2, 37, 24), [panels(normal(96, 24, 3) / 8)], normal(96), True), (), "panels"
            ),
            Sample((strided, [panels(normal(32, 16, 7) / 9)], None, False), (), "panels, width 7"),
            Sample(
                (normal(1, 5, 33), [panels(normal(48, 33) / 5)], normal(48), False), (), "panels, 1"
            ),
            Sample(
                (normal(2, 37, 24), [panels(w) for w in four(96, 24)], normal(96), True),
                (),
                "panels, Winograd, odd length, gate",
            ),
        ]
    )
    return laid_out + [
        Sample((normal(2, 37, 24), [normal(48, 24, 1, 3) / 8], normal(48), True), (), "width 3"),
        Sample((normal(1, 7, 33), [normal(17, 33, 1, 7) / 16], None, False), (), "width 7"),
        Sample((normal(2, 9, 24), [normal(40, 24) / 5], None, True), (), "width 1"),
        Sample((strided, [normal(40, 16) / 4], normal(40), False), (), "width 1, strided"),
        Sample((normal(2, 18, 24), four(40, 24), normal(40), False), (), "Winograd"),
        Sample((normal(2, 37, 24), four(96, 24), None, True), (), "Winograd, odd length, gate"),
        Sample((strided, four(34, 16), None, False), (), "Winograd, strided"),
        Sample((normal(2, 1, 16), four(32, 16), normal(32), True), (), "Winograd, one token"),
        Sample((normal(0, 4, 8), four(8, 8), None, False), (), "empty batch"),
    ]


def winograd_weights(weight: Tensor) -> tuple[Tensor, ...]:  # o c 3
    """The four (o c) weights of F(2,3), in the dtype of the weight."""
    g0, g1, g2 = weight.unbind(2)
    return g0, (g0 + g2 + g1) / 2, (g0 + g2 - g1) / 2, g2


def _transformed(given: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Transform weights (o c 3), one below the other, as :func:`winograd_weights`: (4 o c)."""
    o, c, _ = given[0].shape
    out = torch.empty(4, len(given) * o, c, dtype=dtype)
    for i, weight in enumerate(given):
        weight = weight.detach().float().contiguous()
        rows = [address(part[i * o :]) for part in out.unbind()]
        C.winograd_weight(target(out), DTYPE_CODE[dtype], address(weight), rows, o, c)
    return out


def _picture(given: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Lay out weights (o c k), one below the other, for a height-1 picture: (o c 1 k)."""
    joined = torch.cat([w.detach().to(dtype) for w in given]).unsqueeze(2)
    return _laid_out(joined, given[0].shape[2])


def _workload(winograd: bool) -> Workload:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        b, n, c, inner = 2, 640, 896, 2560
        x = torch.randn(b, n, c, device=device, dtype=dtype)
        pair = [torch.randn(inner, c, 3, device=device) * (3 * c) ** -0.5 for _ in range(2)]
        if not fast(x):  # no layouts of oneDNN's
            joined = torch.cat(pair)
            weights = winograd_weights(joined) if winograd else [joined.unsqueeze(2)]
        elif winograd:
            weights = prepare_conv(pair, dtype=dtype, winograd=True).weights
        else:
            weights = [_picture(pair, dtype)]
        return x, [w if w.is_mkldnn else w.to(dtype) for w in weights], None, True

    return make


OP = Op(
    name="prepared_conv",
    schema="(Tensor x, Tensor[] weights, Tensor? bias, bool gated) -> Tensor",
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch},
    supported={"cpp": {"cpu": frozenset({torch.float32, torch.bfloat16})}},
    samples=_samples,
    workloads={
        "one guided clip, width 3, gate": _workload(winograd=False),
        "one guided clip, width 3, gate, Winograd": _workload(winograd=True),
    },
    bytes=lambda x, weights, gated: (
        x.nbytes
        + sum(w.numel() * x.itemsize for w in weights)
        + x[..., 0].numel() * weights[0].shape[0] * x.itemsize // (2 if gated else 1)
    ),
    flops=lambda x, weights: (
        2 * x[..., 0].numel() * sum(w.numel() for w in weights) // (2 if len(weights) == 4 else 1)
    ),
    tolerance="matrix",
    autocast=("x", "weights", "bias"),
    internal=True,
)


def fast(x: Tensor) -> bool:
    """Whether oneDNN's own entry points run here for x's device and dtype."""
    runs = x.dtype in cpu.current().onednn and x.numel() > 0
    return runs and not _backend.unavailable(OP, "cpp", x.device, x.dtype)


class PreparedConv(NamedTuple):
    """The weights of one convolution, or of a gated pair, as :func:`prepare_conv` makes them.

    They are copies: a change of the parameters needs a new one. Nothing changes them: a deep copy
    shares them. Pickled they are dense, and laid out again where they are read.
    """

    weights: tuple[Tensor, ...]
    width: int
    gated: bool
    packed: bool  # as the op prepared_conv takes them; else cast alone: (o c k), or two of them
    dtype: torch.dtype  # of the activations; packed weights may be wider

    def __deepcopy__(self, memo: object) -> PreparedConv:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        laid_out = tuple(weight.is_mkldnn for weight in self.weights)
        dense = tuple(w.to_dense() if w.is_mkldnn else w for w in self.weights)
        return _read_again, (dense, laid_out, *self[1:])


def _read_again(
    dense: Sequence[Tensor], laid_out: Sequence[bool], width: int, *rest: Any
) -> PreparedConv:
    """Prepared weights out of a pickle: `laid_out` says which were in oneDNN's layout."""
    weights = [_laid_out(w, width) if was else w for w, was in zip(dense, laid_out, strict=True)]
    return PreparedConv(tuple(weights), width, *rest)


def _laid_out(weight: Tensor, width: int) -> Tensor:
    """Weights (o c), or (o c 1 k) of a height-1 picture, in oneDNN's layout."""
    if weight.dim() == 2:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _HINT)
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, [0, width // 2], [1, 1], [1, 1], 1, [1, weight.shape[1], 1, _HINT]
    )


def weights_for(op: str, x: Tensor, prepared: PreparedConv) -> tuple[Tensor, ...]:
    """The prepared weights, for a call that records no gradient and computes in their dtype."""
    weights = prepared.weights
    if not isinstance(x, Tensor):
        return weights
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            f"{op}: prepared weights have no gradient: call it under torch.no_grad()"
        )
    autocast = torch.is_autocast_enabled(x.device.type)
    wanted = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if prepared.dtype != wanted:
        found, asked = (str(t).removeprefix("torch.") for t in (prepared.dtype, wanted))
        raise TypeError(f"{op}: the weights were prepared for {found}, x is computed in {asked}")
    return weights


def call(op: str, x: Tensor, prepared: PreparedConv, bias: Tensor | None) -> Tensor:
    """Run the public function `op` with packed weights, in their dtype; rounded once.

    Past the dispatcher always: torch.compile cannot look into oneDNN's layouts.
    """
    weights = list(weights_for(op, x, prepared))
    if isinstance(x, Tensor):
        if not torch.is_autocast_enabled(x.device.type):
            check_dtype(op, "bias", bias, x.dtype)
        x = x.to(prepared.dtype).to(weights[0].dtype)
        if bias is not None:
            bias = bias.to(prepared.dtype).to(weights[0].dtype)
    return OP.torch_op(x, weights, bias, prepared.gated).to(prepared.dtype)


def prepare_conv(
    weight: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    winograd: bool | None = False,
) -> PreparedConv:
    """Cast, join and lay out the weights of a convolution once, for many calls without gradients.

    :func:`conv1d` and :func:`conv_swiglu` take the result in place of their weights. On a CPU with
    AVX2 and no more the weights are stored as panels for the compiled product, if their outputs
    fill them. Else, on a CPU that oneDNN runs on, they are stored as its kernels read them (it
    reorders plain ones at every call) and w1 and w3 are joined, but for float32 ones of widths
    above 1 without Winograd: oneDNN's convolution on channels-last tokens has up to 4 times the
    error of ``F.conv1d``, where plain weights go. Elsewhere they are cast alone. For float16, and
    for bfloat16 where oneDNN has none (CPUs without AVX-512), they are stored in float32, products
    are computed in it, and the result is rounded.

    Args:
        weight: (o, c, k) or (o, c) for :func:`conv1d`; [w1, w3] for :func:`conv_swiglu`.
        dtype: of the activations; None: the weight's own.
        winograd: compute widths of 3 by Winograd's F(2,3), on the CPU, the weights transformed in
            float32 before they are cast; None: where that can run, in float32 from 2^20 weights on
            (w1 and w3 counted together). In bfloat16 the error of :func:`conv1d` is 2.4 times that
            of the direct form (4.0e-3 against 1.7e-3), of :func:`conv_swiglu` 1.8 times (5.5e-3
            against 3.1e-3); in float32 it is 2.7 times that of ``F.conv1d`` (5.0e-7 against 1.9e-7)
            and 2.6 times (7.3e-7 against 2.8e-7). [w1, w3] on 2 x 640 tokens of 896 channels to
            2560 take 29.4 ms in bfloat16 and 59.6 in float32; the prepared direct form takes 39.6
            in bfloat16, ``F.conv1d`` twice and the gate 46.6 and 90.7, on a 2-core AMD EPYC (Zen
            5).

    Returns:
        :class:`PreparedConv`. It shares no memory with parameters that training changes.

    Raises:
        ValueError: shapes that do not fit, Winograd for another width or where it cannot run.
        TypeError: an unsupported dtype.
    """
    op = "prepare_conv"
    given = [weight] if isinstance(weight, Tensor) else list(weight)
    require(len(given) in (1, 2), f"{op}: weight must be one tensor or [w1, w3], got {len(given)}")
    names = ["weight"] if len(given) == 1 else ["w1", "w3"]
    given = [w.unsqueeze(2) if isinstance(w, Tensor) and w.dim() == 2 else w for w in given]
    sizes = check(op, **{name: (w, "o c k") for name, w in zip(names, given, strict=True)})
    dtype = given[0].dtype if dtype is None else dtype
    for name, w in zip(names, given, strict=True):
        check_dtype(op, name, w, *FLOATS)
    require(dtype in FLOATS, f"{op}: dtype must be a float dtype, got {dtype}")
    k, gated = sizes["k"], len(given) == 2
    require(k % 2 == 1, f"{op}: the width of the weight must be odd, got {k}")
    require(not winograd or k == 3, f"{op}: Winograd needs width 3, got {k}")
    with torch.no_grad():
        device = given[0].device
        stored = cpu.product_dtype(dtype) if device.type == "cpu" else dtype
        panels = device.type == "cpu" and _panels.fastest(stored)
        panels = panels and sizes["o"] % _panels.WIDTH == 0
        runs = panels or fast(torch.empty(1, device=device, dtype=stored))
        exact = dtype == torch.float32
        if winograd is None:
            wide = sum(w.numel() for w in given) >= _WIDE
            winograd = runs and k == 3 and (wide or not exact)
        if winograd and not runs:
            reason = _backend.unavailable(OP, "cpp", device, stored) or "torch has no oneDNN"
            raise ValueError(f"{op}: Winograd cannot run: {reason}")
        if not runs or (exact and k > 1 and not winograd and not panels):
            # A copy even where nothing is cast.
            return PreparedConv(
                tuple(w.detach().to(dtype, copy=True) for w in given), k, gated, False, dtype
            )
        if not winograd:
            given = [w.detach().to(dtype) for w in given]  # rounded, whatever it is stored as
        if panels:
            matrices = _transformed(given, stored)[..., None].unbind() if winograd else given
            laid_out = [_panels.pack(w.to(stored)) for w in matrices]
            joined = laid_out if winograd else [torch.cat(laid_out)]
            return PreparedConv(tuple(joined), k, gated, True, dtype)
        if k > 1 and not winograd:
            return PreparedConv((_picture(given, stored),), k, gated, True, dtype)
        # oneDNN's GEMMs read their own layout.
        matrices = (
            _transformed(given, stored).unbind()
            if winograd
            else [torch.cat([w.squeeze(2).to(stored) for w in given])]
        )
        return PreparedConv(tuple(_laid_out(w, k) for w in matrices), k, gated, True, dtype)
