"""The registry: one :class:`Op` describes one op completely, and registers it with torch.

An op's file in ``ops/`` builds an ``Op`` and calls it from its public function. Tests, benchmarks
and ``python -m wavflow_kernels`` find every op through :data:`REGISTRY`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _backend
from ._check import FLOATS

REGISTRY: dict[str, Op] = {}
# The functions of an op that take arguments of a call alone.
PARTS = ("reference", "check", "check_values", "outputs", "library", "prefer", "bytes", "flops")

_library = torch.library.Library("wavflow", "DEF")

# What kernels support: every float dtype in C++ on the CPU, or on both devices; all but float64 in
# Triton.
ON_CPU = {"cpu": frozenset(FLOATS)}
ON_BOTH = {"cpu": frozenset(FLOATS), "cuda": frozenset(FLOATS)}
ON_TRITON = {"cuda": frozenset(FLOATS) - {torch.float64}}


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, for tests; `differentiable` indexes into them.

    A differentiable argument may be a list of tensors: then all of them are.
    """

    args: tuple[Any, ...]
    differentiable: tuple[int, ...] = ()
    name: str = ""


# Makes the arguments of one call of realistic size, on any device, "meta" included.
Workload = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


def normals(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    """A function that draws standard normals for samples: ``normal(*shape, dtype=dtype)``."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return normal


@dataclass(frozen=True, kw_only=True)
class Op:
    """Everything about one op.

    Its functions are written with the arguments that they use alone, by their names in the schema:
    for ``(Tensor x, Tensor y, float s) -> Tensor`` `bytes` may be ``lambda y: y.nbytes``. A last
    parameter ``**rest`` takes all others by name; a function of ``*rest`` takes all in order. The
    op holds them as functions of all arguments in the order of the schema: `args` below.

    schema      torch schema without the name: "(Tensor x, float s) -> Tensor"
    reference   reference(args): the mathematics in plain torch, on any device
    check       check(args): raises ValueError / TypeError on arguments that do not fit; looks
                at shapes, dtypes and devices only
    check_values   check_values(args): likewise, of values on a CPU; not called in traced
                code
    outputs     outputs(args): empty outputs, a tensor or a tuple; with `check` the fake
                kernel
    launch      {"cpp" or "triton": launch(outputs, args)}: fills the outputs
    library     library(args): the differentiable outputs by calls of torch's own libraries
                (oneDNN, cuDNN, SDPA); called directly, so that autograd and an outer torch.compile
                see through it
    supported   {backend: {"cpu": {dtypes}, "cuda": {dtypes}}}, dtypes of the first tensor
    prefer      prefer(args): the backend measured fastest, or None for the first of cpp,
                triton, library that runs; looks at shapes, dtypes and devices only, and may raise
                anything on arguments that `check` refuses
    samples     samples(device, dtype, seed): sample calls
    workloads   {name: make(device, dtype)}: calls of realistic size, for benchmarks and
                ``tools.aot``
    bytes       bytes(args): least memory traffic of a call, for benchmarks
    flops       flops(args): arithmetic of a call; torch's FlopCounterMode reads it for
                "matrix" ops, as it counts matrix products alone
    tolerance   class of tests/support/numerics.py: "exact", "single_pass", "reduction" or "matrix"
    setup_context   setup_context(ctx, output, args): saves what the backward needs
    backward    backward(ctx, *grads): {name: gradient} of the arguments that have one; None: not
                differentiable
    differentiable_outputs    how many of the outputs, from the first, carry gradients
    autocast    names of the arguments that autocast casts; the rest keep their dtypes
    bulk        names of the tensors that make up the memory traffic: Triton kernels must load
                them 16 bytes at a time where sizes are aligned
    mutates     the schema mutates an argument and returns nothing
    internal    a part of another op: no public function
    stem        the name of its files in csrc/ and _triton/; by default that of the op, a backward
                or in-place op sharing those of the op it belongs to
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
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    check_values: Callable[..., None] | None = None
    library: Callable[..., Any] | None = None
    prefer: Callable[..., str | None] | None = None
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    differentiable_outputs: int = 1
    autocast: tuple[str, ...] = ()
    bulk: tuple[str, ...] = ()
    mutates: bool = False
    internal: bool = False
    stem: str = ""
    torch_op: Any = field(init=False, repr=False, default=None)
    arguments: tuple[str, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if self.name in REGISTRY:
            raise ValueError(f"op {self.name} is registered twice")
        if not self.stem:
            stem = self.name.removesuffix("_backward").rstrip("_")
            object.__setattr__(self, "stem", stem)
        _library.define(self.name + self.schema)
        packet = getattr(torch.ops.wavflow, self.name)
        object.__setattr__(self, "torch_op", packet.default)
        # Their names are read in traced code, where the schema itself cannot be.
        names = tuple(a.name for a in packet.default._schema.arguments)
        object.__setattr__(self, "arguments", names)
        for part in PARTS:
            if (function := getattr(self, part)) is not None:
                object.__setattr__(self, part, by_name(function, names))
        launch = {backend: by_name(f, names, own=1) for backend, f in self.launch.items()}
        object.__setattr__(self, "launch", launch)
        for key in ("CPU", "CUDA", "MkldnnCPU"):  # the last: weights in oneDNN's layouts
            _library.impl(self.name, self._run, key)
        torch.library.register_fake(f"wavflow::{self.name}", self._fake, lib=_library)
        if self.backward is not None:
            torch.library.register_autograd(
                f"wavflow::{self.name}",
                self._backward,
                setup_context=None if self.setup_context is None else self._setup_context,
                lib=_library,
            )
            if self.setup_context is not None:
                setup = by_name(self.setup_context, names, own=2)
                object.__setattr__(self, "setup_context", setup)
        else:
            _library.impl(self.name, self._refuse_gradients, "Autograd", with_keyset=True)
        if self.tolerance == "matrix":
            register_flop_formula(packet, get_raw=True)(lambda *args, out_val: self.flops(*args))
        REGISTRY[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run with the backend chosen for the first tensor's device and dtype.

        `args` come in the order of the schema. They are checked once: here, or by the torch op.
        """
        first = self.first(args)
        if torch.is_autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return self(*self.cast(args, torch.get_autocast_dtype(first.device.type)))
        compiling = torch.compiler.is_compiling()
        try:
            backend = _backend.choose(self, first.device, first.dtype, args)
        except Exception:
            self.check(*args)  # prefer() met what nobody has checked yet
            raise
        if backend in ("cpp", "triton") or self.mutates:
            return self.torch_op(*args)
        if not compiling:
            self.check(*args)
            if self.check_values is not None:
                self.check_values(*args)
            if backend == "compile":
                return _compiled(self.name)(*args)
        if backend == "library":
            assert self.library is not None  # or it would not have been chosen
            return self.library(*args)
        return self.reference(*args)

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by their names in the schema."""
        return dict(zip(self.arguments, args, strict=True))

    def needs(self, ctx: Any, name: str) -> bool:
        """Whether a backward is to return the gradient of this argument; not for ops of lists."""
        return ctx.needs_input_grad[self.arguments.index(name)]

    def first(self, args: Sequence[Any]) -> torch.Tensor:
        """The tensor whose device and dtype decide where a call runs."""
        first = args[0]
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if not isinstance(first, torch.Tensor):
            raise TypeError(
                f"{self.name}: the first argument must be a tensor, got {type(args[0]).__name__}"
            )
        return first

    def cast(self, args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """The arguments of a call as autocast to `dtype` casts them."""
        return [
            _cast(a, dtype) if name in self.autocast else a
            for name, a in zip(self.arguments, args, strict=True)
        ]

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        if self.check_values is not None:
            self.check_values(*args)
        first = self.first(args)
        backend = _backend.choose(self, first.device, first.dtype, args, part=True)
        launch = self.launch.get(backend)
        if launch is None:
            with torch.autocast(first.device.type, enabled=False):
                return self.reference(*args)
        outputs = self.outputs(*args)
        if backend == "triton" and first.device.type == "cuda":
            with torch.cuda.device(first.device):
                launch(outputs, *args)
        else:
            launch(outputs, *args)
        if self.mutates:
            for tensor in self.mutated(args):
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return outputs

    def _fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.outputs(*args)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self.setup_context is not None  # or this would not have been registered
        self.setup_context(ctx, output, *inputs)

    def _backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        assert self.backward is not None  # likewise
        gradients = self.backward(ctx, *grads)
        return tuple(gradients.get(name) for name in self.arguments)

    def mutated(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The arguments a call changes in place, by the schema's alias annotations."""
        arguments = self.torch_op._schema.arguments
        return [
            args[i]
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]

    def _refuse_gradients(self, keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(args)):
            way_out = "call it under torch.no_grad()"
            if self.mutates:
                raise RuntimeError(
                    f"{self.name} works in place and has no gradient: use "
                    f"{self.name.rstrip('_')} or {way_out}"
                )
            raise RuntimeError(f"{self.name} has no gradient: {way_out}")
        with torch._C._AutoDispatchBelowAutograd():
            return self.torch_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, and in lists among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast by autocast's rule: float tensors, except float64, to `dtype`."""
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


_compiled_references: dict[str, Callable[..., Any]] = {}


def _compiled(name: str) -> Callable[..., Any]:
    if name not in _compiled_references:
        _compiled_references[name] = torch.compile(REGISTRY[name].reference)
    return _compiled_references[name]


def by_name(function: Callable[..., Any], names: tuple[str, ...], own: int = 0) -> Any:
    """A function of all arguments, in the order of `names`, that calls `function` with its own.

    The first `own` parameters of `function` are not among the names; they come first in both.
    Raises TypeError for another that is not. A function of ``*args`` is left as it is.
    """
    parameters = list(inspect.signature(function).parameters.values())[own:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function
    wanted = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if not set(wanted) <= set(names):
        raise TypeError(f"{function}: parameters {wanted}, wanted of {', '.join(names)}")
    places = [own + names.index(name) for name in wanted]
    rest = [(own + i, name) for i, name in enumerate(names) if name not in wanted]
    if len(wanted) == len(parameters):
        if tuple(wanted) == names:
            return function
        rest = []

    def call(*args: Any) -> Any:
        given = [args[i] for i in places]
        return function(*args[:own], *given, **{name: args[i] for i, name in rest})

    return call


def no_double_backward(name: str) -> Callable[..., Any]:
    """A backward for `name`'s backward op: raises, since second derivatives are not implemented."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: double backward not implemented")

    return backward
