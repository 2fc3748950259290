"""``python -m wavflow_kernels.tools.aot``: the GPU kernels, compiled and examined without a GPU.

The Triton launchers of all ops run on meta tensors; what they launch is compiled for every
architecture as Triton would compile it there. The kernels of ``csrc/cuda`` are read from the
compiled extension. One table shows registers, local memory, shared memory and instructions of
every kernel. A problem is one line, and makes the exit status 1:

- local memory (spilled registers, local arrays) or float64 instructions in a kernel that computes
  in another type;
- a float16 or bfloat16 kernel that multiplies matrices without the tensor-core instruction of its
  architecture, and an op of tolerance "matrix" none of whose kernels multiplies matrices;
- an operand of ``Op.bulk`` that is loaded less than 16 bytes at a time though its rows are aligned,
  or that no kernel loads because it is copied first; likewise the launcher's own aligned copy of
  an operand whose rows are not aligned;
- more shared memory, tensor memory or blocks than the architecture has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import REGISTRY, _backend
from .._registry import Op
from . import sass
from .offline import (
    ARCHITECTURES,
    BULK_WIDTH,
    COPY,
    Build,
    Call,
    Examined,
    collect,
    compile_all,
    cuobjdump,
    flat,
    short,
)

HALVES = (torch.bfloat16, torch.float16)
TENSOR_MEMORY = 512  # columns of a multiprocessor, sm_100
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass
class Row:
    """One line of the table."""

    kernel: str
    architecture: str
    ops: list[str]
    dtypes: list[str]
    constants: str
    warps: int | None
    stages: int | None
    registers: int
    local: int  # instructions on local memory
    shared: int  # bytes of a block
    tensor: dict[str, int]
    fp64: dict[str, int]
    loads: dict[str, int]  # instructions by bytes a thread


# The rules.


def judge_build(build: Build, examined: Examined) -> Iterator[str]:
    """The problems of one compiled Triton kernel."""
    architecture, code = ARCHITECTURES[build.number], examined.code
    wide = "*fp64" in flat(build.source.signature.values())
    yield from (f"{build}: {problem}" for problem in judge_code(code, wide))
    half = any(call.dtype in HALVES for call in build.calls)
    if half and examined.multiplies and not code.tensor[architecture.tensor]:
        found = ", ".join(code.tensor) or "none"
        yield f"{build}: multiplies matrices without {architecture.tensor} (found: {found})"
    if examined.shared > architecture.shared:
        yield (
            f"{build}: needs {examined.shared} bytes of shared memory, a block has "
            f"{architecture.shared}"
        )
    if examined.tensor_memory > TENSOR_MEMORY:
        yield (
            f"{build}: needs {examined.tensor_memory} columns of tensor memory, there are "
            f"{TENSOR_MEMORY}"
        )


def judge_code(code: sass.Code, wide: bool) -> Iterator[str]:
    """The problems in the machine code; `wide`: the kernel is to compute in float64."""
    if code.local and not wide:
        yield f"{code.local} instructions on local memory, {code.stack} bytes a thread"
    if code.fp64 and not wide:
        yield f"float64 instructions: {_counts(code.fp64)}"


def judge_call(call: Call, examined: dict[Build, Examined]) -> Iterator[str]:
    """The problems of a call as a whole: its operands, its products, its grids."""
    built = [launch for launch in call.launches if launch[0] in examined]
    if len(built) < len(call.launches):
        return  # the error is reported
    if call.op.workloads and not built:
        yield f"{call}: launches nothing"
    if built and call.op.tolerance == "matrix":
        if not any(examined[build].multiplies for build, _, _ in built):
            yield f"{call}: no kernel multiplies matrices (tl.dot)"
    loads: dict[str, list[tuple[str, list[int]]]] = {}
    for build, places, grid in built:
        kernel = build.source.fn.__name__
        if len(grid) > 3 or any(n > most for n, most in zip(grid, GRID_LIMITS, strict=False)):
            yield f"{call}: grid {grid} of {kernel} is beyond {GRID_LIMITS}"
        for place, operand in places.items():
            widths = [x.width for x in examined[build].loads if place in x.parameters]
            if widths or examined[build].code.loads["TMA"]:
                loads.setdefault(operand, []).append((kernel, widths))
    unread = [name for name in call.bulk if name not in loads]
    if built and (copied := [name for name in unread if call.bulk[name]]):
        yield f"{call}: no kernel loads {', '.join(copied)}: copied first?"
    # An operand whose rows are not aligned may come to the kernels as an aligned copy.
    wide = [name for name, aligned in call.bulk.items() if aligned] + [COPY] * bool(unread)
    for operand in wide:
        for kernel, widths in loads.get(operand, ()):
            if min(widths, default=BULK_WIDTH) < BULK_WIDTH:
                yield f"{call}: {kernel} loads {operand} {min(widths)} bytes at a time"


def compiled_kernels(library: Path, numbers: Sequence[int]) -> Iterator[tuple[Row, list]]:
    """Rows of the CUDA C++ kernels in `library`, with their problems."""
    for code in sass.read(cuobjdump(), library):
        if int(re.sub(r"\D", "", code.architecture)) not in numbers:
            continue
        name = sass.demangled(code.name)
        template = re.search(r"<(.*)>\(", name)
        wide = template is not None and "double" in template[1].split(", ")
        short = re.sub(r"^void |wavflow::|\(.*", "", name)
        row = _row(short, code, code.shared, dtypes=["float64"] if wide else [])
        yield (
            row,
            [f"{short} (csrc/cuda, {code.architecture}): {p}" for p in judge_code(code, wide)],
        )


# The report.


def _row(kernel: str, code: sass.Code, shared: int, **more: Any) -> Row:
    fields = {"ops": [], "dtypes": [], "constants": "", "warps": None, "stages": None, **more}
    return Row(
        kernel=kernel,
        architecture=code.architecture,
        registers=code.registers,
        local=code.local,
        shared=shared,
        tensor=dict(code.tensor),
        fp64=dict(code.fp64),
        loads=dict(code.loads),
        **fields,
    )


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{n}x{name}" for name, n in sorted(counts.items()))


def table(rows: Sequence[Row]) -> Any:
    """The rows as a rich table."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    columns: tuple[tuple[str, Literal["left", "right"]], ...] = (
        ("op", "left"),
        ("kernel", "left"),
        ("constants", "left"),
        ("dtype", "left"),
        ("arch", "left"),
        ("warps", "right"),
        ("stages", "right"),
        ("regs", "right"),
        ("local", "right"),
        ("shared", "right"),
        ("tensor", "left"),
        ("fp64", "left"),
        ("loads by bytes", "left"),
    )
    for name, justify in columns:
        result.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        result.add_row(
            " ".join(row.ops) or "csrc/cuda",
            row.kernel,
            row.constants,
            " ".join(row.dtypes),
            row.architecture,
            *("" if n is None else str(n) for n in (row.warps, row.stages)),
            str(row.registers),
            str(row.local or ""),
            str(row.shared or ""),
            _counts(row.tensor),
            _counts(row.fp64),
            _counts(row.loads),
        )
    return result


def examine(ops: Sequence[Op], numbers: Sequence[int]) -> tuple[list[Row], list[str]]:
    """Compile and judge every Triton kernel of the ops: table rows and problems."""
    builds: dict[str, Build] = {}
    calls: list[Call] = []
    problems: list[str] = []
    for op in ops:
        for number in numbers:
            for found in collect(op, number, builds):
                if isinstance(found, Call):
                    calls.append(found)
                else:
                    problems.append(found)
    print(f"compiling {len(builds)} Triton kernels of {len(calls)} calls", file=sys.stderr)
    examined: dict[Build, Examined] = {}
    rows = []
    for build, result in zip(builds.values(), compile_all(list(builds.values())), strict=True):
        if isinstance(result, str):
            problems.append(f"{build}: {result}")
            continue
        examined[build] = result
        problems += judge_build(build, result)
        rows.append(
            _row(
                build.source.fn.__name__,
                result.code,
                result.shared,
                ops=sorted({call.op.name for call in build.calls}),
                dtypes=sorted({short(call.dtype) for call in build.calls}),
                constants=build.constants,
                warps=build.options.num_warps,
                stages=build.options.num_stages,
            )
        )
    for call in calls:
        problems += judge_call(call, examined)
    return rows, problems


def _library(given: Path | None) -> Path | None:
    """The library with the CUDA C++ kernels: the given one or one in that folder, else ours."""
    if given is None:
        C: Any = _backend.C
        return Path(C.__file__) if C is not None and C.cuda_architectures else None
    found = sorted(given.glob("**/_C*.so")) if given.is_dir() else [given]
    if not found or not found[0].is_file():
        raise SystemExit(f"aot: {given} holds no _C*.so")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wavflow_kernels.tools.aot",
        description="Compile and examine the GPU kernels without a GPU.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and problems there")
    parser.add_argument("--arch", default="80,90,100", help="architectures (80,90,100)")
    parser.add_argument("--op", action="append", help="the Triton kernels of this op alone")
    parser.add_argument("--library", type=Path, help="extension built with nvcc, or its folder")
    parser.add_argument("--cache", type=Path, help="folder that keeps compiled kernels")
    options = parser.parse_args(arguments)
    numbers = [int(n) if n.isdigit() else 0 for n in options.arch.split(",")]
    if not set(numbers) <= set(ARCHITECTURES):
        parser.error(f"--arch is '{options.arch}', wanted some of 80,90,100")
    for name in options.op or ():
        if name not in REGISTRY or "triton" not in REGISTRY[name].launch:
            parser.error(f"--op is '{name}', which is no op with a Triton kernel")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install 'triton>=3.6')")
    if _backend.TRITON_INTERPRETS:
        parser.error("TRITON_INTERPRET=1 is set: in its interpreter Triton compiles nothing")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or folder)
        ops = [REGISTRY[name] for name in options.op or REGISTRY]
        rows, problems = examine([op for op in ops if "triton" in op.launch], numbers)
        library = None if options.op and not options.library else _library(options.library)
        if library is not None:
            for row, found in compiled_kernels(library, numbers):
                rows.append(row)
                problems += found
        elif not options.op:
            print("the extension holds no CUDA kernels: see --library", file=sys.stderr)
    _print(rows, problems)
    if options.json:
        import triton

        result = {"triton": triton.__version__, "kernels": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps({**result, "problems": problems}, indent=1) + "\n")
    return 1 if problems else 0


def _print(rows: Sequence[Row], problems: Sequence[str]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240
    console.print(table(rows))
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    console.print(f"{len(rows)} kernels, {len(problems)} problems")


if __name__ == "__main__":
    sys.exit(main())
