"""Every op of the registry, through one matrix: op x backend x dtype x sample x mode.

Under ``TRITON_INTERPRET=1`` the matrix holds the Triton kernels on the CPU in place of the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.numerics import assert_close
from support.op_checks import (
    backends,
    check_forward,
    check_gradient,
    copied,
    dtypes,
    matching,
    needs,
    run,
    samples,
    short,
    truth_of,
    with_inputs,
)
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend
from wavflow_kernels._registry import Op, tensors

FORWARD = [
    pytest.param(
        op,
        backend,
        dtype,
        device,
        id=f"{op.name}-{backend}-{short(dtype)}-{device}",
        marks=[pytest.mark.gpu] if device == "cuda" else [],
    )
    for op in REGISTRY.values()
    for device in ("cpu", "cuda")
    for backend in backends(op, device)
    for dtype in dtypes(op, backend, device)
]
OPS = [pytest.param(op, id=op.name) for op in REGISTRY.values()]


def with_modes(cases: list[Any]) -> list[Any]:
    """Each case in eager mode, and traced in float32."""
    return [
        pytest.param(*case.values, mode, id=f"{case.id}-{mode}", marks=case.marks)
        for case in cases
        for mode in ("eager", "aot_eager")
        if mode == "eager" or case.values[2] == torch.float32
    ]


@pytest.mark.parametrize("op, backend, dtype, device, mode", with_modes(FORWARD))
def test_forward(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
    check_forward(op, backend, dtype, device, mode)


DIFFERENTIABLE = [p for p in FORWARD if p.values[0].backward and not p.values[0].internal]


@pytest.mark.parametrize("op, backend, dtype, device, mode", with_modes(DIFFERENTIABLE))
def test_gradient(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
    check_gradient(op, backend, dtype, device, mode)


GRADCHECK = [p for p in DIFFERENTIABLE if p.values[2] == torch.float64 and p.values[3] == "cpu"]


@pytest.mark.parametrize("op, backend, dtype, device", GRADCHECK)
def test_gradcheck(op: Op, backend: str, dtype: torch.dtype, device: str) -> None:
    needs(op, backend, device, dtype)
    for sample in samples(op, device, dtype):
        if not sample.differentiable:
            continue
        call, inputs = with_inputs(op, op, sample)
        with wk.use_backend(backend):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True), sample.name


@pytest.mark.parametrize("op, backend, dtype, device", GRADCHECK)
def test_double_backward_is_right_or_refused(
    op: Op, backend: str, dtype: torch.dtype, device: str
) -> None:
    needs(op, backend, device, dtype)
    for sample in samples(op, device, dtype):
        if not sample.differentiable:
            continue
        call, inputs = with_inputs(op, op, sample)
        with wk.use_backend(backend):
            try:
                right = torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
            except RuntimeError as error:
                # Ours, and torch's own for kernels of its libraries.
                if "not implemented" not in str(error):
                    raise
                continue
        assert right, sample.name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(op: Op, dtype: torch.dtype) -> None:
    if _backend.TRITON_INTERPRETS:
        needs(op, "triton", "cpu", dtype)
    # Traces know nothing of a dtype but what the fake outputs say, and of a backend nothing.
    traced = dtype == torch.float32 and not _backend.TRITON_INTERPRETS
    wanted = ["test_schema", "test_autograd_registration", "test_faketensor"]
    wanted += ["test_aot_dispatch_dynamic"] * traced
    for sample in samples(op, "cpu", dtype):
        args = list(copied(sample.args))
        for t in tensors([args[i] for i in sample.differentiable]):
            t.requires_grad_()
        with wk.use_backend("triton" if _backend.TRITON_INTERPRETS else None):
            torch.library.opcheck(op.torch_op, tuple(args), test_utils=wanted)


INDUCTOR = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in REGISTRY.values()
    for backend in [*backends(op, "cpu"), *([] if _backend.TRITON_INTERPRETS else ["compile"])]
    if backend != "reference" and not (op.internal and backend == "compile")
]


@pytest.mark.parametrize("op, backend", INDUCTOR)
def test_inductor(op: Op, backend: str) -> None:
    needs(op, backend, "cpu", torch.float32)
    sample = samples(op, "cpu", torch.float32)[0]
    torch._dynamo.reset()
    with wk.use_backend(backend):
        call = op if backend == "compile" else torch.compile(op, fullgraph=True)
        out = run(call, op, sample.args)
    peer = run(op.reference, op, sample.args)
    truth = matching(out, truth_of(op, sample.args))
    assert_close(out, truth, op.tolerance, f"{sample.name}: output", peer)


@pytest.mark.parametrize("op", OPS)
def test_modes_change_nothing(op: Op) -> None:
    """inference_mode and non-contiguous inputs give the same bits; autocast casts what it lists.

    Bits across strides are a promise of our own kernels; torch's libraries and eager operations
    choose among theirs by the layout, so there the results need only be close.
    """
    if _backend.TRITON_INTERPRETS:
        needs(op, "triton", "cpu", torch.float32)
    sample = samples(op, "cpu", torch.float32)[0]

    def strided(value: Any) -> Any:
        if isinstance(value, list):
            return [strided(v) for v in value]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.transpose(0, -1).contiguous().transpose(0, -1)

    with wk.use_backend("triton" if _backend.TRITON_INTERPRETS else None):
        plain = run(op, op, sample.args)
        with torch.inference_mode():
            same(plain, run(op, op, sample.args))
        if not op.mutates:
            args = tuple(strided(a) for a in sample.args)
            if _backend.choose(op, torch.device("cpu"), torch.float32, args) in op.launch:
                same(plain, op(*args))
            else:
                assert_close(
                    op(*args), matching(plain, truth_of(op, args)), op.tolerance, peer=plain
                )
        # The interpreter has no bfloat16, and float16 is autocast's other dtype.
        half = torch.float16 if _backend.TRITON_INTERPRETS else torch.bfloat16
        cast = run(op, op, op.cast(sample.args, half))
        with torch.autocast("cpu", dtype=half):
            same(cast, run(op, op, sample.args))


def same(actual: Any, wanted: Any) -> None:
    pairs = zip(tensors([actual]), tensors([wanted]), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
