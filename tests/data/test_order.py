from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavflow.base.errors import InputError
from wavflow.data.order import Order, plan
from wavflow.data.prefetch import prefetch

SEEDS = st.integers(0, 2**31)


@st.composite
def sources(draw):
    """Clips 0.. in up to four sources, and a share for each, one above 0."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    clips = iter(draw(st.permutations(range(sum(sizes)))))
    named = {name: list(itertools.islice(clips, n)) for name, n in zip("abcd", sizes, strict=False)}
    weights = draw(
        st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)).filter(any)
    )
    return named, dict(zip(named, map(float, weights), strict=True))


def epoch(order, number):
    return [order[p] for p in range(number * len(order), (number + 1) * len(order))]


@given(clips=st.integers(1, 40), seed=SEEDS, number=st.integers(0, 1000))
def test_every_clip_comes_once_an_epoch(clips, seed, number):
    assert sorted(epoch(Order.of(clips, seed), number)) == list(range(clips))


def test_epochs_and_seeds_differ():
    first = epoch(Order.of(50, 1), 0)
    assert first != epoch(Order.of(50, 1), 1) and first != epoch(Order.of(50, 2), 0)


@given(named=sources(), seed=SEEDS, position=st.integers(0, 500))
def test_an_order_is_a_function_of_seed_and_position(named, seed, position):
    walked = Order(seed, *named)
    for p in range(position):
        walked[p]
    assert walked[position] == Order(seed, *named)[position]


@given(named=sources(), seed=SEEDS, number=st.integers(0, 20))
def test_sources_get_their_shares_by_largest_remainders(named, seed, number):
    clips, weights = named
    source = {clip: name for name, held in clips.items() for clip in held}
    taken = Counter(source[clip] for clip in epoch(Order(seed, clips, weights), number))
    total, whole = len(source), int(sum(weights.values()))
    shares = {name: divmod(total * int(weight), whole) for name, weight in weights.items()}
    assert sum(taken.values()) == total
    for name, (floor, _) in shares.items():
        assert taken[name] - floor in (0, 1)
    rest = {name: part for name, (_, part) in shares.items()}
    more = [rest[name] for name, (floor, _) in shares.items() if taken[name] > floor]
    less = [rest[name] for name, (floor, _) in shares.items() if taken[name] == floor]
    assert min(more, default=whole) >= max(less, default=0)


@given(named=sources(), seed=SEEDS, epochs=st.integers(1, 12))
def test_clips_of_a_source_take_turns(named, seed, epochs):
    clips, weights = named
    order = Order(seed, clips, weights)
    taken = Counter(order[p] for p in range(epochs * len(order)))
    for held in clips.values():
        counts = [taken[clip] for clip in held]
        assert max(counts) - min(counts) <= 1


@given(
    shards=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    group=st.integers(1, 8),
    seed=SEEDS,
    number=st.integers(0, 50),
)
def test_shards_are_visited_a_group_at_a_time(shards, group, seed, number):
    order = Order(seed, {"": range(len(shards))}, shards=shards, group=group)
    chosen = epoch(order, number)
    assert sorted(chosen) == list(range(len(shards)))
    # The shards that are open between a shard's first and last clip are never more than a group.
    visited = [shards[clip] for clip in chosen]
    last = {shard: place for place, shard in enumerate(visited)}
    first = {shard: len(visited) - 1 - p for p, shard in enumerate(reversed(visited))}
    for place in range(len(visited)):
        assert sum(first[s] <= place <= last[s] for s in last) <= group


def test_shards_are_shuffled_among_and_inside():
    shards = [clip // 10 for clip in range(200)]
    order = Order(3, {"": range(200)}, shards=shards, group=4)
    first, second = epoch(order, 0), epoch(order, 1)
    assert first != second
    groups = [{shards[clip] for clip in first[at : at + 40]} for at in range(0, 200, 40)]
    assert all(len(held) == 4 for held in groups)
    assert {shards[clip] for clip in second[:40]} not in groups
    assert len({shards[clip] for clip in first[:10]}) > 1


@given(
    clips=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    start=st.integers(0, 100),
    length=st.integers(0, 80),
)
def test_any_split_covers_the_same_positions(clips, batch_size, accumulation, world, start, length):
    def of(rank):
        return list(
            plan(
                Order.of(clips, 7),
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world=world,
                start=start,
                end=start + length,
            )
        )

    order, ranks = Order.of(clips, 7), [of(rank) for rank in range(world)]
    turns = list(zip(*ranks, strict=True))
    covered = [p for works in turns for work in works for p in work.positions]
    assert covered == list(range(start, start + length))
    step = batch_size * accumulation * world
    for number, works in enumerate(turns):
        begun = number // accumulation * step
        for work in works:
            assert work.indices == [order[p] for p in work.positions]
            assert work.step_examples == min(step, length - begun)
            assert work.last == (number % accumulation == accumulation - 1)
            assert len(work.positions) <= batch_size
        sizes = [len(work.positions) for work in works]
        assert max(sizes) - min(sizes) <= 1


@given(batch_size=st.integers(1, 6), steps=st.integers(0, 6), accumulation=st.integers(1, 3))
def test_a_plan_goes_on_from_any_step(batch_size, steps, accumulation):
    options = {"batch_size": batch_size, "accumulation": accumulation}
    whole = itertools.islice(plan(Order.of(11, 5), **options), (steps + 3) * accumulation)
    start = steps * batch_size * accumulation
    rest = itertools.islice(plan(Order.of(11, 5), **options, start=start), 3 * accumulation)
    assert list(whole)[steps * accumulation :] == list(rest)


@pytest.mark.parametrize(
    ("clips", "weights", "message"),
    [
        ({"a": []}, None, "at least one clip"),
        ({"a": [0]}, {"a": 1.0, "b": 1.0}, "weights are of a, b; the sources are a"),
        ({"a": [0]}, {"a": 0.0}, "one above"),
        ({"a": [0], "b": [1]}, {"a": 2.0, "b": -1.0}, "none below 0"),
    ],
)
def test_orders_that_cannot_be(clips, weights, message):
    with pytest.raises(ValueError, match=message):
        Order(0, clips, weights)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_passes_errors_on(workers):
    def works():
        return plan(Order.of(10, 5), batch_size=3)

    batches = prefetch(lambda work: sum(work.indices), works(), workers, 2)
    for work in itertools.islice(works(), 20):
        assert next(batches) == (work, sum(work.indices))
    batches.close()

    def fail(work):
        raise InputError("gone")

    with pytest.raises(InputError, match="gone"):
        next(prefetch(fail, works(), workers, 2))


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 3)])
def test_prefetch_holds_no_more_than_it_is_told(workers, ahead):
    begun = []
    results = prefetch(begun.append, iter(range(100)), workers, ahead)
    for taken in range(1, 10):
        next(results)
        assert len(begun) <= taken - 1 + workers * ahead
    results.close()
