"""How much arithmetic a computation takes, and how much of it this machine does in a second.

A step's model FLOPs utilisation is ``count_flops(step) / seconds / matmul_rate(device, dtype)``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from wavflow_kernels import cpu

# Sides of the square product: small enough for a few in a tenth of a second on two cores.
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}


# Formulas that torch's own table lacks, of ops that run on a CPU; their arguments are shapes.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    torch.ops.mkldnn._linear_pointwise: (lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]),
}


def count_flops(function: Callable[[], object]) -> int:
    """Counts the operations of the matrix products and convolutions in a call of `function`.

    A multiply-add is two; backward passes count where `function` runs them, the ops of
    wavflow_kernels by their own formulas. What torch.compile has compiled cannot be seen: count
    the same computation before it is compiled.
    """
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        function()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Operations a second that a square matrix product reaches here, by the fastest library.

    Args:
        device, dtype: where and in which dtype the product is computed; on a CPU the ops may
            compute it in another one, which is then measured.
        seconds: how long to measure, not counting the first calls; the median counts.
    """
    size = GEMM_SIZE[device.type]
    dtype = cpu.product_dtype(dtype) if device.type == "cpu" else dtype
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls = [lambda: torch.mm(a, b)]
    if device.type == "cpu" and dtype == torch.float32 and dtype in cpu.current().onednn:
        # torch.mm is MKL's in float32, which runs at half of oneDNN's speed on AMD CPUs.
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = min(_median_seconds(call, device, seconds / len(calls)) for call in calls)
    return 2 * size**3 / best


def _median_seconds(call: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, times = time.perf_counter() + seconds, [once()]
    while time.perf_counter() < end:
        times.append(once())
    return statistics.median(times)
