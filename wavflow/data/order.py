"""Which clip is the p-th example of a run, and which examples make up a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from wavflow.base.seeding import mix


class Order:
    """An endless order of clips, a function of the seed alone: ``order[p]`` is the p-th example.

    An epoch takes `len(self)` examples. Without weights it is a permutation of all clips. With
    them every source gets its share of the epoch's examples, and its own clips come in turn, each
    once before any comes again.

    With shards an epoch visits them in random order, `group` at a time, and its examples are
    shuffled among those of the same group: clips that lie together are read together.

    Args:
        seed: the run's seed.
        sources: indices of the clips of each source; clips without one make a source too.
        weights: the sources' shares, relative; None for their sizes.
        shards: the shard of every clip; None shuffles all together.
        group: shards that are shuffled together.

    Raises:
        ValueError: no clip; weights for other sources; a weight below 0, or none above.
    """

    def __init__(
        self,
        seed: int,
        sources: Mapping[str, Sequence[int]],
        weights: Mapping[str, float] | None = None,
        *,
        shards: Sequence[int] | None = None,
        group: int = 8,
    ) -> None:
        self.seed = seed
        self._shards, self._group = shards, group
        self._sources = {name: list(clips) for name, clips in sources.items() if clips}
        self._length = sum(map(len, self._sources.values()))
        if not self._length:
            raise ValueError("an order needs at least one clip")
        sizes = {name: float(len(clips)) for name, clips in self._sources.items()}
        self._counts = _shares(self._length, sizes if weights is None else weights)
        if self._counts.keys() != self._sources.keys():
            raise ValueError(
                f"weights are of {', '.join(self._counts)}; the sources are "
                f"{', '.join(self._sources)}"
            )
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._permuted: dict[str, tuple[int, list[int]]] = {}

    @classmethod
    def of(cls, clips: int, seed: int) -> Order:
        """The order of `clips` clips that are all of one source."""
        return cls(seed, {"": range(clips)})

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._examples(epoch))
        return self._epoch[1][place]

    def _examples(self, epoch: int) -> list[int]:
        chosen: list[int] = []
        for number, (name, count) in enumerate(self._counts.items()):
            clips = self._sources[name]
            for taken in range(epoch * count, (epoch + 1) * count):
                turn, place = divmod(taken, len(clips))
                if self._permuted.get(name, (-1,))[0] != turn:
                    self._permuted[name] = (turn, self._permutation(len(clips), number, turn))
                chosen.append(clips[self._permuted[name][1][place]])
        examples = [chosen[i] for i in self._permutation(len(chosen), -1, epoch)]
        shards = self._shards
        if shards is not None:
            turns = self._permutation(max(shards) + 1, -2, epoch)
            examples.sort(key=lambda clip: turns[shards[clip]] // self._group)
        return examples

    def _permutation(self, count: int, stream: int, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, stream, turn) >> 1)
        return torch.randperm(count, generator=generator).tolist()


def _shares(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divides `total` in proportion to the weights, by largest remainders."""
    whole = sum(weights.values())
    if not whole > 0 or min(weights.values()) < 0:
        raise ValueError(f"weights are {dict(weights)}; wanted none below 0 and one above")
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class Work:
    """What a process does at once: one micro-batch of a step.

    Attributes:
        positions: positions of its examples in the run; none where the last step has too few.
        indices: indices of their clips.
        step_examples: number of examples of the whole step, in all processes.
        last: whether the optimiser's step follows.
    """

    positions: list[int]
    indices: list[int]
    step_examples: int
    last: bool


def plan(
    order: Order | range,
    *,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Work]:
    """The micro-batches of one process, from position `start` on, to `end` if there is one.

    A step takes batch_size x world x accumulation examples that follow one another. The last step
    before `end` takes what is left, shared as evenly as possible: some processes may get none.
    """
    shares = world * accumulation
    while end is None or start < end:
        count = batch_size * shares
        if end is not None:
            count = min(count, end - start)
        for turn in range(accumulation):
            share = turn * world + rank
            positions = list(
                range(start + count * share // shares, start + count * (share + 1) // shares)
            )
            indices = [order[p] for p in positions]
            yield Work(positions, indices, count, turn == accumulation - 1)
        start += count
