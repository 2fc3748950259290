"""What test_cpu.py starts as on a lesser CPU: `cpu_job.py LEVEL`, in an environment that says so.

Runs everything that chooses by processor and compares it with float64.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wavflow_kernels as wk
from support.networks import CPU, field_of, golden_model, inputs, mixed, tiny_sampler
from support.numerics import assert_close, filters, normal, relative
from support.op_checks import check_forward, check_gradient
from wavflow.base import precision
from wavflow.config.schema import TrainingConfig
from wavflow.flow.solvers import solver_table
from wavflow.layers.prepare import prepare_inference
from wavflow.sampling.engine import Engine
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.training.optimizer import make_optimizer
from wavflow_kernels import REGISTRY, cpu
from wavflow_kernels._registry import tensors
from wavflow_kernels.ops import conv1d, conv_swiglu

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "attention")


class NoHalfProducts(TorchDispatchMode):
    """Fails where torch is given a product in a dtype that oneDNN has none of.

    torch's own kernels are many times slower; and where oneDNN was told to keep to the
    instructions of a lesser CPU, torch asks it all the same, and raises.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not name.startswith("wavflow") and any(word in name for word in PRODUCTS):
            for t in tensors(list(args)):
                assert cpu.product_dtype(t.dtype) == t.dtype, f"{name} in {t.dtype}"
        return func(*args, **(kwargs or {}))


def ops_are_within_their_tolerances() -> None:
    """By the backends that are chosen here."""
    for name in ("conv1d", "conv_swiglu", "rope_attention"):
        for dtype in DTYPES:
            check_forward(REGISTRY[name], None, dtype, "cpu", "eager")
            check_gradient(REGISTRY[name], None, dtype, "cpu", "eager")
    for dtype in (torch.float32, torch.bfloat16):
        check_forward(REGISTRY["prepared_conv"], None, dtype, "cpu", "eager")


def prepared_weights_give_the_same() -> None:
    """Every width and form, single and gated, in every dtype: rounded weights, rounded results."""
    for dtype in DTYPES:
        for k, winograd in ((1, None), (3, None), (3, False), (3, True), (7, None)):
            x, bias = normal(2, 19, 24, dtype=dtype), normal(40, seed=3, dtype=dtype)
            weights = [filters(40, 24, k, seed) for seed in (1, 2)]
            cast = [w.to(dtype) for w in weights]
            a, b = (conv1d.plain(x.double(), w.double()) for w in cast)
            with NoHalfProducts():
                single = wk.prepare_conv(weights[0], dtype=dtype, winograd=winograd)
                pair = wk.prepare_conv(weights, dtype=dtype, winograd=winograd)
                found = [wk.conv1d(x, single, bias), wk.conv_swiglu(x, pair)]
            peer = [
                conv1d.OP.reference(x, cast[0], bias, False, None, None, None),
                conv_swiglu.OP.reference(x, *cast, False)[0],
            ]
            truth = [a + bias.double(), F.silu(a) * b]
            if len(pair.weights) == 1:
                assert_close(found, truth, "matrix", f"{dtype}, width {k}", peer)
            for out, exact, direct in zip(found, truth, peer, strict=True):
                assert out.dtype == dtype
                # Winograd's error is 2.7 times the direct form's.
                assert relative(out, exact) < 4 * relative(direct, exact) + 1e-7


def a_guided_step_is_right() -> None:
    model, _ = golden_model("model_tiny")
    latent, *features, _ = inputs(model, 2)
    table = solver_table("euler", torch.tensor([0.4, 0.5], dtype=torch.float64), guidance=4.5)

    def step(network: WavflowModel, dtype: torch.dtype) -> Tensor:
        engine, wide = Engine(field_of(network), "eager", dtype), dtype == torch.float64
        given = [x.double() if wide else x for x in (latent, *features)]
        with torch.inference_mode(), engine.cast():
            conditions = network.preprocess_conditions(*given[1:])
            empty = network.get_empty_conditions(2)
            return engine.solve(given[0], table, conditions, empty)

    truth = step(copy.deepcopy(model).double(), torch.float64)
    for dtype in DTYPES:
        with wk.use_backend("reference"):
            plain = step(copy.deepcopy(model), dtype)
        with NoHalfProducts():
            made = step(prepare_inference(model, dtype), dtype)
            dropped_in = step(model, dtype)
        for out in (made, dropped_in):
            assert relative(out, truth) < 1.5 * relative(plain, truth), dtype


def a_training_step_is_right() -> None:
    model, _ = golden_model("model_tiny")
    latent, *features, t = inputs(model, 2)

    def gradient(network: WavflowModel, dtype: torch.dtype) -> Tensor:
        at, *given = (x.double() if dtype == torch.float64 else x for x in (latent, *features, t))
        with torch.autocast("cpu", dtype, enabled=dtype in HALVES):
            pred = network(at, *given)
        loss = wk.flow_loss(pred, at, given[-1], x_t=at, x_0=at, prediction="x", loss="x")
        loss.sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    truth = gradient(copy.deepcopy(model).double(), torch.float64)
    for dtype in DTYPES:
        with wk.use_backend("reference"):
            plain = gradient(copy.deepcopy(model), dtype)
        network = copy.deepcopy(model)
        with NoHalfProducts():
            made = gradient(network, dtype)
        assert relative(made, truth) < 1.5 * relative(plain, truth), dtype
        before = [p.detach().clone() for p in network.parameters()]
        make_optimizer(network, TrainingConfig()).step()
        moved = [(p - b).norm() for p, b in zip(network.parameters(), before, strict=True)]
        assert all(m.isfinite() for m in moved) and sum(moved) > 0


def a_sampler_generates() -> None:
    truth = tiny_sampler().generate_features(mixed(), range(5), guidance=2.0)
    for dtype in HALVES:
        with NoHalfProducts():
            made = tiny_sampler(dtype).generate_features(mixed(), range(5), guidance=2.0)
        for sound, exact in zip(made, truth, strict=True):
            assert relative(sound.audio, exact.audio) < 0.1


def main(level: str) -> None:
    found = cpu.current()
    assert (found.level, found.onednn_level) == (level, level), found
    assert (torch.bfloat16 in found.onednn) == level.startswith("avx512"), found
    assert found.bf16 == precision.has_fast_bf16(CPU) == (level == "avx512_bf16")
    wanted = torch.bfloat16 if found.bf16 else torch.float32
    assert precision.resolve_dtype("auto", CPU) == wanted
    for check in (
        ops_are_within_their_tolerances,
        prepared_weights_give_the_same,
        a_guided_step_is_right,
        a_training_step_is_right,
        a_sampler_generates,
    ):
        torch.manual_seed(0)
        check()
        print(check.__name__, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
