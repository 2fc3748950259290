"""Every op of the registry, through one matrix: op x backend x dtype x sample x mode.

Under ``TRITON_INTERPRET=1`` the matrix holds the Triton kernels on the CPU in place of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numerics import assert_close, to_float64
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend
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


def with_modes(cases: list[Any]) -> list[Any]:
    """Each case in eager mode, and traced in float32."""
    return [
        pytest.param(*case.values, mode, id=f"{case.id}-{mode}", marks=case.marks)
        for case in cases
        for mode in ("eager", "aot_eager")
        if mode == "eager" or case.values[2] == torch.float32
    ]


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


@pytest.mark.parametrize("op, backend, dtype, device, mode", with_modes(FORWARD))
def test_forward(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
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


DIFFERENTIABLE = [p for p in FORWARD if p.values[0].backward and not p.values[0].internal]


@pytest.mark.parametrize("op, backend, dtype, device, mode", with_modes(DIFFERENTIABLE))
def test_gradient(op: Op, backend: str | None, dtype: torch.dtype, device: str, mode: str) -> None:
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
        cast = run(op, op, op._autocast(sample.args, half))
        with torch.autocast("cpu", dtype=half):
            same(cast, run(op, op, sample.args))


def same(actual: Any, wanted: Any) -> None:
    pairs = zip(tensors([actual]), tensors([wanted]), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
