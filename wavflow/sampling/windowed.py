r"""Sounds longer than the network's clips: windows that are denoised together.

All windows lie on one field of noise and share one state. At every evaluation the network predicts
each window on its own, the predictions are blended where windows overlap, and one step of the
solver takes the whole sound on: an ordinary differential equation like that of a clip, whose right
side sees a long sound through windows (as MultiDiffusion does for pictures, Bar-Tal et al., arXiv
2302.08113). What is known of the sound predicts itself, which keeps it on the straight path from
its noise to its truth: so a recording is continued, and a gap in it filled.

A window's evaluation s wants its neighbours' s - 1 and nothing of later windows' s. So groups of
windows go through all evaluations one after the other, each evaluation one window to the left of
the last: the sound is done from its beginning on, it is the same as if all windows went together,
and only the windows of a group and those that wait for the next are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import wavflow_kernels as kernels
from wavflow.base.processes import World
from wavflow.flow.guidance import mix_guidance
from wavflow.flow.solvers import MIN_REMAINDER, table_slots
from wavflow.sampling.engine import Engine
from wavflow.sampling.field import Conditions, Known, Size
from wavflow.sampling.scene import Scene
from wavflow.sampling.windows import Windows


class Evaluation(NamedTuple):
    """One evaluation of some windows.

    Attributes:
        windows: how many windows were evaluated.
        t: the time of the flow, 0 noise, 1 data.
        clean: (n d), what the sound is expected to be where the evaluation is complete.
    """

    windows: int
    t: float
    clean: Tensor


@dataclass(frozen=True)
class LongSound:
    """How one long sound is made.

    Attributes:
        engine: evaluates the field.
        windows: where the windows lie.
        size: how long a window is.
        samples: how many samples the sound has.
        seed: what its noise depends on.
        table: the solver's table, (evaluations, 2 + k (k + 1)).
        rescale: the `share` of `wavflow.flow.guidance.rescale_guidance`.
        guided: whether any evaluation needs the empty conditions.
        scene: the features of the windows.
        batch: windows that are evaluated at a time.
        world: processes among which the windows are shared; all get the whole sound.
        known: what is known of the sound, over all its tokens; None where nothing is.
    """

    engine: Engine
    windows: Windows
    size: Size
    samples: int
    seed: int
    table: Tensor
    rescale: float
    guided: bool
    scene: Scene
    batch: int
    world: World
    known: Known | None = None

    @property
    def evaluations(self) -> int:
        """How many window evaluations the whole sound takes."""
        return len(self.windows) * len(self.table)

    def noise(self, first: int, count: int) -> Tensor:  # (count d) float32
        """The state of tokens [first, first + count) at t = 0."""
        field = self.engine.field
        seeds = torch.tensor([self.seed], dtype=torch.int64, device=field.device)
        return field.start(seeds, first, count)[0]

    def parts(
        self, group: int | None = None, after: Callable[[Evaluation], None] | None = None
    ) -> Iterator[Tensor]:  # (n d) float32 each
        """The sound's tokens from its beginning on, part by part.

        Args:
            group: windows that go through the evaluations together; None for all.
            after: called after every evaluation.
        """
        ahead = ThreadPoolExecutor(1)
        try:
            # Whoever iterates is not in inference mode, nor put into it.
            run = Denoising(self, ahead, after).parts(group)
            while True:
                with torch.inference_mode():
                    part = next(run, None)
                if part is None:
                    return
                yield part
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)


class Denoising:
    """A long sound in the making: its state, and what windows to come still need of it.

    Args:
        sound: how it is made.
        ahead: encodes the features of windows to come.
        after: called after every evaluation.
    """

    def __init__(
        self,
        sound: LongSound,
        ahead: ThreadPoolExecutor,
        after: Callable[[Evaluation], None] | None,
    ) -> None:
        self.sound, self.windows, self.after = sound, sound.windows, after
        self.field = sound.engine.field
        self.weights = [(t, w) for t, w, *_ in sound.table.tolist()]
        # The state of tokens [begin, end) that are begun and not done, and each evaluation's
        # weighted sum of predictions, with the weights in the last column, of tokens that windows
        # to come share.
        self.begin = self.end = 0
        self._state: Tensor | None = None  # k n d
        self.shared: list[Tensor | None] = [None] * len(sound.table)  # n d+1
        self.features: dict[int, Future[Mapping[str, Tensor]]] = {}
        self.conditions: dict[int, Conditions] = {}
        self.empty: Conditions | None = None
        self._ahead = ahead
        self._last: tuple[Mapping[str, Tensor], Conditions] | None = None

    @property
    def state(self) -> Tensor:
        assert self._state is not None, "no window has entered"
        return self._state

    def parts(self, group: int | None) -> Iterator[Tensor]:
        windows, rows = self.windows, len(self.weights)
        lags = [row * windows.reach for row in range(rows)]
        group = len(windows) + lags[-1] if group is None else group
        edge = 0
        while edge - lags[-1] < len(windows):
            self._enter(min(edge, len(windows)), min(edge + group, len(windows)), group)
            for row, lag in enumerate(lags):
                first = max(0, edge - lag)
                last = min(len(windows), edge + group - lag)
                if first < last:
                    self._evaluate(row, first, last)
            edge += group
            if edge > lags[-1]:
                yield self._leave(min(len(windows), edge - lags[-1]))

    def _mine(self, window: int) -> bool:
        return window % self.sound.world.size == self.sound.world.rank

    def _enter(self, first: int, last: int, group: int) -> None:
        """Lets windows [first, last) in, and has the features of the next encoded meanwhile."""
        windows, sound = self.windows, self.sound
        # Whoever waits for parts may use the network meanwhile.
        self.field.among(0, 1)
        if first == last:
            return
        if sound.guided and self.empty is None:
            with sound.engine.cast():
                self.empty = self.field.empty([sound.scene.text], sound.size)
        end = windows.tokens if windows.loop else windows.starts[last - 1] + windows.size
        noise = sound.noise(self.end, end - self.end)
        fresh = noise.new_zeros(table_slots(sound.table), *noise.shape)
        fresh[0] = noise
        self._state = fresh if self._state is None else torch.cat((self._state, fresh), dim=1)
        self.end = end
        for window in range(first, min(last + group, len(windows))):
            if self._mine(window) and window not in self.features:
                time = windows.times[window]
                self.features[window] = self._ahead.submit(sound.scene.window, time)
        for window in range(first, last):
            if self._mine(window):
                features = self.features.pop(window).result()
                if self._last is None or self._last[0] is not features:
                    with sound.engine.cast():
                        self._last = features, self.field.conditions([features], sound.size)
                self.conditions[window] = self._last[1]

    def _evaluate(self, row: int, first: int, last: int) -> None:
        """Takes what windows [first, last) complete through a row of the table."""
        windows = self.windows
        t, weight = self.weights[row]
        begin = 0 if windows.loop else windows.starts[first]
        end = windows.tokens if windows.loop else windows.starts[last - 1] + windows.size
        done = end if last == len(windows) else windows.starts[last]
        predicted = self._predict(t, weight, range(first, last))
        sums = predicted.new_zeros(end - begin, predicted.shape[2] + 1)
        shared = self.shared[row]
        if shared is not None:
            sums[: len(shared)] = shared
        for window, each in zip(range(first, last), predicted, strict=True):
            share = windows.weight(window).to(each)[:, None]
            weighted = torch.cat((share * each, share), dim=1)
            for mine, its in windows.places(window):
                sums[its.start - begin : its.stop - begin] += weighted[mine]
        self.shared[row] = sums[done - begin :].clone() if done < end else None
        blended = sums[: done - begin, :-1] / sums[: done - begin, -1:]
        clean = self._advance(row, slice(begin, done), blended)
        if self.after is not None:
            self.after(Evaluation(last - first, t, clean))

    def _predict(self, t: float, weight: float, windows: range) -> Tensor:  # (w n d) float32
        sound = self.sound
        mine = [window for window in windows if self._mine(window)]
        state = self.state[0]
        predicted = state.new_zeros(len(windows), self.windows.size, state.shape[1])
        for at in range(0, len(mine), sound.batch):
            some = mine[at : at + sound.batch]
            count = len(some)
            if sound.engine.kind == "graph":  # one captured batch size serves all
                some = some + some[:1] * (sound.batch - count)
            x = torch.stack([self._window(window) for window in some])
            conditions = [self.conditions[window] for window in some]
            output = sound.engine.predict(
                t,
                x,
                conditions[0].cat(*conditions[1:]),
                None if self.empty is None else self.empty.expand(len(some)),
                weight,
                sound.rescale,
            )
            places = [window - windows.start for window in some[:count]]
            mixed = mix_guidance(output, weight)[:count].to(predicted)
            predicted[torch.tensor(places, device=state.device)] = mixed
        if sound.world.size > 1:  # each is one process's and zero of the others
            dist.all_reduce(predicted)
        return predicted

    def _window(self, window: int) -> Tensor:  # (n d)
        places = (its for _, its in self.windows.places(window))
        return torch.cat(
            [self.state[0, its.start - self.begin : its.stop - self.begin] for its in places]
        )

    def _advance(self, row: int, tokens: slice, predicted: Tensor) -> Tensor:  # (n d)
        """Steps on with what was predicted of `tokens`; returns what they are expected to be."""
        sound = self.sound
        t, _ = self.weights[row]
        state = self.state[:, tokens.start - self.begin : tokens.stop - self.begin]
        x = state[0]
        rest = max(1 - t, MIN_REMAINDER)
        if sound.known is not None:
            mask = sound.known.mask[tokens, None]
            truth = sound.known.tokens[tokens]
            if self.field.prediction == "v":
                truth = truth - sound.noise(tokens.start, len(truth))
            predicted = torch.where(mask, truth, predicted)
        clean = predicted if self.field.prediction == "x" else x + rest * predicted
        index = torch.tensor([row], device=state.device)
        state.copy_(
            kernels.ode_step(
                state[:, None].contiguous(), predicted[None], sound.table.to(state), index
            )[:, 0]
        )
        return clean

    def _leave(self, window: int) -> Tensor:  # (n d)
        """The tokens that are done once all windows before `window` are."""
        last = window == len(self.windows)
        done = self.windows.tokens if last else self.windows.starts[window]
        part = self.state[0, : done - self.begin].clone()
        self._state = self.state[:, done - self.begin :].clone()
        self.begin = done
        for gone in [each for each in self.conditions if each < window]:
            del self.conditions[gone]
        return part
