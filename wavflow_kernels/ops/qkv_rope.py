r"""Projections of all streams to joint queries, keys and values, normalised and rotated per head.

A token's row holds (head, channel, {q, k, v}) with q, k and v fastest, or (head, channel, {k, v})
in a stream that supplies no queries. With a head's :math:`x` of d channels, its norm weight
:math:`w` and the rotation :math:`R_n` of token n by pairs (2i, 2i + 1), queries and keys are

.. math:: R_n \Big(w \odot x \big/ \sqrt{\tfrac1d \sum_i x_i^2 + \epsilon}\Big)

with :math:`\epsilon` = float32's machine epsilon; values are copied. The tokens of the streams are
written one after another into joint (b h n d) tensors. With :math:`g` the gradient of a query,
:math:`r` the inverse root above and :math:`\hat x = r x`,

.. math:: dw = \sum R_n^T g \odot \hat x, \qquad
          dx = r \big(u - \hat x \, \tfrac1d \textstyle\sum_i u_i \hat x_i\big), \quad
          u = w \odot R_n^T g

summed over items, heads and tokens. Nothing but the inputs is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._backend import C
from .._check import FLOATS, check, check_dtype, compute_dtype, require
from .._launch import DTYPE_CODE, address, dense, dense_rows, target, triton_launch
from .._registry import ON_CPU, ON_TRITON, Op, Sample, no_double_backward, normals

FREQUENCY_BASE = 10000.0
RMS_NORM_EPS = torch.finfo(torch.float32).eps
_SUPPORTED = {"cpp": ON_CPU, "triton": ON_TRITON}


def _check(
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    rope: Tensor,
    heads: int,
) -> None:
    op = "qkv_rope"
    require(len(qkv) > 0, f"{op}: qkv must hold at least one stream, got none")
    for name, weights in (("q_weight", q_weight), ("k_weight", k_weight)):
        require(
            len(weights) == len(qkv),
            f"{op}: {name} must hold one tensor for each of the {len(qkv)} streams, "
            f"got {len(weights)}",
        )
    arguments: dict[str, Any] = {}
    for i, (x, q, k) in enumerate(zip(qkv, q_weight, k_weight, strict=True)):
        arguments[f"qkv[{i}]"] = (x, f"b n{i} c{i}")
        arguments[f"q_weight[{i}]"] = (q, "d")
        arguments[f"k_weight[{i}]"] = (k, "d")
    sizes = check(op, **arguments, rope=(rope, "n d"))
    for name, (tensor, _) in arguments.items():
        if name.startswith("qkv"):
            check_dtype(op, name, tensor, *FLOATS)
            check_dtype(op, name, tensor, qkv[0].dtype)
        else:
            check_dtype(op, name, tensor, compute_dtype(qkv[0].dtype))
    check_dtype(op, "rope", rope, compute_dtype(qkv[0].dtype))
    d = sizes["d"]
    require(d > 0 and d % 2 == 0, f"{op}: d must be even and positive, got {d}")
    require(heads > 0, f"{op}: heads must be positive, got {heads}")
    with_queries = True
    for i in range(len(qkv)):
        width = sizes[f"c{i}"]
        require(sizes[f"n{i}"] > 0, f"{op}: qkv[{i}] must hold at least one token, got none")
        require(
            width == 3 * heads * d or width == 2 * heads * d,
            f"{op}: qkv[{i}] must be 3 or 2 x {heads} heads x d = {d} wide, got {width}",
        )
        require(
            with_queries or width == 2 * heads * d,
            f"{op}: streams without queries must come last, got qkv[{i}] with queries after one",
        )
        with_queries = width == 3 * heads * d
        require(i > 0 or with_queries, f"{op}: qkv[0] must supply queries, got {width} channels")
    tokens = sum(sizes[f"n{i}"] for i in range(len(qkv)))
    require(
        sizes["n"] == tokens,
        f"{op}: rope must have a row for each of the {tokens} tokens, got {sizes['n']}",
    )


def _parts(x: Tensor, weight: Tensor, heads: int) -> int:
    """How many parts a stream has: 3 with queries, 2 without."""
    return x.shape[2] // (heads * weight.shape[0])


def _outputs(
    qkv: Sequence[Tensor], q_weight: Sequence[Tensor], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    first, d = qkv[0], q_weight[0].shape[0]
    queries = sum(x.shape[1] for x in qkv if _parts(x, q_weight[0], heads) == 3)
    tokens = sum(x.shape[1] for x in qkv)
    b = first.shape[0]
    q, k, v = (first.new_empty(b, heads, n, d) for n in (queries, tokens, tokens))
    return q, k, v


def _streams(
    qkv: Sequence[Tensor], q_weight: Sequence[Tensor], rope: Tensor, heads: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The q, k, v (b h n d) and rotations (n d) of each stream; q is empty without queries."""
    streams = []
    for x, table in zip(qkv, rope.split([x.shape[1] for x in qkv]), strict=True):
        parts = _parts(x, q_weight[0], heads)
        *q, k, v = x.unflatten(-1, (heads, -1, parts)).permute(4, 0, 2, 1, 3).unbind()
        streams.append((q[0] if q else k[:, :, :0], k, v, table))
    return streams


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:  # b h n d
    """Normalise x over its last axis and rotate the pairs (2i, 2i + 1); result in x's dtype."""
    wide = x.to(weight.dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS) * weight
    cos, sin = rope.unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`norm_rope` in x and weight, from that of its result (b h n d)."""
    wide = x.to(weight.dtype)
    cos, sin = rope.unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = grad.to(weight.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    grad = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
    normed = wide * inverse
    d_weight = (grad * normed).sum((0, 1, 2))
    grad = grad * weight
    d_x = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), d_weight


def reference(
    qkv: Sequence[Tensor],  # b n_i 3c or 2c
    q_weight: Sequence[Tensor],  # d
    k_weight: Sequence[Tensor],  # d
    rope: Tensor,  # n d
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # b h nq d, b h n d, b h n d
    joint = []
    for (q, k, v, table), wq, wk in zip(
        _streams(qkv, q_weight, rope, heads), q_weight, k_weight, strict=True
    ):
        joint.append((norm_rope(q, wq, table[: q.shape[2]]), norm_rope(k, wk, table), v))
    q, k, v = (torch.cat(tensors, dim=2) for tensors in zip(*joint, strict=True))
    return q, k, v


def _call(
    backward: bool,
    joint: Sequence[Tensor],  # q, k, v or their gradients, contiguous
    grads: Sequence[Tensor],  # backward: of qkv, q_weight and k_weight
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    rope: Tensor,
    heads: int,
) -> None:
    if not qkv[0].shape[0]:
        for grad in grads[len(qkv) :]:
            grad.zero_()
        return
    # Rows may lie anywhere, their elements must be contiguous. The lists keep copies alive.
    qkv = [dense_rows(x) for x in qkv]
    q_weight, k_weight = dense(*q_weight), dense(*k_weight)
    rope = rope.contiguous()
    count, d = len(qkv), rope.shape[1]
    streams = [
        (  # QkvRopeStream of csrc/qkv_rope.h
            address(x),
            address(q_weight[i]),
            address(k_weight[i]),
            *(address(grads[i + j * count]) if backward else 0 for j in range(3)),
            x.shape[1],
            _parts(x, rope[0], heads),
            x.stride(0),
            x.stride(1),
        )
        for i, x in enumerate(qkv)
    ]
    C.qkv_rope(
        target(qkv[0]),
        DTYPE_CODE[qkv[0].dtype],
        backward,
        streams,
        address(rope),
        *(address(tensor) for tensor in joint),
        qkv[0].shape[0],
        heads,
        d,
    )


# The backward. Its gradients come as one list: of qkv, of q_weight, of k_weight.


def _check_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    heads: int,
    **rest: Any,
) -> None:
    _check(qkv, q_weight, heads=heads, **rest)
    queries = sum(x.shape[1] for x in qkv if _parts(x, q_weight[0], heads) == 3)
    tokens = sum(x.shape[1] for x in qkv)
    for name, grad, n in (
        ("grad_q", grad_q, queries),
        ("grad_k", grad_k, tokens),
        ("grad_v", grad_v, tokens),
    ):
        wanted = (qkv[0].shape[0], heads, n, q_weight[0].shape[0])
        require(
            tuple(grad.shape) == wanted,
            f"qkv_rope_backward: {name} must have shape {wanted}, got {tuple(grad.shape)}",
        )
        check_dtype("qkv_rope_backward", name, grad, qkv[0].dtype)


def _outputs_backward(
    qkv: Sequence[Tensor], q_weight: Sequence[Tensor], k_weight: Sequence[Tensor]
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*qkv, *q_weight, *k_weight)]


def _launch_backward(
    out: list[Tensor], grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, **forward: Any
) -> None:
    _call(True, dense(grad_q, grad_k, grad_v), out, **forward)


def _reference_backward(
    grad_q: Tensor,  # b h nq d
    grad_k: Tensor,  # b h n d
    grad_v: Tensor,  # b h n d
    qkv: Sequence[Tensor],  # b n_i 3c or 2c
    q_weight: Sequence[Tensor],  # d
    k_weight: Sequence[Tensor],  # d
    rope: Tensor,  # n d
    heads: int,
) -> list[Tensor]:
    streams = _streams(qkv, q_weight, rope, heads)
    d_q = grad_q.split([q.shape[2] for q, *_ in streams], dim=2)
    d_k, d_v = (g.split([x.shape[1] for x in qkv], dim=2) for g in (grad_k, grad_v))
    d_qkv: list[Tensor] = []
    d_q_weight: list[Tensor] = []
    d_k_weight: list[Tensor] = []
    for i, (q, k, _, table) in enumerate(streams):
        dq, dq_weight = norm_rope_backward(d_q[i], q, q_weight[i], table[: q.shape[2]])
        dk, dk_weight = norm_rope_backward(d_k[i], k, k_weight[i], table)
        parts = [dq, dk, d_v[i]] if q.shape[2] else [dk, d_v[i]]
        d_qkv.append(torch.stack(parts, dim=-1).transpose(1, 2).flatten(2).contiguous())
        d_q_weight.append(dq_weight)
        d_k_weight.append(dk_weight)
    return [*d_qkv, *d_q_weight, *d_k_weight]


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    computed = compute_dtype(dtype)

    normal = normals(torch.Generator().manual_seed(seed), device, dtype)

    def arguments(
        b: int, heads: int, d: int, *streams: tuple[int, int], scale: float = 1.0
    ) -> tuple[Any, ...]:
        weights = [
            [1 + 0.3 * normal(d, dtype=computed) for _ in streams] for _ in ("q_weight", "k_weight")
        ]
        tables = [
            rope_table(n, d, step=step, device=device, dtype=computed)
            for (n, _), step in zip(streams, (1.0, 1.25, 0.0), strict=False)
        ]
        qkv = [scale * normal(b, n, parts * heads * d) for n, parts in streams]
        return qkv, *weights, torch.cat(tables), heads

    wide = normal(3, 2, 21, 2 * 3 * 32)
    strided = list(arguments(2, 2, 32, (21, 3)))
    strided[0] = [wide[::2, 1]]
    broadcast = list(arguments(2, 1, 64, (5, 3), (2, 3)))
    broadcast[0] = [x[:1].expand(2, -1, -1) for x in broadcast[0]]
    grads = (0, 1, 2)
    return [
        Sample(arguments(2, 3, 64, (19, 3), (5, 3), (4, 3)), grads, "three streams"),
        Sample(arguments(2, 2, 64, (18, 3), (3, 2), (7, 2)), grads, "keys and values alone"),
        Sample(arguments(1, 5, 32, (33, 3)), grads, "one stream"),
        Sample(arguments(1, 1, 128, (2, 3), (3, 2)), grads, "wide heads"),
        Sample(arguments(2, 2, 6, (3, 3), (2, 2)), grads, "narrow heads"),
        Sample(arguments(1, 1, 12, (1, 3)), grads, "one token"),
        Sample(tuple(strided), grads, "strided"),
        Sample(tuple(broadcast), grads, "broadcast batch"),
        Sample(arguments(1, 2, 64, (3, 3), scale=1e-3), (), "near the epsilon"),
        Sample(arguments(0, 2, 32, (3, 3), (2, 2)), grads, "empty batch"),
    ]


def _samples_backward(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    normal, samples = normals(torch.Generator().manual_seed(seed), device, dtype), []
    for s in _samples(device, dtype, seed):
        grads = [normal(*t.shape) for t in OP.outputs(*s.args)]
        samples.append(Sample((*grads, *s.args), (), s.name))
    return samples


def _workload(b: int, *streams: tuple[int, int], backward: bool = False) -> Any:
    """A call with 14 heads of 64 channels, and (tokens, parts) for each stream."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        heads, d = 14, 64
        computed = compute_dtype(dtype)
        qkv = [
            torch.randn(b, n, parts * heads * d, device=device).to(dtype) for n, parts in streams
        ]
        weights = [[torch.ones(d, device=device, dtype=computed) for _ in streams] for _ in "qk"]
        rope = rope_table(sum(n for n, _ in streams), d, device=device, dtype=computed)
        outs = _outputs(qkv, weights[0], heads) if backward else ()
        return *(torch.randn_like(t) for t in outs), qkv, *weights, rope, heads

    return make


def _workloads(backward: bool) -> dict[str, Any]:
    audio, joint = {}, {}
    for b in (2, 16):
        for name, n in (("16k", 640), ("44k", 1764)):
            joint[f"joint_{name}_b{b}"] = ((n, 3), (64, 3), (77, 3))
            audio[f"audio_{name}_b{b}"] = ((n, 3),)
    last = {"last_joint_16k_b2": ((640, 3), (64, 2), (77, 2))}
    return {
        name: _workload(int(name.rpartition("_b")[2]), *streams, backward=backward)
        for name, streams in {**joint, **audio, **last}.items()
    }


def _flops(qkv: Sequence[Tensor]) -> int:
    # Two for the square, two for the norm, three for the rotation, of two parts in three.
    return 14 * sum(x.numel() for x in qkv) // 3


BACKWARD = Op(
    name="qkv_rope_backward",
    schema=(
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor[] qkv, Tensor[] q_weight, "
        "Tensor[] k_weight, Tensor rope, int heads) -> Tensor[]"
    ),
    reference=_reference_backward,
    check=_check_backward,
    outputs=_outputs_backward,
    launch={"cpp": _launch_backward, "triton": triton_launch("qkv_rope", "backward")},
    supported=_SUPPORTED,
    samples=_samples_backward,
    workloads=_workloads(backward=True),
    bytes=lambda qkv, rope: 3 * sum(x.nbytes for x in qkv) + rope.nbytes,
    flops=lambda qkv: 2 * _flops(qkv),
    tolerance="reduction",
    backward=no_double_backward("qkv_rope"),
    bulk=("grad_q", "grad_k", "grad_v", "qkv"),
    internal=True,
)


def _setup_context(
    ctx: Any,
    output: Any,
    qkv: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    rope: Tensor,
    heads: int,
) -> None:
    if rope.requires_grad:  # needs_input_grad is flat where arguments are lists
        raise RuntimeError("qkv_rope: no gradient with respect to rope")
    ctx.save_for_backward(*qkv, *q_weight, *k_weight, rope)
    ctx.heads = heads


def _backward(ctx: Any, *grads: Tensor) -> dict[str, list[Tensor]]:
    *tensors, rope = ctx.saved_tensors
    n = len(tensors) // 3
    inputs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    out = BACKWARD.torch_op(*grads, *inputs, rope, ctx.heads)
    return {"qkv": out[:n], "q_weight": out[n : 2 * n], "k_weight": out[2 * n :]}


OP = Op(
    name="qkv_rope",
    schema=(
        "(Tensor[] qkv, Tensor[] q_weight, Tensor[] k_weight, Tensor rope, int heads) -> "
        "(Tensor, Tensor, Tensor)"
    ),
    reference=reference,
    check=_check,
    outputs=_outputs,
    launch={
        "cpp": lambda out, **arguments: _call(False, out, (), **arguments),
        "triton": triton_launch("qkv_rope", "forward"),
    },
    supported=_SUPPORTED,
    samples=_samples,
    workloads=_workloads(backward=False),
    bytes=lambda qkv, rope: 2 * sum(x.nbytes for x in qkv) + rope.nbytes,
    flops=_flops,
    tolerance="single_pass",
    setup_context=_setup_context,
    backward=_backward,
    differentiable_outputs=3,
    autocast=("qkv",),
    bulk=("qkv",),
)


def qkv_rope(
    qkv: Sequence[Tensor],  # b n_i 3c or 2c
    q_weight: Sequence[Tensor],  # d
    k_weight: Sequence[Tensor],  # d
    rope: Tensor,  # n d
    *,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # b h nq d, b h n d, b h n d
    """Make joint queries, keys and values of all streams, normalised and rotated per head.

    Args:
        qkv: one projection a stream, (b, n_i, 3 c), any float dtype, channels laid out as (head,
            channel, {q, k, v}) with q, k and v fastest; or (b, n_i, 2 c) with {k, v}, for streams
            that supply no queries, which come last. c = heads * d. Rows may have any strides.
        q_weight, k_weight: for each stream the (d,) float32 (float64 for float64) weights of its
            RMSNorms. A stream without queries has a q_weight too, with a gradient of zeros.
        rope: (n, d) float32 (float64 for float64) rotations of all n = sum n_i tokens, from
            :func:`rope_table`; rows with step 0 rotate nothing.
        heads: number of heads.

    Returns:
        q (b, heads, nq, d), k and v (b, heads, n, d) in the dtype of qkv, with the streams' tokens
        one after another; nq counts those of the streams with queries. Differentiable once in the
        projections and the weights.

    Raises:
        ValueError: shapes or sizes that do not fit, a stream with queries after one without.
        TypeError: an unsupported dtype.

    Source: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864.
    """
    return OP(list(qkv), list(q_weight), list(k_weight), rope, heads)


def rope_table(
    tokens: int,
    head_dim: int,
    *,
    step: float = 1.0,
    base: float = FREQUENCY_BASE,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # tokens head_dim
    """The rotations of ``tokens`` tokens: row n is [cos a_0, sin a_0, cos a_1, sin a_1, ...].

    Args:
        tokens: number of rows.
        head_dim: channels of a head, even.
        step: distance of two tokens on the common clock; 0 gives rows of exactly (1, 0), which
            rotate nothing.
        base: of the frequencies; a larger one slows all but the fastest.
        device, dtype: of the result. Angles a_i = n * step * base^(-2i / head_dim) are float32.

    Raises:
        ValueError: tokens not positive, head_dim not even and positive.

    Source: RoFormer, arXiv 2104.09864, section 3.2.
    """
    require(tokens > 0, f"rope_table: tokens must be positive, got {tokens}")
    require(
        head_dim > 0 and head_dim % 2 == 0,
        f"rope_table: head_dim must be even and positive, got {head_dim}",
    )
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    position = torch.arange(tokens, device=device, dtype=torch.float32) * step
    angle = position[:, None] * base ** (-exponent / head_dim)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1).to(dtype)
