"""Where the time, the arithmetic and the memory of a generation go, stage by stage.

A generation is what :class:`wavflow.pipeline.sampler.Sampler` does with features, here without its
noise: conditions with the empty ones, weights prepared for the dtype, Euler steps, the wave.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import wavflow_kernels as wk
from wavflow.flow.solvers import solver_table
from wavflow.flow.times import time_grid
from wavflow.systems.wavflow.network import WavflowModel, get_wavflow_model

PARTS = ("audio input", "joint blocks", "fused blocks", "final layer")


class Meter:
    """Adds up what passes inside stages, round by round.

    Args:
        read: where time, or what else is measured, stands.
        passed: passed(start, end): the amount between two readings, asked for at the end.
    """

    def __init__(
        self,
        read: Callable[[], Any],
        passed: Callable[[Any, Any], float] = lambda start, end: end - start,
    ) -> None:
        self.round = 0
        self._read, self._passed = read, passed
        self._spans: list[tuple[str, int, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._read()
        yield
        self._spans.append((name, self.round, start, self._read()))

    @contextmanager
    def watching(self, network: WavflowModel) -> Iterator[None]:
        """Make stages of the network's parts, by hooks."""
        parts: tuple[Iterable[nn.Module], ...] = (
            [network.audio_input_proj],
            network.joint_blocks,
            network.fused_blocks,
            [network.final_layer],
        )
        open_stages = ExitStack()
        with ExitStack() as hooks:
            for name, modules in zip(PARTS, parts, strict=True):
                for module in modules:
                    enter = module.register_forward_pre_hook(
                        lambda *_, name=name: open_stages.enter_context(self.stage(name))
                    )
                    leave = module.register_forward_hook(lambda *_: open_stages.close())
                    hooks.callback(enter.remove)
                    hooks.callback(leave.remove)
            yield

    def medians(self) -> dict[str, float]:
        """A stage's amount in a round, by the stage's name: the median of the rounds with it.

        ``the rest`` is what a watched network does outside its parts.
        """
        sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for name, number, start, end in self._spans:
            sums[name][number] += self._passed(start, end)
        for number, whole in sums.get("network", {}).items():
            sums["the rest"][number] = whole - sum(sums[part][number] for part in PARTS)
        return {name: statistics.median(rounds.values()) for name, rounds in sums.items()}


def clock(device: torch.device) -> Meter:
    """Seconds: on CUDA between events on the stream, so that nothing waits for a stage's end."""
    if device.type != "cuda":
        return Meter(time.perf_counter)

    def read() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return Meter(read, passed)


def generate(
    model: WavflowModel,
    given: list[Tensor],
    guidance: float,
    dtype: torch.dtype,
    steps: int,
    meter: Meter,
) -> Tensor:  # (b samples)
    """Waves from [clip, sync, text features, noise]; every step is a round of the meter."""
    *features, noise = given
    kind = noise.device.type
    table = solver_table("euler", time_grid(steps), guidance=guidance).to(noise)
    state, index = noise[None].clone(), torch.zeros(1, dtype=torch.int64, device=noise.device)
    meter.round += 1
    with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        network, predict = ready(model, features, guidance, meter)
        with meter.watching(network):
            for t in table[:, 0].unbind():
                with meter.stage("network"):
                    pred, pred_uncond = predict(t, state[0])
                with meter.stage("update"):
                    wk.ode_step_(state, pred, table, index, pred_uncond=pred_uncond)
                meter.round += 1
        with meter.stage("unpatchify"):
            return wk.unpatchify(state[0])


def ready(
    model: WavflowModel, features: list[Tensor], guidance: float, meter: Meter
) -> tuple[WavflowModel, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]]:
    """The network that computes the steps, and its predictions with and without conditions."""
    with meter.stage("conditions"):
        conditions = model.preprocess_conditions(*features)
        empty = model.get_empty_conditions(len(features[0])) if guidance > 1 else None
    with meter.stage("preparation"):
        network = model._prepared(conditions)

    def predict(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if empty is None:
            return model.predict_flow(x, t.expand(len(x)), conditions), None
        return model.predict_flow_pair(x, t, conditions, empty)

    return network, predict


def seconds(
    model: WavflowModel,
    given: list[Tensor],
    guidance: float,
    dtype: torch.dtype,
    steps: int,
    generations: int = 3,
) -> dict[str, float]:
    """Median seconds of the stages: those of a step, and those that a generation has once.

    ``network`` is the whole prediction: PARTS and ``the rest``.
    """
    meter = clock(model.device)
    for _ in range(generations):
        generate(model, given, guidance, dtype, steps, meter)
    return meter.medians()


def operations(name: str, shapes: list[torch.Size], guidance: float) -> dict[str, float]:
    """Operations of the matrix products in the stages of a preset's conditions and one step.

    Counted by torch as our way calls them, on tensors without data, two for a multiply-add.
    Convolutions count in their direct form: where Winograd's runs, fewer are done.
    """
    with FakeTensorMode(), torch.inference_mode(), wk.use_backend("reference"):
        model = get_wavflow_model(name).requires_grad_(False)
        model.is_prepared = True  # its own weights are used
        *features, noise = (torch.empty(shape) for shape in shapes)
        with FlopCounterMode(display=False) as counter:
            meter = Meter(counter.get_total_flops)
            network, predict = ready(model, features, guidance, meter)
            with meter.watching(network), meter.stage("network"):
                predict(torch.empty(()), noise)
    return meter.medians()


def peak_memory(device: torch.device, call: Callable[[], object]) -> dict[str, int] | None:
    """Bytes at most held while `call` runs, `peak` in all and `above` what was held before it.

    CUDA: of tensors. CPU: of this process, best a fresh one; None where Linux's /proc is absent.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak": peak, "above": peak - before}
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes now
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    peak = _resident("VmHWM")
    return {"peak": peak, "above": peak - before}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
