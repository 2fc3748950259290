"""What only a GPU can show: streams, graph capture, sizes beyond 2^31, the choice of backend.

The values of every op on the device are in tests/kernels/test_ops.py's matrix.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.numerics import assert_close, relative, to_float64
from torch import Tensor

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend, _tuned
from wavflow_kernels._registry import Op, tensors

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16)
BUSY_CYCLES = 50_000_000  # some 30 ms
KERNELS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in REGISTRY.values()
    for backend in ("cpp", "triton", "library")
    if "cuda" in op.supported.get(backend, {})
]
OPS = [pytest.param(op, id=op.name) for op in REGISTRY.values()]


def dtypes(op: Op, backend: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if dtype in op.supported[backend]["cuda"]]


def arguments(op: Op, dtype: torch.dtype, seed: int = 7) -> tuple[Any, ...]:
    """The op's first sample on the GPU."""
    return op.samples(CUDA, dtype, seed)[0].args


def each(function: Callable[[Tensor], Any], values: Any) -> Any:
    """`values` with `function` applied to the tensors in it, lists included."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, (list, tuple)):
        return type(values)(each(function, value) for value in values)
    return values


def results(op: Op, args: tuple[Any, ...], out: Any) -> list[Tensor]:
    """Copies of what a call gave, or of what it changed."""
    return [t.clone() for t in tensors(op.mutated(args) if op.mutates else [out])]


def run(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    args = each(Tensor.clone, args)
    return results(op, args, op(*args))


def check(op: Op, actual: list[Tensor], args: tuple[Any, ...], what: str) -> None:
    """Within the op's tolerance of the float64 reference."""
    exact, peer = each(Tensor.clone, to_float64(args)), each(Tensor.clone, args)
    truth = results(op, exact, op.reference(*exact))
    usual = results(op, peer, op.reference(*peer))
    assert_close(actual, truth[: len(actual)], op.tolerance, what, usual)


def test_everything_runs_here() -> None:
    assert _backend.cuda_reason() == ""
    assert _backend.triton_reason(CUDA) == ""


@pytest.mark.parametrize("op", OPS)
def test_automatic_choice(op: Op) -> None:
    """CUDA C++ where it exists, else the measured one, else Triton; never plain torch."""
    args = arguments(op, torch.bfloat16)
    first = op.first(args)
    with _tuned.keys_asked(op.name) as keys:
        chosen = _backend.choose(op, first.device, first.dtype, args)
    if "cuda" in op.supported.get("cpp", {}):
        assert chosen == "cpp"
    elif op.prefer is not None:
        row = _tuned.lookup(op.name, CUDA, min(keys)) if keys else {}
        assert chosen == row.get("backend", chosen)
        assert chosen in ("triton", "library")
    else:
        assert chosen == "triton"


@pytest.mark.parametrize("op, backend", KERNELS)
def test_a_side_stream_is_respected(op: Op, backend: str) -> None:
    """Inputs become right late on a side stream: a kernel on another stream would read zeros."""
    for dtype in dtypes(op, backend):
        args = arguments(op, dtype)
        with wk.use_backend(backend):
            wanted = run(op, args)  # compiles, so that nothing below takes long
            late = each(lambda t: torch.zeros_like(t) if t.is_floating_point() else t.clone(), args)
            stream = torch.cuda.Stream(CUDA)
            torch.cuda.synchronize(CUDA)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY_CYCLES)
                for to, source in zip(tensors(late), tensors(args), strict=True):
                    to.copy_(source)
                actual = results(op, late, op(*late))
            torch.cuda.synchronize(CUDA)
        for a, w in zip(actual, wanted, strict=True):
            assert torch.equal(a.nan_to_num(), w.nan_to_num()), dtype


@pytest.mark.parametrize("op, backend", KERNELS)
def test_a_captured_graph_replays(op: Op, backend: str) -> None:
    """One capture, replayed on the inputs it saw and on others."""
    for dtype in dtypes(op, backend):
        static = each(Tensor.clone, arguments(op, dtype))
        with wk.use_backend(backend):
            side = torch.cuda.Stream(CUDA)
            side.wait_stream(torch.cuda.current_stream(CUDA))
            with torch.cuda.stream(side):
                op(*each(Tensor.clone, static))  # compiles and sets up libraries
            torch.cuda.current_stream(CUDA).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = op(*static)
            for seed in (7, 8, 9):
                args = arguments(op, dtype, seed)
                for to, source in zip(tensors(static), tensors(args), strict=True):
                    to.copy_(source)
                graph.replay()
                torch.cuda.synchronize(CUDA)
                check(op, results(op, static, out), args, f"{dtype}, inputs {seed}")


@pytest.mark.parametrize("op, backend", KERNELS)
def test_strides_change_nothing(op: Op, backend: str) -> None:
    if op.mutates:
        pytest.skip("an in-place op wants a contiguous state")

    def strided(t: Tensor) -> Tensor:
        return t if t.dim() < 2 else t.transpose(0, -1).contiguous().transpose(0, -1)

    for dtype in dtypes(op, backend):
        args = arguments(op, dtype)
        with wk.use_backend(backend):
            check(op, run(op, args), args, f"{dtype}, contiguous")
            check(op, results(op, args, op(*each(strided, args))), args, f"{dtype}, strided")


@pytest.mark.parametrize("op, backend", KERNELS)
def test_the_same_call_gives_the_same_bits(op: Op, backend: str) -> None:
    if backend == "library":
        pytest.skip("a library promises no order of its sums")
    for dtype in dtypes(op, backend):
        args = arguments(op, dtype)
        with wk.use_backend(backend):
            first = run(op, args)
            for _ in range(3):
                for a, b in zip(run(op, args), first, strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num()), dtype


@pytest.mark.parametrize("op", [p for p in OPS if not p.values[0].internal])
def test_inference_mode_and_autocast(op: Op) -> None:
    """inference_mode changes no bit; autocast casts the arguments that the op lists."""
    args = arguments(op, torch.float32)
    wanted = run(op, args)
    with torch.inference_mode():
        actual = run(op, args)
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))
    cast = tuple(op.cast(args, torch.bfloat16))
    wanted = run(op, cast)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = run(op, args)
    assert [a.dtype for a in actual] == [w.dtype for w in wanted]
    check(op, actual, cast, "under autocast")


@pytest.mark.parametrize("op, backend", KERNELS)
def test_a_second_device(op: Op, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1)
    args = op.samples(other, torch.float32, 7)[0].args
    with torch.cuda.device(CUDA), wk.use_backend(backend):
        actual = run(op, args)
        assert torch.cuda.current_device() == CUDA.index
    assert {t.device for t in actual} == {other}
    check(op, actual, args, "on cuda:1")


def test_noise_is_the_cpus_within_four_ulp() -> None:
    seeds = torch.tensor([0, -1, 2**62 + 12345])
    on_cpu = wk.philox_normal(seeds, 111, 300)
    on_gpu = wk.philox_normal(seeds.to(CUDA), 111, 300).cpu()
    ulps = (on_cpu.view(torch.int32) - on_gpu.view(torch.int32)).abs()
    assert int(ulps.max()) <= 4


# More than 2^31 elements. The batch is a prime, so that it names the axis that is cut.
BATCH, TOKENS, WIDTH = 16_411, 147, 896


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.empty(shape, dtype=dtype, device=device).normal_()


def uniform(*shape: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.empty(shape, device=device).uniform_(0.1, 0.9)


def weight(*shape: int) -> Callable[[torch.device], Tensor]:
    scale = (shape[1] * shape[2]) ** -0.5
    return lambda device: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, scale)


BIG_TOKENS = (BATCH, TOKENS, WIDTH)
BIG_HEADS = (BATCH, WIDTH // 64, TOKENS, 64)
# name: (its tensors, how it is called with them)
BIG: dict[str, tuple[dict[str, Callable[[torch.device], Tensor]], Callable[..., Any]]] = {
    "lift_patchify": (
        {"wave": normal(BATCH, TOKENS * WIDTH, dtype=torch.float32)},
        lambda wave: wk.lift_patchify(
            wave, token_size=WIDTH, tokens=TOKENS, out_dtype=torch.bfloat16
        ),
    ),
    "unpatchify": ({"tokens": normal(*BIG_TOKENS)}, lambda tokens: wk.unpatchify(tokens)),
    "flow_mix": (
        {
            "x_1": normal(*BIG_TOKENS, dtype=torch.float32),
            "t": uniform(BATCH),
            "seeds": lambda device: torch.arange(BATCH, device=device),
        },
        lambda x_1, t, seeds: wk.flow_mix(x_1, t, seeds=seeds),
    ),
    "flow_loss": (
        {
            "pred": normal(*BIG_TOKENS),
            "x_1": normal(*BIG_TOKENS, dtype=torch.float32),
            "t": uniform(BATCH),
        },
        lambda pred, x_1, t: wk.flow_loss(pred, x_1, t),
    ),
    "ode_step": (
        {
            "state": normal(1, *BIG_TOKENS, dtype=torch.float32),
            "pred": normal(*BIG_TOKENS),
            "table": uniform(1, 4),
        },
        lambda state, pred, table: wk.ode_step(
            state, pred, table, torch.zeros(1, dtype=torch.int64, device=state.device)
        )[0],
    ),
    "adaln": (
        {
            "x": normal(*BIG_TOKENS),
            "shift": normal(BATCH, 1, WIDTH),
            "scale": normal(BATCH, 1, WIDTH),
        },
        lambda x, shift, scale: wk.adaln(x, shift, scale),
    ),
    "gated_residual_adaln": (
        {
            "x": normal(*BIG_TOKENS),
            "y": normal(*BIG_TOKENS),
            "gate": normal(BATCH, 1, WIDTH),
            "shift": normal(BATCH, 1, WIDTH),
            "scale": normal(BATCH, 1, WIDTH),
        },
        lambda x, y, gate, shift, scale: wk.gated_residual_adaln(
            x, y, gate, None, shift, scale, None
        ),
    ),
    "qkv_rope": (
        {
            "qkv": normal(BATCH, TOKENS, 3 * WIDTH),
            "norm": normal(64, dtype=torch.float32),
            "rope": normal(TOKENS, 64, dtype=torch.float32),
        },
        lambda qkv, norm, rope: wk.qkv_rope([qkv], [norm], [norm], rope, heads=WIDTH // 64),
    ),
    "rope_attention": (
        {"q": normal(*BIG_HEADS), "k": normal(*BIG_HEADS), "v": normal(*BIG_HEADS)},
        lambda q, k, v: wk.rope_attention(q, k, v),
    ),
    "conv1d": (
        {"x": normal(*BIG_TOKENS), "weight": weight(WIDTH, WIDTH, 3)},
        lambda x, weight: wk.conv1d(x, weight),
    ),
    "conv_swiglu": (
        {"x": normal(*BIG_TOKENS), "w1": weight(WIDTH, WIDTH, 3), "w3": weight(WIDTH, WIDTH, 3)},
        lambda x, w1, w3: wk.conv_swiglu(x, w1, w3),
    ),
    "swiglu": (
        {"a": normal(*BIG_TOKENS), "b": normal(*BIG_TOKENS)},
        lambda a, b: wk.swiglu(a, b),
    ),
}


def item(t: Tensor, index: int) -> Tensor:
    """One item of the batch, on whichever axis that is; tensors without a batch as they are."""
    axis = next((i for i, size in enumerate(t.shape) if size == BATCH), None)
    return t if axis is None else t.narrow(axis, index, 1)


def with_gradient(call: Callable[..., Any], args: dict[str, Tensor]) -> list[Tensor]:
    """The first output's gradient in the first tensor, against the output itself."""
    first = next(iter(args))
    leaf = args[first].detach().requires_grad_()
    out = next(tensors([call(**{**args, first: leaf})]))
    return list(torch.autograd.grad(out, leaf, out.detach()))


@pytest.mark.large
@pytest.mark.parametrize(
    "name, backend, backward",
    [
        (op.name, backend, backward)
        for op in REGISTRY.values()
        for backend in ("cpp", "triton")
        for backward in (False, True)
        if op.name in BIG and "cuda" in op.supported.get(backend, {})
        if not backward or f"{op.name}_backward" in REGISTRY
    ],
)
def test_more_elements_than_an_int32_counts(name: str, backend: str, backward: bool) -> None:
    """The first and last items of a batch of more than 2^31 elements are what they are alone."""
    makers, call = BIG[name]
    nbytes = sum(make(torch.device("meta")).nbytes for make in makers.values())
    needed = (5 if backward else 3) * nbytes
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(CUDA)[0]
    if needed > free:
        pytest.skip(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    args = {key: make(CUDA) for key, make in makers.items()}
    assert max(t.numel() for t in args.values()) > 2**31

    def results_of(given: dict[str, Tensor]) -> list[Tensor]:
        return with_gradient(call, given) if backward else list(tensors([call(**given)]))

    with wk.use_backend(backend), torch.set_grad_enabled(backward):
        whole = results_of(args)
        for index in (0, BATCH - 1):
            alone = results_of({key: item(t, index) for key, t in args.items()})
            for part, wanted in zip(whole, alone, strict=True):
                assert relative(item(part, index), wanted) <= 0.01, index


def test_training_steps_wait_for_no_device(tmp_path: Any) -> None:
    """Loader, loss, backward, clipping, optimiser and averages, between two lines of the log."""
    pytest.importorskip("omegaconf")
    pytest.importorskip("soundfile")
    from support.toy_task import SETTINGS, Fit, Points

    from wavflow.base.processes import World
    from wavflow.training.trainer import Trainer

    trainer = Trainer(
        Fit(),
        Points(),
        SETTINGS,
        tmp_path,
        config={},
        world=World(0, 1, CUDA),
        dtype=torch.bfloat16,
    )
    batches = trainer.batches()
    for _ in range(2):  # states are made and kernels loaded
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.recent.absorb()
    assert trainer.recent.means(trainer.world)["loss"] > 0
