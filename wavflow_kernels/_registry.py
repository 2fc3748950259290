"""The registry: one :class:`Op` describes one op completely, and registers it with torch.

An op's file in ``ops/`` builds an ``Op`` and calls it from its public function. Tests, benchmarks
and ``python -m wavflow_kernels`` find every op through :data:`REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _backend

REGISTRY: dict[str, Op] = {}

_library = torch.library.Library("wavflow", "DEF")

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, for tests and benchmarks. `differentiable` indexes into `args`."""

    args: tuple[Any, ...]
    differentiable: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Op:
    """Everything about one op. `args` are its arguments in the order of the schema.

    schema      torch schema without the name: "(Tensor x, float s) -> Tensor"
    reference   reference(*args): the mathematics in plain torch, on any device
    check       check(*args): raises ValueError / TypeError on arguments that do not fit; looks at
                shapes, dtypes and devices only
    outputs     outputs(*args): empty outputs, a tensor or a tuple; with `check` the fake kernel
    launch      {"cpp": launch(outputs, *args)}: fills the outputs
    supported   {"cpp": {"cpu": {dtypes}, "cuda": {dtypes}}}, dtypes of the first argument
    samples     samples(device, dtype, seed): sample calls
    bytes       least memory traffic of a call, from its arguments, for benchmarks
    flops       arithmetic of a call, likewise
    tolerance   class of tests/numerics.py: "exact", "single_pass" or "reduction"
    setup_context, backward   as in torch.library.register_autograd; None: not differentiable
    mutates     the schema mutates an argument and returns nothing
    internal    the backward of another op: no public function
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    check: Callable[..., Any]
    outputs: Callable[..., Any]
    launch: Mapping[str, Callable[..., None]]
    supported: Mapping[str, Mapping[str, frozenset[torch.dtype]]]
    samples: Callable[[torch.device, torch.dtype, int], Sequence[Sample]]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    tolerance: str
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    mutates: bool = False
    internal: bool = False
    torch_op: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.name in REGISTRY:
            raise ValueError(f"op {self.name} is registered twice")
        _library.define(self.name + self.schema)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self._run, key)
        torch.library.register_fake(f"wavflow::{self.name}", self._fake, lib=_library)
        if self.backward is not None:
            torch.library.register_autograd(
                f"wavflow::{self.name}",
                self.backward,
                setup_context=self.setup_context,
                lib=_library,
            )
        elif self.mutates:
            _library.impl(self.name, self._refuse_gradients, "Autograd", with_keyset=True)
        object.__setattr__(self, "torch_op", getattr(torch.ops.wavflow, self.name).default)
        REGISTRY[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run with the backend chosen for the first argument's device and dtype."""
        first = args[0]
        if not isinstance(first, torch.Tensor):
            raise TypeError(
                f"{self.name}: the first argument must be a tensor, got {type(first).__name__}"
            )
        backend = _backend.choose(self, first.device, first.dtype)
        if backend in ("cpp", "triton") or self.mutates:
            return self.torch_op(*args)
        if not torch.compiler.is_compiling():
            self.check(*args)
            if backend == "compile":
                return _compiled(self.name)(*args)
        return self.reference(*args)

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        backend = _backend.choose(self, args[0].device, args[0].dtype)
        launch = self.launch.get(backend)
        if launch is None:
            return self.reference(*args)
        outputs = self.outputs(*args)
        launch(outputs, *args)
        if self.mutates:
            for tensor in self.mutated(args):
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return outputs

    def _fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.outputs(*args)

    def mutated(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The arguments a call changes in place, by the schema's alias annotations."""
        arguments = self.torch_op._schema.arguments
        return [
            args[i]
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]

    def _refuse_gradients(self, keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            raise RuntimeError(
                f"{self.name} works in place and has no gradient: use {self.name.rstrip('_')} "
                "or call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self.torch_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


_compiled_references: dict[str, Callable[..., Any]] = {}


def _compiled(name: str) -> Callable[..., Any]:
    if name not in _compiled_references:
        _compiled_references[name] = torch.compile(REGISTRY[name].reference)
    return _compiled_references[name]


def target(tensor: torch.Tensor) -> Any:
    """Where a compiled kernel runs: the tensor's device, torch's threads or its current stream."""
    if tensor.device.type == "cuda":
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        return _backend.C.Target(tensor.device.index, 0, stream)
    return _backend.C.Target(-1, torch.get_num_threads(), 0)


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's data pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def no_double_backward(name: str) -> Callable[..., Any]:
    """A backward for `name`'s backward op: raises, since second derivatives are not implemented."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: double backward not implemented")

    return backward
