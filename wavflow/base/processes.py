"""The processes of a training run: one, or those that torchrun starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from wavflow.base import precision
from wavflow.base.errors import InputError

T = TypeVar("T")

#: How long processes wait for the first while it reads or packs the data.
PREPARATION = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them.

    Collectives for the run's own bookkeeping go over the CPU (gloo) and wait for no GPU. With one
    process they cost nothing, whether or not there is a process group.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def largest(self, values: list[float]) -> list[float]:
        """Element-wise maximum of the values over all processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others."""
        if self.size == 1:
            yield
            return
        group = dist.new_group(backend="gloo", timeout=PREPARATION)
        if not self.is_main:
            dist.barrier(group)
        yield
        if self.is_main:
            dist.barrier(group)


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many torchrun started, by its environment; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str | torch.device = "auto") -> torch.device:
    """The device of this process: "auto" and "cuda" are the GPU of its local rank, if there is one.

    Raises:
        InputError: a device that is not there.
    """
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        device = f"cuda:{local}"
    return precision.resolve_device(device)


def own_cores() -> int:
    """CPU cores for each of this machine's processes."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def join(
    device: str = "auto", group: bool = False, patience: float | None = None
) -> Iterator[World]:
    """Joins the processes that torchrun started, by its environment; alone without it.

    Args:
        device: where this process computes; "auto" is the GPU of its local rank if there is one.
        group: whether a process alone needs a process group too.
        patience: seconds that a process waits for the others, by default torch's.

    Raises:
        InputError: a device that is not there, or a process group that exists already.
    """
    rank, size = rank_and_size()
    world = World(rank, size, own_device(device))
    if size == 1 and not group:
        yield world
        return
    if dist.is_initialized():
        raise InputError("torch.distributed is initialised already; the run joins by itself")
    backend = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.HashStore() if size == 1 else _own_store(rank, size)
    limit = None if patience is None else timedelta(seconds=patience)
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    yield world
    # Not after an error: others may be inside a collective, and its end would be waited for here.
    dist.barrier()
    # Gloo's thread needs Python's lock to free its last collective, and the group's end holds that
    # lock while it waits for the thread: without a pause one in eight runs of two steps hangs.
    time.sleep(0.2)
    dist.destroy_process_group()


def _own_store(rank: int, size: int) -> dist.Store:
    """Where these processes meet. torchrun's own store outlives a restart, and who comes first
    after one would call processes that are dead."""
    store = next(iter(rendezvous("env://", rank, size)))[0]
    return dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{size}", store)
