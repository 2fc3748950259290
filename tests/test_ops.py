"""Every op of the registry, through one matrix: op x backend x dtype x sample x mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import assert_close, to_float64
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend
from wavflow_kernels._registry import Op, Sample

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEED = 7


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needs(op: Op, backend: str, device: str, dtype: torch.dtype) -> None:
    reason = _backend.unavailable(op, backend, torch.device(device), dtype)
    if reason:
        pytest.skip(reason)


def run(op: Op, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The op's outputs (what a mutating op changed), on copies of the arguments."""
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    out = op(*args)
    return (tuple(op.mutated(args)) if op.mutates else out), args


def truth_of(op: Op, args: tuple[Any, ...]) -> Any:
    args = copy.deepcopy(to_float64(args))
    out = op.reference(*args)
    return tuple(op.mutated(args)) if op.mutates else out


def backends(op: Op) -> list[str]:
    return [*op.supported, "reference"]


FORWARD = [
    pytest.param(op, backend, dtype, id=f"{op.name}-{backend}-{short(dtype)}")
    for op in REGISTRY.values()
    for backend in backends(op)
    for dtype in DTYPES
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("op, backend, dtype", FORWARD)
def test_forward(op: Op, backend: str, dtype: torch.dtype, mode: str, device: str) -> None:
    needs(op, backend, device, dtype)
    for sample in op.samples(torch.device(device), dtype, SEED):
        truth = truth_of(op, sample.args)
        call = op if mode == "eager" else torch.compile(op, backend=mode, fullgraph=True)
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in sample.args)
        with wk.use_backend(backend):
            out = call(*args)
        out = tuple(op.mutated(args)) if op.mutates else out
        assert_close(out, truth, op.tolerance, f"{sample.name}: output")
        if mode == "aot_eager":
            torch._dynamo.reset()


def gradients(call: Any, sample: Sample, args: tuple[Any, ...], grads: list[Tensor]) -> list[Any]:
    inputs = [args[i].detach().requires_grad_() for i in sample.differentiable]
    args = list(args)
    for i, value in zip(sample.differentiable, inputs, strict=True):
        args[i] = value
    out = call(*args)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    # Second outputs carry no gradient: x_0 of flow_mix is constant.
    return list(torch.autograd.grad(outs[:1], inputs, [g.to(outs[0].dtype) for g in grads[:1]]))


DIFFERENTIABLE = [p for p in FORWARD if p.values[0].backward and not p.values[0].internal]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("op, backend, dtype", DIFFERENTIABLE)
def test_gradient(op: Op, backend: str, dtype: torch.dtype, mode: str, device: str) -> None:
    needs(op, backend, device, dtype)
    for sample in op.samples(torch.device(device), dtype, SEED):
        if not sample.differentiable:
            continue
        out = run(op, sample.args)[0]
        first = out[0] if isinstance(out, tuple) else out
        grads = [torch.randn(first.shape, dtype=torch.float64).to(device, first.dtype)]
        truth = gradients(
            op.reference, sample, to_float64(sample.args), [g.double() for g in grads]
        )
        call = op if mode == "eager" else torch.compile(op, backend=mode, fullgraph=True)
        with wk.use_backend(backend):
            actual = gradients(call, sample, sample.args, grads)
        assert_close(actual, truth, "reduction", f"{sample.name}: gradient")
        if mode == "aot_eager":
            torch._dynamo.reset()


GRADCHECK = [p for p in DIFFERENTIABLE if p.values[2] == torch.float64]


def small(op: Op) -> list[Sample]:
    return [s for s in op.samples(torch.device("cpu"), torch.float64, SEED) if s.differentiable]


def with_inputs(op: Op, sample: Sample) -> tuple[Any, list[Tensor]]:
    inputs = [sample.args[i].clone().requires_grad_() for i in sample.differentiable]

    def call(*values: Tensor) -> Any:
        args = list(sample.args)
        for i, value in zip(sample.differentiable, values, strict=True):
            args[i] = value
        out = op(*args)
        return out[0] if isinstance(out, tuple) else out

    return call, inputs


@pytest.mark.parametrize("op, backend, dtype", GRADCHECK)
def test_gradcheck(op: Op, backend: str, dtype: torch.dtype) -> None:
    needs(op, backend, "cpu", dtype)
    for sample in small(op):
        call, inputs = with_inputs(op, sample)
        with wk.use_backend(backend):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True), sample.name


@pytest.mark.parametrize("op, backend, dtype", GRADCHECK)
def test_double_backward_is_right_or_refused(op: Op, backend: str, dtype: torch.dtype) -> None:
    needs(op, backend, "cpu", dtype)
    for sample in small(op):
        call, inputs = with_inputs(op, sample)
        with wk.use_backend(backend):
            try:
                right = torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
            except RuntimeError as error:
                if "double backward not implemented" not in str(error):
                    raise
                continue
        assert right, sample.name


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(op: Op, dtype: torch.dtype) -> None:
    for sample in op.samples(torch.device("cpu"), dtype, SEED):
        args = list(sample.args)
        for i in sample.differentiable:
            args[i] = args[i].clone().requires_grad_()
        torch.library.opcheck(op.torch_op, tuple(args))


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values()])
@pytest.mark.parametrize("backend", ["cpp", "compile"])
def test_inductor(op: Op, backend: str) -> None:
    needs(op, backend, "cpu", torch.float32)
    sample = op.samples(torch.device("cpu"), torch.float32, SEED)[0]
    truth = truth_of(op, sample.args)
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in sample.args)
    with wk.use_backend(backend):
        out = torch.compile(op, fullgraph=True)(*args) if backend == "cpp" else op(*args)
    out = tuple(op.mutated(args)) if op.mutates else out
    assert_close(out, truth, op.tolerance, f"{sample.name}: output")


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values()])
def test_modes_change_nothing(op: Op) -> None:
    """inference_mode, autocast and non-contiguous inputs give the same bits."""
    sample = op.samples(torch.device("cpu"), torch.float32, SEED)[0]
    plain = run(op, sample.args)[0]
    with torch.inference_mode():
        inference = run(op, sample.args)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run(op, sample.args)[0]

    def strided(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.transpose(0, -1).contiguous().transpose(0, -1)

    args = sample.args if op.mutates else tuple(strided(a) for a in sample.args)
    other = op(*args) if not op.mutates else run(op, args)[0]
    for result in (inference, autocast, other):
        pairs = zip(plain, result, strict=True) if isinstance(plain, tuple) else [(plain, result)]
        assert all(torch.equal(a, b) for a, b in pairs)
