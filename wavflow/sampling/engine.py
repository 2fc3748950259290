"""How the steps of a solver run on a field: one by one, as CUDA graphs, or compiled."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wavflow.flow.guidance import Output, rescale_guidance
from wavflow.flow.solvers import advance, is_unguided, table_slots
from wavflow.sampling.field import Conditions, Field
from wavflow.sampling.graphs import capture, clone, copy_into

log = logging.getLogger("wavflow")

ENGINES = ("auto", "eager", "graph", "compile")
#: Rows of the table that a captured graph has room for; longer tables get graphs of their own.
TABLE_ROWS = 64

# Called after a step: with its row, its point of evaluation (b n d) and what the network said.
After = Callable[[int, Tensor, Output], None]


class Engine:
    """Runs a field through a solver's table.

    - ``eager``: the network's operations one by one.
    - ``graph``: a step is captured once as a CUDA graph and replayed: the table, the row's number,
      the state and the conditions lie on the device at fixed places, so that one graph serves
      every step, solver and clip of one batch size and of conditions of one key; a step without
      guidance has one of its own. The last `limit` of them are kept.
    - ``compile``: the step by ``torch.compile``, for the kinds of GPU code that cannot be captured.
    - ``auto``: ``graph`` on a GPU, else ``eager``. If a capture fails, the reason is logged and
      ``compile`` takes over for good.

    ``kind`` says which of them runs. Results agree within the tolerances of the ops.

    Args:
        field: gives the prediction at every step.
        kind: one of ENGINES.
        dtype: what autocast casts to, float32 or float64 for no autocast.
        limit: how many captured steps are kept: one for each batch size, length and kind of
            conditions.

    Raises:
        ValueError: an unknown kind, or ``graph`` for a field that is not on a GPU.
    """

    def __init__(
        self,
        field: Field,
        kind: str = "auto",
        dtype: torch.dtype = torch.float32,
        limit: int = 4,
    ) -> None:
        if kind not in ENGINES:
            raise ValueError(f"engine is {kind!r}, wanted one of {', '.join(ENGINES)}")
        gpu = field.device.type == "cuda"
        if kind == "graph" and not gpu:
            raise ValueError(f"engine 'graph' needs a model on a GPU, it is on {field.device}")
        self.may_fall_back = kind == "auto"
        self.kind = ("graph" if gpu else "eager") if kind == "auto" else kind
        self.field, self.dtype, self.limit = field, dtype, limit
        self._begin()

    def _begin(self) -> None:
        self.graphs: OrderedDict[tuple[Any, ...], _Steps] = OrderedDict()
        self._compiled: Callable[..., Output] | None = None
        # Captured steps lie at fixed places: while one sound uses them, no other may.
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        made_here = ("graphs", "_compiled", "_turn")
        return {name: value for name, value in self.__dict__.items() if name not in made_here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def turn(self) -> AbstractContextManager[Any]:
        """Where steps are captured one thread runs them at a time, else as many as come."""
        return nullcontext() if self.kind == "eager" else self._turn

    def cast(self) -> AbstractContextManager[Any]:
        """The autocast that the field runs under."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            self.field.device.type,
            self.dtype if half else None,
            enabled=half,
            cache_enabled=self.kind != "graph",  # a graph cannot hold what was cast outside of it
        )

    @torch.inference_mode()
    def solve(
        self,
        noise: Tensor,  # b n d
        table: Tensor,  # evaluations 2+k(k+1)
        conditions: Conditions,
        empty: Conditions | None = None,
        *,
        rescale: float = 0.0,
        after: After | None = None,
    ) -> Tensor:  # b n d
        """Carries `noise` through the rows of `table`, as ``solvers.solve`` does.

        Args:
            noise: float32 or float64.
            table: made by ``solver_table``.
            conditions: those of the sounds.
            empty: what guidance leads away from; without it all rows run unguided.
            rescale: the ``share`` of ``rescale_guidance``; 0 for none.
            after: ``after(row, x, prediction)`` is called once a row is done, with its number, its
                point of evaluation and what the network returned there; the next step overwrites
                both.
        """
        alone = [plain or empty is None for plain in is_unguided(table)]
        with self.turn():
            steps = self._steps(noise, table, conditions, empty, rescale, set(alone))
            with self.cast():
                return steps.run(alone, after)

    @torch.inference_mode()
    def predict(
        self,
        t: float,
        x: Tensor,  # b n d
        conditions: Conditions,
        empty: Conditions | None,
        weight: float,
        rescale: float = 0.0,
    ) -> Output:
        """What the field says of x at t.

        A pair (with, without conditions), unless `empty` is None, `weight` 1 or they are rescaled.
        """
        alone = weight == 1 or empty is None
        table = torch.tensor([[t, weight, 0.0, 1.0]], dtype=torch.float64)  # leaves x as it is
        with self.turn():
            steps = self._steps(x, table, conditions, empty, rescale, {alone})
            with self.cast():
                predicted = steps.predicted(alone)
            if steps.graphs:  # the next call, maybe another thread's, overwrites it
                return _copied(predicted)
            return predicted

    def _steps(
        self,
        noise: Tensor,
        table: Tensor,
        conditions: Conditions,
        empty: Conditions | None,
        rescale: float,
        kinds: set[bool],
    ) -> _Steps:
        """Steps that begin with these values, ready to run."""
        given = (noise, table, conditions, empty, rescale)
        if self.kind == "graph":
            try:
                return self._captured(*given, kinds)
            except RuntimeError as error:
                if not self.may_fall_back:
                    raise
                log.warning("no CUDA graph of the step (%s): it is compiled instead", error)
                self.kind = "compile"
                self.graphs.clear()
        if self.kind == "compile" and self._compiled is None:
            self._compiled = torch.compile(_predict, dynamic=False)
        return _Steps(self.field, self._compiled or _predict, *given)

    def _captured(
        self,
        noise: Tensor,
        table: Tensor,
        conditions: Conditions,
        empty: Conditions | None,
        rescale: float,
        kinds: set[bool],
    ) -> _Steps:
        """Captured steps of these shapes, which hold the given values."""
        rows = -(-len(table) // TABLE_ROWS) * TABLE_ROWS
        room = F.pad(table, (0, 0, 0, rows - len(table)))
        kind = self.field.key(conditions)
        key = (noise.shape, noise.dtype, kind, room.shape, empty is None, rescale)
        steps = self.graphs.pop(key, None)
        if steps is None:
            while len(self.graphs) >= self.limit:
                self.graphs.popitem(last=False)
            own = clone(conditions), None if empty is None else clone(empty)
            steps = _Steps(self.field, _predict, noise, room, *own, rescale)
        self.graphs[key] = steps
        with self.cast():
            steps.capture(kinds)
        steps.load(noise, room, conditions, empty)
        return steps


def _copied(output: Output) -> Output:
    if isinstance(output, Tensor):
        return output.clone()
    with_conditions, without = output
    return with_conditions.clone(), without.clone()


def _predict(
    field: Field,
    t: Tensor,
    x: Tensor,
    conditions: Conditions,
    empty: Conditions | None,
    weight: Tensor,
    rescale: float,
) -> Output:
    """What the field says of x (b n d) at a 0-d t."""
    if empty is None:
        return field.predict(t, x, conditions)
    pair = field.predict_pair(t, x, conditions, empty)
    return rescale_guidance(*pair, weight, rescale) if rescale else pair


class _Steps:
    """Everything that a step reads and writes, at places that stay, and its graphs."""

    def __init__(
        self,
        field: Field,
        predict: Callable[..., Output],
        noise: Tensor,
        table: Tensor,
        conditions: Conditions,
        empty: Conditions | None,
        rescale: float,
    ) -> None:
        self.field, self.predict, self.rescale = field, predict, rescale
        self.conditions, self.empty = conditions, empty
        self.state = noise.new_zeros(table_slots(table), *noise.shape)
        self.state[0] = noise
        self.point = torch.empty_like(noise)
        self.table = table.to(noise)
        self.index = torch.zeros(1, dtype=torch.int64, device=noise.device)
        # By whether a step is unguided: what replays it, and what it writes its prediction to.
        self.graphs: dict[bool, tuple[Callable[[], None], Output]] = {}

    def load(
        self, noise: Tensor, table: Tensor, conditions: Conditions, empty: Conditions | None
    ) -> None:
        """Starts anew from these values, of the same shapes."""
        self.state.zero_()
        self.state[0] = noise
        self.table.copy_(table)
        self.index.zero_()
        copy_into(self.conditions, conditions)
        if empty is not None and self.empty is not None:
            copy_into(self.empty, empty)

    def step(self, alone: bool) -> Output:
        """Evaluates the field for row `index` and takes the state on; returns the prediction."""
        row = self.table.index_select(0, self.index)[0]
        self.point.copy_(self.state[0])
        predicted = self.predict(
            self.field,
            row[0],
            self.point,
            self.conditions,
            None if alone else self.empty,
            row[1],
            self.rescale,
        )
        advance(self.state, self.table, self.index, predicted)
        return predicted

    def capture(self, kinds: set[bool]) -> None:
        """Captures those kinds of steps that are not captured yet."""
        for alone in kinds - self.graphs.keys():
            self.graphs[alone] = capture(
                partial(self.step, alone), self.index.zero_, self.state.device
            )

    def run(self, alone: list[bool], after: After | None) -> Tensor:  # b n d
        for row, kind in enumerate(alone):
            predicted = self.predicted(kind)
            if after is not None:
                after(row, self.point, predicted)
        return self.state[0].clone()

    def predicted(self, alone: bool) -> Output:
        """Takes the next step; returns its prediction, which the step after it overwrites."""
        if alone not in self.graphs:
            return self.step(alone)
        replay, predicted = self.graphs[alone]
        replay()
        return predicted
