"""How an op is compared with its reference in float64, for every backend, dtype and mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import wavflow_kernels as wk
from support.numerics import assert_close, to_float64
from wavflow_kernels import _backend
from wavflow_kernels._registry import Op, Sample, tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SEED = 7


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needs(op: Op, backend: str | None, device: str, dtype: torch.dtype) -> None:
    reason = backend and _backend.unavailable(op, backend, torch.device(device), dtype)
    if reason:
        pytest.skip(reason)


def backends(op: Op, device: str) -> list[str]:
    if device == "cpu" and _backend.TRITON_INTERPRETS:
        return ["triton"] if "triton" in op.supported else []
    return [*(b for b, devices in op.supported.items() if device in devices), "reference"]


def dtypes(op: Op, backend: str, device: str) -> list[torch.dtype]:
    if backend == "reference":
        return list(DTYPES)
    on = "cuda" if backend == "triton" else device
    return [dtype for dtype in DTYPES if dtype in op.supported[backend][on]]


def samples(op: Op, device: str, dtype: torch.dtype) -> list[Sample]:
    return list(op.samples(torch.device(device), dtype, SEED))


def copied(args: Sequence[Any]) -> tuple[Any, ...]:
    """Fresh copies of the tensors, with their strides."""
    return tuple(
        a.clone() if isinstance(a, Tensor) else list(copied(a)) if isinstance(a, list) else a
        for a in args
    )


def run(call: Callable[..., Any], op: Op, args: Sequence[Any]) -> Any:
    """The outputs of a call (what a mutating op changed), on copies of the arguments."""
    args = copied(args)
    out = call(*args)
    return tuple(op.mutated(args)) if op.mutates else out


def matching(out: Any, truth: Any) -> Any:
    """As many of the truth's tensors as there are outputs: a library gives the first ones."""
    return truth[: len(out)] if isinstance(out, tuple) else truth


def truth_of(op: Op, args: tuple[Any, ...]) -> Any:
    return run(op.reference, op, copy.deepcopy(to_float64(args)))


def compiled(op: Op, mode: str) -> Callable[..., Any]:
    return op if mode == "eager" else torch.compile(op, backend=mode, fullgraph=True)


def structure(sample: Sample) -> Any:
    """What a trace of the call depends on, but for sizes and strides: opcheck traces those too."""

    def kind(value: Any) -> Any:
        if isinstance(value, list):
            return [kind(v) for v in value]
        return value if isinstance(value, (int, type(None))) else type(value)

    return [kind(value) for value in sample.args], sample.differentiable


def different(samples: list[Sample]) -> list[Sample]:
    """The first sample of each structure: one trace stands for all of its kind."""
    return [
        sample
        for i, sample in enumerate(samples)
        if structure(sample) not in [structure(before) for before in samples[:i]]
    ]


def of_mode(mode: str, op: Op, device: str, dtype: torch.dtype) -> list[Sample]:
    every = samples(op, device, dtype)
    return every if mode == "eager" else different(every)


def check_forward(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
    needs(op, backend, device, dtype)
    for sample in of_mode(mode, op, device, dtype):
        with wk.use_backend(backend):
            out = run(compiled(op, mode), op, sample.args)
        peer = run(op.reference, op, sample.args)
        truth = matching(out, truth_of(op, sample.args))
        assert_close(out, truth, op.tolerance, f"{sample.name}: output", peer)
        if mode == "aot_eager":
            torch._dynamo.reset()


def with_inputs(
    op: Op, call: Callable[..., Any], sample: Sample
) -> tuple[Callable[..., Any], list[Tensor]]:
    """`call` as a function of its differentiable tensors alone, and those tensors."""
    inputs = [
        t.detach().clone().requires_grad_()
        for t in tensors([sample.args[i] for i in sample.differentiable])
    ]

    def function(*values: Tensor) -> Any:
        rest, args = list(values), list(sample.args)
        for i in sample.differentiable:
            if isinstance(args[i], Tensor):
                args[i] = rest.pop(0)
            else:
                args[i] = [rest.pop(0) for _ in args[i]]
        out = call(*args)
        return out[: op.differentiable_outputs] if isinstance(out, (tuple, list)) else out

    return function, inputs


def gradients(op: Op, call: Callable[..., Any], sample: Sample, grads: list[Tensor]) -> Any:
    function, inputs = with_inputs(op, call, sample)
    outs = list(tensors([function(*inputs)]))
    return torch.autograd.grad(
        outs, inputs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    )


def check_gradient(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
    needs(op, backend, device, dtype)
    for sample in of_mode(mode, op, device, dtype):
        if not sample.differentiable:
            continue
        out = run(op.reference, op, sample.args)
        grads = [
            torch.randn(o.shape, dtype=torch.float64).to(device, o.dtype)
            for o in list(tensors([out]))[: op.differentiable_outputs]
        ]
        exact = Sample(to_float64(sample.args), sample.differentiable)
        truth = gradients(op, op.reference, exact, grads)
        peer = gradients(op, op.reference, sample, grads)
        with wk.use_backend(backend):
            actual = gradients(op, compiled(op, mode), sample, grads)
        tolerance = "matrix" if op.tolerance == "matrix" else "reduction"
        assert_close(actual, truth, tolerance, f"{sample.name}: gradient", peer)
        if mode == "aot_eager":
            torch._dynamo.reset()
