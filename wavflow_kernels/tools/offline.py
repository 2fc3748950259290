"""What the ops' Triton launchers launch on an architecture, compiled as Triton would there.

The launchers run on meta tensors, under ``_triton.launch.recording``: nothing here needs a GPU.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _tuned
from .._registry import Op, tensors
from .._triton.launch import Launch, recording
from . import sass

META = torch.device("meta")
BULK_WIDTH = 16  # bytes a thread
COPY = "a tensor made by the launcher"


@dataclass(frozen=True)
class Architecture:
    """A GPU generation: `tensor` is its matrix instruction, `shared` a block's memory in bytes."""

    name: str
    capability: tuple[int, int]
    tensor: str
    shared: int


ARCHITECTURES = {
    80: Architecture("sm_80", (8, 0), "HMMA", 163 << 10),
    90: Architecture("sm_90a", (9, 0), "HGMMA", 227 << 10),
    100: Architecture("sm_100a", (10, 0), "UTCHMMA", 227 << 10),
}


@dataclass(eq=False)
class Build:
    """One compilation: `source` with `options` for sm_`number`, and the calls that launch it."""

    number: int
    source: Any
    options: Any
    calls: list[Call] = field(default_factory=list)

    @property
    def constants(self) -> str:
        names, values = self.source.fn.arg_names, self.source.constants.items()
        return " ".join(f"{names[path[0]]}={value}" for path, value in values)

    def __str__(self) -> str:
        how = f"{self.constants} warps={self.options.num_warps} stages={self.options.num_stages}"
        return f"{self.source.fn.__name__} [{how}] of {several(map(str, self.calls))}"


@dataclass(eq=False)
class Call:
    """One call of an op for sm_`number`, and what its launcher launched.

    bulk        {operand of Op.bulk: whether its rows are aligned}
    launches    (build, {place among the compiled kernel's parameters: operand or COPY}, grid)
    """

    op: Op
    name: str
    dtype: torch.dtype
    number: int
    bulk: dict[str, bool]
    launches: list[tuple[Build, dict[int, str], tuple[int, ...]]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.op.name} ({self.name}, {short(self.dtype)}, sm_{self.number})"


@dataclass
class Examined:
    """What the rules look at of a compiled Triton kernel."""

    cubin: bytes
    code: sass.Code
    shared: int  # bytes of a block, static and dynamic
    tensor_memory: int  # columns
    multiplies: bool
    loads: list[sass.Load]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def several(names: Iterable[str]) -> str:
    first, *rest = dict.fromkeys(names)
    return f"{first} and {len(rest)} more" if rest else first


def _brief(error: BaseException) -> str:
    """Shorten an error to a line: of many, compilers say what is wrong in the first and last."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip(" :")]
    return ": ".join(dict.fromkeys([type(error).__name__, *lines[:1], *lines[-1:]]))


def collect(op: Op, number: int, builds: dict[str, Build]) -> Iterator[Call | str]:
    """Run the op's launcher as on sm_`number`: yields its calls and problems, fills `builds`.

    Each call is made as on a GPU that was never tuned, then as on each of the tuning tables. Where
    bfloat16 runs, float16 is called for sm_90 alone: the two have the same instructions, registers
    and tiles but for the format's name.
    """
    capability = ARCHITECTURES[number].capability
    dtypes = op.supported["triton"]["cuda"]
    if number != 90 and torch.bfloat16 in dtypes:
        dtypes -= {torch.float16}
    for dtype in sorted(dtypes, key=str):
        for name, args in _arguments(op, dtype):
            for table in [{}, *_tuned.tables(capability)]:
                call = Call(op, name, dtype, number, {})
                try:
                    op.check(*args)
                    outputs = op.outputs(*args)
                    with recording(capability) as launches, _tuned.pretending(table):
                        op.launch["triton"](outputs, *args)
                    operands = _operands(op, args)
                    call.bulk = {
                        name: _aligned(tensor)
                        for name, tensor in operands
                        if name.split("[")[0] in op.bulk and tensor.numel()
                    }
                    known = operands + [("", tensor) for tensor in tensors([outputs])]
                    for launch in launches:
                        _add(call, launch, known, builds)
                except Exception as error:
                    yield f"{call}: {_brief(error)}"
                else:
                    yield call


def _arguments(op: Op, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The op's workloads on the meta device, its samples where it has none."""
    for name, make in op.workloads.items():
        yield name, make(META, dtype)
    if not op.workloads:
        for sample in op.samples(META, dtype, 0):
            yield sample.name or "sample", sample.args


def _operands(op: Op, args: Sequence[Any]) -> list[tuple[str, torch.Tensor]]:
    """The op's tensors by name, those of a list as "qkv[0]"."""
    named = []
    for argument, value in op.named(args).items():
        if isinstance(value, (list, tuple)):
            named += [(f"{argument}[{i}]", t) for i, t in enumerate(value)]
        else:
            named.append((argument, value))
    return [(name, t) for name, t in named if isinstance(t, torch.Tensor)]


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether every row, along the axis of stride 1, starts and ends on 16 bytes."""
    sizes = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    rows = [n for n, stride in sizes if stride == 1]
    lengths = [stride for _, stride in sizes if stride != 1] + rows + [tensor.storage_offset()]
    return len(rows) == 1 and all(n * tensor.element_size() % BULK_WIDTH == 0 for n in lengths)


def _add(
    call: Call,
    launch: Launch,
    known: Sequence[tuple[str, torch.Tensor]],
    builds: dict[str, Build],
) -> None:
    """Add a launch to its call, and to `builds` what it compiles, as Triton specialises it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"a launched kernel must be a plain @triton.jit, got {kernel!r}")
    backend = make_backend(GPUTarget("cuda", call.number, 32))
    given = {**launch.constants, **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, extra = bind(*launch.args, **given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, kinds, extra
    )
    source = ASTSource(kernel, signature, constants, attributes)
    key = f"{call.number} {source.hash()} {options.hash()}"
    build = builds.setdefault(key, Build(call.number, source, options))
    build.calls.append(call)
    places = _places(list(signature.values()), list(bound.values()), known)
    call.launches.append((build, places, launch.grid))


def _places(
    kinds: Sequence[Any], values: Sequence[Any], known: Sequence[tuple[str, torch.Tensor]]
) -> dict[int, str]:
    """Which operand's memory each of the compiled kernel's parameters points to, by its place.

    Tensors that the launcher made, with aligned rows and the dtype of the first operand, are COPY.
    """
    pairs = zip(flat(kinds), flat(values), strict=True)
    parameters = [(kind, value) for kind, value in pairs if kind != "constexpr"]
    if any("tensordesc" in kind for kind, _ in parameters):
        raise TypeError("tensor descriptors made by the host are not supported; make them inside")
    found = {}
    for place, (_, value) in enumerate(parameters):
        if not isinstance(value, torch.Tensor):
            continue
        same = [(n, t) for n, t in known if _memory(t) == _memory(value)]
        exact = [n for n, t in same if t.storage_offset() == value.storage_offset()]
        if same:
            found[place] = (exact or [same[0][0]])[0]
        elif value.dtype == known[0][1].dtype and _aligned(value):
            found[place] = COPY
    return {place: name for place, name in found.items() if name}


def flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_queue: list[Build] = []  # read by forked workers: a kernel cannot be pickled


def compile_all(builds: Sequence[Build]) -> list[Examined | str]:
    """Compile in two processes. A kernel that does not compile is the text of its error."""
    _queue[:] = builds
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(_compile, range(len(builds)), chunksize=1)
        examined = [result for result in results if isinstance(result, Examined)]
        parts = []
        for architecture in ARCHITECTURES.values():
            its = [e for e in examined if e.code.architecture == architecture.name]
            parts += [part for part in (its[::2], its[1::2]) if part]
        jobs = [(part[0].code.architecture, [e.cubin for e in part]) for part in parts]
        for part, found in zip(parts, pool.map(_disassemble, jobs, chunksize=1), strict=True):
            for each, opcodes in zip(part, found, strict=True):
                each.code.opcodes = opcodes
    return results


def _compile(index: int) -> Examined | str:
    import triton
    from triton.backends.compiler import GPUTarget

    build = _queue[index]
    try:
        target = GPUTarget("cuda", build.number, 32)
        compiled = triton.compile(build.source, target=target, options=build.options.__dict__)
        cubin = compiled.asm["cubin"]
        code = sass.usage(cuobjdump(), cubin, ARCHITECTURES[build.number].name)
    except Exception as error:
        return _brief(error)
    return Examined(
        cubin,
        code,
        code.shared + compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        re.search(r"\btt\.dot", compiled.asm["ttir"]) is not None,
        sass.global_loads(compiled.asm["ptx"]),
    )


def _disassemble(job: tuple[str, list[bytes]]) -> list[Counter[str]]:
    from triton import knobs

    return sass.disassemble(knobs.nvidia.nvdisasm.path, *job)


def cuobjdump() -> str:
    from triton import knobs

    return knobs.nvidia.cuobjdump.path
