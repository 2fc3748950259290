"""One sampler in many threads, and its copies."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.networks import tiny_sampler

LENGTHS = (1.0, 1.5, 2.0, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_make_the_same_sounds(make, dtype) -> None:
    sampler = tiny_sampler(dtype)
    wanted = sampler("a bell", seconds=1, steps=2).audio
    copied = make(sampler)
    assert torch.equal(copied("a bell", seconds=1, steps=2).audio, wanted)
    assert copied.field is copied.engine.field is copied.maker.field
    assert copied.field is not sampler.field


def test_threads_ask_for_different_lengths_and_options() -> None:
    sampler = tiny_sampler(torch.float32)
    jobs = [(seconds, steps) for seconds in LENGTHS for steps in (1, 2)] * 2

    def job(asked: tuple[float, int]) -> torch.Tensor:
        seconds, steps = asked
        return sampler("a drum", seed=1, seconds=seconds, steps=steps, guidance=2.0 * steps).audio

    alone = [job(asked) for asked in jobs]
    with ThreadPoolExecutor(4) as pool:
        for wanted, found in zip(alone, pool.map(job, jobs), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_one_thread_at_a_time_runs_steps_that_lie_at_fixed_places() -> None:
    engine = tiny_sampler().engine
    assert engine.turn() is not engine.turn()
    engine.kind = "graph"
    assert engine.turn() is engine.turn()
