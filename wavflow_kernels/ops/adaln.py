r"""LayerNorm without weights, then a shift and a scale that many tokens share.

:math:`\mathrm{out}_n = \frac{x_n - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}}\,(1 + \mathrm{scale}_r)
+ \mathrm{shift}_r`, where mean and (biased) variance run over the channels and the row r that token
n reads never decreases with n. A row's tokens are thus one range, and the gradient of a row is a
sum over that range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._registry import (
    DTYPE_CODE,
    ON_CPU,
    ON_TRITON,
    Op,
    Sample,
    address,
    dense_rows,
    no_double_backward,
    target,
    triton_launch,
)

MAX_CHANNELS = 8192  # kMaxChannels in csrc/adaln.h
SUPPORTED = {"cpp": ON_CPU, "triton": ON_TRITON}


class TokenRows(NamedTuple):
    """Which row of a table each token reads; made by :func:`token_rows`.

    Token n reads row ``index[n]``; the tokens of row r are ``offsets[r]`` to ``offsets[r + 1]``.
    """

    index: Tensor  # type: ignore[assignment]  # n, int32; hides tuple.index
    offsets: Tensor  # rows + 1, int32

    @classmethod
    def of_sorted(cls, index: Tensor, rows: int) -> TokenRows:
        """The rows of an index (n) that is known to fit: nothing is checked or waited for."""
        index = index.to(torch.int32).contiguous()
        edges = torch.arange(rows + 1, device=index.device, dtype=torch.int32)
        return cls(index, torch.searchsorted(index, edges, out_int32=True))


def token_rows(index: Tensor, rows: int) -> TokenRows:
    """Check a map from tokens to rows once, for any number of calls.

    Args:
        index: (n,) row of each token: an integer tensor that never decreases, in [0, rows).
        rows: how many rows there are; some may have no token.

    Returns:
        The rows on the device of `index`. Waits for the device once, so call it outside of
        compiled and captured code.

    Raises:
        ValueError: no tokens or rows; a value out of range or less than the one before it.
        TypeError: an index that is not an integer tensor.
    """
    op = "token_rows"
    check(op, index=(index, "n"))
    check_dtype(op, "index", index, torch.int32, torch.int64)
    require(rows > 0, f"{op}: rows must be positive, got {rows}")
    require(index.shape[0] > 0, f"{op}: index must hold at least one token, got none")
    before = torch.cat((index[:1], index[:-1]))
    wrong = (index < 0) | (index >= rows) | (index < before)
    at = torch.where(wrong.any(), wrong.int().argmax(), -1)
    position, found, previous = torch.stack((at.to(index.dtype), index[at], before[at])).tolist()
    if position >= 0:
        require(
            0 <= found < rows,
            f"{op}: index[{position}] is {found}, wanted a row in [0, {rows})",
        )
        raise ValueError(
            f"{op}: index must not decrease, got {found} at {position} after {previous}"
        )
    return TokenRows.of_sorted(index, rows)


NO_ROWS = (None, None)  # index and offsets where all tokens share one row


def check_rows(
    op: str, name: str, table: Tensor, index: Tensor | None, offsets: Tensor | None
) -> None:
    """Check the rows that tokens read `table` (b r c) by; `name` is the argument's."""
    require(
        (index is None) == (offsets is None), f"{op}: {name} needs both its index and its offsets"
    )
    rows = table.shape[1]
    if index is None or offsets is None:
        require(rows == 1, f"{op}: without {name} there must be one row for all tokens, got {rows}")
        return
    check_dtype(op, f"{name}.index", index, torch.int32)
    check_dtype(op, f"{name}.offsets", offsets, torch.int32)
    require(rows > 0, f"{op}: there must be at least one row, got none")
    require(
        offsets.shape[0] == rows + 1,
        f"{op}: {name}.offsets must have {rows + 1} elements for {rows} rows, "
        f"got {offsets.shape[0]}",
    )


def check_layer_norm(op: str, sizes: dict[str, int], eps: float) -> None:
    """Check what every op with a LayerNorm over (b n c) demands of its sizes and epsilon."""
    require(sizes["n"] > 0, f"{op}: x must hold at least one token, got none")
    require(
        0 < sizes["c"] <= MAX_CHANNELS,
        f"{op}: x must have 1 to {MAX_CHANNELS} channels, got {sizes['c']}",
    )
    require(eps > 0, f"{op}: eps must be positive, got {eps}")


def _check(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    op = "adaln"
    sizes = check(
        op,
        x=(x, "b n c"),
        shift=(shift, "b r c"),
        scale=(scale, "b r c"),
        **{"rows.index": (index, "n"), "rows.offsets": (offsets, "r+1")},
    )
    check_dtype(op, "x", x, *FLOATS)
    for name, tensor in (("shift", shift), ("scale", scale)):
        check_dtype(op, name, tensor, x.dtype)
    check_rows(op, "rows", shift, index, offsets)
    check_layer_norm(op, sizes, eps)


def _outputs(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


# The mathematics, in the computed dtype.


def of_tokens(table: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(b n c), or (b 1 c) without an index: the rows that the tokens read, as `dtype`."""
    table = table.to(dtype)
    return table if index is None else table.index_select(1, index)


def segment_sums(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """(b rows c): sums of values (b n c) over the tokens of each row."""
    if index is None:
        return values.sum(1, keepdim=True)
    return values.new_zeros(values.shape[0], rows, values.shape[2]).index_add(1, index, values)


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x normalised over its channels, and 1 / standard deviation (b n 1)."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def layer_norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`layer_norm`'s first result in x."""
    along = (grad * normed).mean(-1, keepdim=True)
    return inverse * (grad - grad.mean(-1, keepdim=True) - normed * along)


def reference(
    x: Tensor,  # b n c
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    offsets: Tensor | None,  # r+1
    eps: float,
) -> Tensor:  # b n c
    wide = compute_dtype(x.dtype)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    shift, scale = of_tokens(shift, index, wide), of_tokens(scale, index, wide)
    return (normed * (1 + scale) + shift).to(x.dtype)


def row_tensor(table: Tensor) -> Any:
    """A (b r c) table as the compiled kernels read it: through its strides."""
    return C.RowTensor(table.data_ptr(), table.stride(0), table.stride(1))


def row_map(index: Tensor | None, offsets: Tensor | None, rows: int) -> Any:
    """The rows of the tokens as the compiled kernels read them."""
    return C.TokenRows(address(index), address(offsets), rows)


def _launch(
    out: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not out.numel():
        return
    x, shift, scale = x.contiguous(), dense_rows(shift), dense_rows(scale)
    index, offsets = (None if t is None else t.contiguous() for t in (index, offsets))
    C.adaln(
        target(x),
        DTYPE_CODE[x.dtype],
        address(x),
        row_tensor(shift),
        row_tensor(scale),
        row_map(index, offsets, shift.shape[1]),
        address(out),
        *x.shape,
        eps,
    )


def _check_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    _check(x, scale, scale, index, offsets, eps)
    check("adaln_backward", x=(x, "b n c"), grad=(grad, "b n c"))
    check_dtype("adaln_backward", "grad", grad, x.dtype)


def _outputs_backward(grad: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _reference_backward(
    grad: Tensor,  # b n c
    x: Tensor,  # b n c
    scale: Tensor,  # b r c
    index: Tensor | None,  # n
    offsets: Tensor | None,  # r+1
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # b n c, b r c, b r c
    wide, rows = compute_dtype(x.dtype), scale.shape[1]
    grad, (normed, inverse) = grad.to(wide), layer_norm(x.to(wide), eps)
    d_x = layer_norm_backward(grad * (1 + of_tokens(scale, index, wide)), normed, inverse)
    d_shift = segment_sums(grad, index, rows)
    d_scale = segment_sums(grad * normed, index, rows)
    return d_x.to(x.dtype), d_shift.to(x.dtype), d_scale.to(x.dtype)


def _launch_backward(
    out: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Tensor | None,
    offsets: Tensor | None,
    eps: float,
) -> None:
    if not x.numel():
        return
    grad, x, scale = grad.contiguous(), x.contiguous(), dense_rows(scale)
    index, offsets = (None if t is None else t.contiguous() for t in (index, offsets))
    C.adaln_backward(
        target(x),
        DTYPE_CODE[x.dtype],
        address(grad),
        address(x),
        row_tensor(scale),
        row_map(index, offsets, scale.shape[1]),
        *(address(t) for t in out),
        *x.shape,
        eps,
    )


def sample_rows(device: torch.device, index: list[int], rows: int) -> TokenRows:
    """Rows of a sample or workload, on any device."""
    made = token_rows(torch.tensor(index), rows)
    return TokenRows(*(t.to(device) for t in made))


def upsampled_rows(device: torch.device, tokens: int, rows: int) -> TokenRows:
    """Rows by nearest upsampling along time: token n reads floor((n + 1/2) rows / tokens)."""
    return sample_rows(device, [(2 * i + 1) * rows // (2 * tokens) for i in range(tokens)], rows)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def chunks(b: int, r: int, c: int) -> tuple[Tensor, Tensor]:
        """shift and scale as the model has them: views of one projection."""
        _, shift, scale, *_ = normal(b, r, 6 * c).chunk(6, -1)
        return shift, scale

    gathered = sample_rows(device, [0, 0, 1, 1, 1, 4, 4, 5], 7)  # rows without tokens, too
    long = upsampled_rows(device, 75, 4)
    large = 1e3 * normal(1, 3, 16), *chunks(1, 1, 16)
    small = 1e-3 * normal(1, 3, 24), *chunks(1, 1, 24)  # a variance below eps
    every = (0, 1, 2)
    return [
        Sample((normal(2, 8, 40), *chunks(2, 7, 40), *gathered, 1e-5), every, "gathered rows"),
        Sample((normal(3, 5, 7), *chunks(3, 1, 7), *NO_ROWS, 1e-5), every, "one row, odd width"),
        Sample((normal(2, 75, 65), *chunks(2, 4, 65), *long, 1e-5), every, "rows over blocks"),
        Sample((normal(1, 70, 130), *chunks(1, 1, 130), *NO_ROWS, 1e-5), every, "one long row"),
        Sample((normal(2, 1, 896), *chunks(2, 1, 896), *NO_ROWS, 1e-5), every, "one token"),
        Sample((normal(1, 2, 1), *chunks(1, 1, 1), *NO_ROWS, 1e-5), every, "one channel"),
        Sample((*large, *NO_ROWS, 1e-5), every, "large"),
        Sample((*small, *NO_ROWS, 1e-5), every, "small"),
        Sample(
            (normal(4, 3, 12).transpose(0, 1), *(t.expand(3, 1, 12) for t in chunks(1, 1, 12)))
            + (*NO_ROWS, 1e-2),
            every,
            "strided, rows shared by the batch",
        ),
        Sample((normal(0, 8, 6), *chunks(0, 7, 6), *gathered, 1e-5), (), "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for s in _samples(device, dtype, seed):
        x, _, *rest = s.args
        grad = torch.linspace(-1, 2, x.numel(), device=device).view(x.shape).sin().to(dtype)
        samples.append(Sample((grad, x, *rest), (), s.name))
    return samples


def _workload(b: int, n: int, rows: int | None) -> Any:
    """shift and scale are chunk views of a block's modulation; c = 896."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(b, n, 896, device=device, dtype=dtype)
        chunks = torch.randn(b, rows or 1, 6 * 896, device=device, dtype=dtype).chunk(6, -1)
        which = NO_ROWS if rows is None else upsampled_rows(device, n, rows)
        return x, chunks[0], chunks[1], *which, 1e-5

    return make


def backward_workloads(workloads: Any, of_forward: Any) -> dict[str, Any]:
    """The backward's workloads: those of the forward, their arguments changed by `of_forward`."""
    return {
        name: lambda device, dtype, make=make: of_forward(*make(device, dtype))
        for name, make in workloads.items()
    }


_WORKLOADS = {
    "16k": _workload(2, 640, 192),
    "16k batch": _workload(16, 640, 192),
    "44k batch": _workload(16, 1764, 192),
    "one row": _workload(16, 1764, None),
    "text": _workload(16, 77, None),
}


BACKWARD = Op(
    name="adaln_backward",
    schema=(
        "(Tensor grad, Tensor x, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward, "triton": triton_launch("adaln", "backward")},
    supported=SUPPORTED,
    samples=_samples_backward,
    workloads=backward_workloads(
        _WORKLOADS, lambda x, shift, *rest: (torch.randn_like(x), x, *rest)
    ),
    bytes=lambda grad, x, scale, *_: 3 * x.nbytes + 3 * scale.nbytes,
    flops=lambda grad, x, *_: 16 * x.numel(),
    tolerance="reduction",
    setup_context=lambda ctx, inputs, output: None,
    backward=no_double_backward("adaln"),
    bulk=("grad", "x"),
    internal=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, index, offsets, ctx.eps = inputs
    ctx.save_for_backward(x, scale, index, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *BACKWARD.torch_op(grad, *ctx.saved_tensors, ctx.eps), None, None, None


OP = Op(
    name="adaln",
    schema=(
        "(Tensor x, Tensor shift, Tensor scale, Tensor? index, Tensor? offsets, float eps) "
        "-> Tensor"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={"cpp": _launch, "triton": triton_launch("adaln", "forward")},
    supported=SUPPORTED,
    samples=_samples,
    workloads=_WORKLOADS,
    bytes=lambda x, shift, scale, *_: 2 * x.nbytes + shift.nbytes + scale.nbytes,
    flops=lambda x, *_: 8 * x.numel(),
    tolerance="reduction",
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "shift", "scale"),
    bulk=("x",),
)


def adaln(
    x: Tensor,  # b n c
    shift: Tensor,  # b r c
    scale: Tensor,  # b r c
    rows: TokenRows | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:  # b n c
    """LayerNorm without weights, modulated: ``layer_norm(x) * (1 + scale[row]) + shift[row]``.

    Args:
        x: (b, n, c) tokens, any float dtype, c at most 8192.
        shift, scale: (b, r, c) in the dtype of x. Views of a wider projection or of one that is
            expanded over the batch are read in place.
        rows: which of the r rows each token reads, from :func:`token_rows`. None: r is 1.
        eps: added to the variance.

    Returns:
        (b, n, c) in the dtype of x, computed in float32 (float64 for float64). Differentiable once
        in x, shift and scale.

    Raises:
        ValueError: shapes or sizes that do not fit.
        TypeError: an unsupported dtype, or dtypes that differ.

    Source: Scalable Diffusion Models with Transformers (arXiv 2212.09748), section 3.2.
    """
    return OP(x, shift, scale, *(NO_ROWS if rows is None else rows), eps)
