"""Toy ops with one fault each, for test_aot.py: ``python aot_toys.py FILE ...`` is `aot` of them.

The report of every toy for sm_90 goes to the first file; that of the toys whose fault, or whose
soundness, depends on the architecture goes for the others to the second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavflow_kernels import REGISTRY
from wavflow_kernels._check import check
from wavflow_kernels._registry import Op
from wavflow_kernels._triton.launch import launch
from wavflow_kernels.tools import aot

SIZE = 128


@triton.jit
def product(x, w, out, N: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """out = x w, (n, N) each; ROWS of them in a block."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, N)
    total = tl.zeros((ROWS, N), tl.float32)
    for k in range(0, N, STEP):
        inner = k + tl.arange(0, STEP)
        a = tl.load(x + rows[:, None] * N + inner[None, :])
        b = tl.load(w + inner[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * N + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit
def product_by_sums(x, w, out, N: tl.constexpr):
    columns = tl.arange(0, N)
    a = tl.load(x + tl.program_id(0) * N + columns)
    b = tl.load(w + columns[:, None] * N + columns[None, :])
    total = tl.sum(a[:, None].to(tl.float32) * b, 0)
    tl.store(out + tl.program_id(0) * N + columns, total.to(out.dtype.element_ty))


@triton.jit
def centre(x, out, BLOCK: tl.constexpr):
    """Subtract the maximum: a block must be kept in registers between load and store."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.float32)
    tl.store(out + at, (value - tl.max(value, 0)).to(out.dtype.element_ty))


@triton.jit
def in_float64(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.float64)
    tl.store(out + at, (value * 1.1).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["shift"])
def shifted(x, out, shift, BLOCK: tl.constexpr):
    """The compiler knows nothing of the shift, so loads are of one element."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + shift + at))


@triton.jit
def gathered(x, index, out, BLOCK: tl.constexpr, ROW: tl.constexpr):
    """Rows of x by an index: narrow loads of the index are none of x."""
    row = tl.load(index + tl.program_id(0)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * ROW + at, tl.load(x + row * ROW + at))


@triton.jit
def broken(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x) + tl.arange(0, BLOCK))


def toy(
    name: str,
    run: Callable[[Tensor, Tensor, Tensor], None],
    dtype: torch.dtype = torch.bfloat16,
    tolerance: str = "single_pass",
    bulk: tuple[str, ...] = ("x",),
    width: int = SIZE,
) -> None:
    """Register an op (x, w) -> out that `run(out, x, w)` launches; x and out are SIZE^2 x width."""

    def workload(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.empty(SIZE * SIZE, width, device=device, dtype=dtype)
        return x, torch.empty(SIZE, SIZE, device=device, dtype=dtype)

    Op(
        name=f"toy_{name}",
        schema="(Tensor x, Tensor w) -> Tensor",
        reference=lambda x, w: x,
        check=lambda x, w: check(name, x=(x, "n c"), w=(w, "d d")),
        outputs=lambda x, w: torch.empty_like(x),
        launch={"triton": run},
        supported={"triton": {"cuda": frozenset({dtype})}},
        samples=lambda device, dtype, seed: [],
        workloads={"large": workload},
        bytes=lambda x, w: 2 * x.nbytes,
        flops=lambda x, w: 0,
        tolerance=tolerance,
        bulk=bulk,
    )


def multiply(rows: int, step: int = 32, **options: int) -> Callable[..., None]:
    def run(out: Tensor, x: Tensor, w: Tensor) -> None:
        grid = (x.shape[0] // rows,)
        launch(product, grid, x, w, out, N=SIZE, ROWS=rows, STEP=step, **options)

    return run


def per_block(kernel: Any, block: int = 1024, *, before: Any = None, **options: int) -> Any:
    def run(out: Tensor, x: Tensor, w: Tensor) -> None:
        x = before(x) if before else x
        grid = (x.numel() // block,)
        launch(kernel, grid, x, out, BLOCK=block, **options)

    return run


def by_sums(out: Tensor, x: Tensor, w: Tensor) -> None:
    launch(product_by_sums, (x.shape[0],), x, w, out, N=SIZE, num_warps=8)


def rows(out: Tensor, x: Tensor, w: Tensor) -> None:
    index = x.new_empty(x.shape[0] // 8, dtype=torch.int32)
    launch(gathered, (len(index),), x, index, out, BLOCK=1024, ROW=1024)


def shift(out: Tensor, x: Tensor, w: Tensor) -> None:
    launch(shifted, (x.numel() // 1024,), x, out, 16, BLOCK=1024)


def tall_grid(out: Tensor, x: Tensor, w: Tensor) -> None:
    launch(centre, lambda given: (1, x.numel() // given["BLOCK"] * 64), x, out, BLOCK=1024)


def narrow_copy(out: Tensor, x: Tensor, w: Tensor) -> None:
    copy = x[:, 1:].contiguous().view(-1)[: x.numel() // 2].view(-1, SIZE)
    launch(shifted, (copy.numel() // 1024,), copy, out, 16, BLOCK=1024)


def raises(out: Tensor, x: Tensor, w: Tensor) -> None:
    raise ValueError("no configuration")


BY_ARCHITECTURE = ("good_bfloat16", "good_single_pass", "spill", "small_tile", "shared_memory")

both = {"tolerance": "matrix", "bulk": ("x", "w")}
toy("good_half", multiply(128), torch.float16, **both)
toy("good_bfloat16", multiply(128), **both)
toy("good_single_pass", per_block(centre))
toy("good_gather", rows)
toy("spill", multiply(128, num_warps=1))
toy("float64", per_block(in_float64))
toy("small_tile", multiply(16), **both)
toy("by_sums", by_sums, tolerance="matrix", bulk=())
toy("narrow", shift)
toy("copied", per_block(centre, before=Tensor.clone))
toy("narrow_copy", narrow_copy, width=SIZE + 1)
toy("shared_memory", multiply(128, 64, num_stages=9), **both)
toy("grid", tall_grid)
toy("broken", per_block(broken))
toy("raises", raises)

if __name__ == "__main__":
    for name in [name for name in REGISTRY if not name.startswith("toy_")]:
        del REGISTRY[name]
    everything, by_architecture = sys.argv[1:]
    status = aot.main(["--arch", "90", "--json", everything])
    chosen = [f"--op=toy_{name}" for name in BY_ARCHITECTURE]
    sys.exit(aot.main(["--arch", "80,100", "--json", by_architecture, *chosen]) or status)
