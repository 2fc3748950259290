"""Arithmetic counted and measured: what a step takes, what this machine does in a second."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from bench import peaks, plain, weights
from wavflow.base.flops import count_flops, matmul_rate
from wavflow.systems.wavflow.config import PRESETS
from wavflow.systems.wavflow.network import WavflowModel
from wavflow_kernels import REGISTRY, conv1d, prepare_conv, use_backend

CPU, BATCH = torch.device("cpu"), 2


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_torch_counts_the_matrix_ops(name: str) -> None:
    op = REGISTRY[name]
    packet = getattr(torch.ops.wavflow, name)
    assert (packet in flop_registry) == (op.tolerance == "matrix")
    if op.tolerance != "matrix":
        return
    for given in op.samples(CPU, torch.float32, 0):
        counted = count_flops(lambda args=given.args: op.torch_op(*args))
        assert counted == op.flops(*given.args), given.name


@pytest.fixture(scope="module")
def network() -> WavflowModel:
    return weights.filled("toy_8k", CPU).requires_grad_(True)


@pytest.fixture(scope="module")
def given(network: WavflowModel) -> list[Tensor]:
    return weights.inputs(network, BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_counts_as_the_plain_ones_products(
    network: WavflowModel, given: list[Tensor], dtype: torch.dtype
) -> None:
    """Forward and backward differ by what ours leaves out, and attention's second scores."""
    clip, sync, text, latent, t = given
    t = t.expand(BATCH)

    def ours() -> None:
        network(latent, clip, sync, text, t).sum().backward()

    def usual() -> None:
        conditions = network.preprocess_conditions(clip, sync, text)
        plain.predict(network, latent, t, conditions).sum().backward()

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        counted = count_flops(ours)
        with sdpa_kernel(SDPBackend.MATH):
            plain_counted = count_flops(usual)

    c = PRESETS["toy_8k"]
    n, others, width = c.latent_seq_len, c.clip_seq_len + c.text_seq_len, c.hidden_dim
    both = n + others
    full = (c.joint_depth - 1) * both**2 + c.fused_depth * n**2
    # Queries and keys, probabilities and values: two products forward, and twice as many backward,
    # where ours computes the scores again.
    attention = 7 * 2 * BATCH * width * (full + n * both)
    plain_attention = 6 * 2 * BATCH * width * (full + both**2)
    # Forward, and backward a gradient of the tokens and one of the weights.
    rows = 3 * 2 * BATCH * c.depth * (n - c.sync_seq_len) * width * 6 * width
    dead_queries = 3 * 2 * BATCH * others * width * width
    assert counted - attention == plain_counted - plain_attention - rows - dead_queries


@pytest.mark.parametrize(("winograd", "products"), [(False, 6), (True, 4)])
def test_weights_in_a_librarys_layout_count(winograd: bool, products: int) -> None:
    """A pair of tokens takes six products a weight in the direct form, four in Winograd's."""
    x, weight = torch.randn(2, 10, 32).bfloat16(), torch.randn(48, 32, 3)
    prepared = prepare_conv(weight, dtype=torch.bfloat16, winograd=winograd)
    with torch.inference_mode():
        assert count_flops(lambda: conv1d(x, prepared)) == 10 * products * 2 * 48 * 32


@pytest.mark.parametrize("backend", [None, "reference"])
def test_linears_of_every_library_count(backend: str | None) -> None:
    x, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(24, 16, requires_grad=True)

    def step() -> None:
        REGISTRY["conv1d"](x, weight[..., None], None, False, None, None, None).sum().backward()

    with use_backend(backend):
        assert count_flops(step) == 3 * 2 * 16 * 16 * 24


def test_the_rate_of_a_product_is_measured_quickly_and_once() -> None:
    start = time.perf_counter()
    rate = matmul_rate(CPU, torch.float32, 0.05)
    assert 1e8 < rate < 1e14
    assert time.perf_counter() - start < 5
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    a @ a
    assert rate > 0.1 * 2 * 1024**3 / (time.perf_counter() - start)
    assert 0.1 < peaks.measure(CPU, torch.float32, 0.02).gemm / rate < 10
