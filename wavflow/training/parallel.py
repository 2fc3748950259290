"""How one model is trained by several processes: DDP or FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wavflow.base.processes import World


class Parallel:
    """A model as the processes train it together: "ddp" (whole in each) or "fsdp" (in shards).

    Args:
        model: on the world's device; the same in every process. With "fsdp" (FSDP2,
            ``fully_shard``) its parameters become DTensors, block by block.
        strategy: "ddp" or "fsdp".
        world: the processes; "fsdp" needs a process group, even for one.
        compiled: whether the model runs through torch.compile.
    """

    def __init__(self, model: nn.Module, strategy: str, world: World, *, compiled: bool) -> None:
        self.model, self.strategy, self.world = model, strategy, world
        self.forward: nn.Module = model
        if strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(world.device.type, (world.size,))
            for block in blocks(model):
                if compiled:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return
        if compiled:
            model.compile()
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True
            )

    @contextmanager
    def gradients(self, *, shared: bool) -> Iterator[None]:
        """Wraps a forward and backward; with `shared`, a step's last, gradients are averaged."""
        trained: Any = self.model if self.strategy == "fsdp" else self.forward
        if self.strategy == "fsdp":
            trained.set_requires_gradient_sync(shared)
        elif self.world.size > 1 and not shared:
            with trained.no_sync():
                yield
            return
        yield


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded and gathered as one: the members of the model's module lists."""
    return [
        block
        for child in model.children()
        if isinstance(child, nn.ModuleList)
        for block in child
        if any(True for _ in block.parameters())
    ]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the shard of a DTensor, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process: a collective for a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copies `values`, the same in every process, into a tensor or into its shards."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        values = values.to(device=target.device, dtype=target.dtype)
        values = distribute_tensor(
            values, target.device_mesh, target.placements, src_data_rank=None
        )
    local(target).copy_(local(values))
