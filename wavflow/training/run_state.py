"""What a run must know to go on as if it had never stopped: gathered, written, found, restored."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.processes import World
from wavflow.training import checkpoint, sharded_checkpoint
from wavflow.training.ema import Ema
from wavflow.training.parallel import fill, whole

log = logging.getLogger("wavflow")

#: Folders of the strategy "fsdp", beside the files LATEST and PREVIOUS of "ddp".
LATEST_SHARDS, PREVIOUS_SHARDS = "checkpoint_latest", "checkpoint_previous"


class State:
    """The tensors of a run, and its checkpoints in one folder.

    Args:
        model, optimizer, emas: the run's own; the optimiser is AdamW.
        out: the run's folder.
        world: the processes.
        shards: whether checkpoints are folders of shards (`wavflow.training.sharded_checkpoint`)
            or single files.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        emas: Mapping[str, Ema],
        out: Path,
        world: World,
        *,
        shards: bool,
    ) -> None:
        self.model, self.optimizer, self.emas = model, optimizer, emas
        self.out, self.world, self.shards = out, world, shards

    @property
    def latest(self) -> str:
        """Name of the latest checkpoint."""
        return LATEST_SHARDS if self.shards else checkpoint.LATEST

    @property
    def kept(self) -> int:
        """How many of the latest checkpoint and the one before it are there."""
        names = (LATEST_SHARDS, PREVIOUS_SHARDS, checkpoint.LATEST, checkpoint.PREVIOUS)
        return min(2, sum((self.out / name).exists() for name in names))

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        for path in self.out.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # Writing

    def save(self, name: str, meta: Mapping[str, Any]) -> None:
        """Writes a whole checkpoint; all processes call it. The latest before becomes PREVIOUS.

        Args:
            name: LATEST, or another file name; a folder of shards is called so without the ending.
            meta: plain values that are written beside the tensors.

        Raises:
            InputError: no room for it; nothing is changed.
        """
        latest = name == checkpoint.LATEST
        checkpoint.check_room(self.out, self.nbytes)
        if self.shards:
            order = [n for group in self._names() for n in group]
            groups = self.optimizer.state_dict()["param_groups"]
            meta = {
                **meta,
                "model_order": list(self.model.state_dict()),
                "optimizer_order": order,
                "optimizer_groups": groups,
            }
            folder = self.out / name.removesuffix(".pth")
            previous = self.out / PREVIOUS_SHARDS if latest else None
            sharded_checkpoint.save(folder, self.tensors(), dict(meta), self.world, previous)
        elif self.world.is_main:
            content = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                **{f"model_{name}": ema.values for name, ema in self.emas.items()},
                **meta,
            }
            previous = self.out / checkpoint.PREVIOUS if latest else None
            checkpoint.save(self.out / name, content, previous)

    @property
    def nbytes(self) -> int:
        """Bytes of a checkpoint, all processes together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def average(self, name: str) -> dict[str, Tensor]:
        """The model's state dict with an average's weights, whole, on every process."""
        state = {**self.model.state_dict(), **self.emas[name].values}
        return {key: whole(value) for key, value in state.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, under `<part>.<name>`; they are the run's own memory."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for part, ema in self.emas.items():
            found |= {f"model_{part}.{name}": value for name, value in ema.values.items()}
        states = self._optimizer_states()
        for names, group in zip(self._names(), self.optimizer.param_groups, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                for key, value in states[parameter].items():
                    found[f"optimizer.{name}.{key}"] = value
        return found

    def _names(self) -> list[list[str]]:
        """Names of the parameters of each group of the optimiser."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]

    def _optimizer_states(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's states; those of parameters that have none yet are made, as AdamW makes them."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    self.optimizer.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                    }
        return self.optimizer.state

    # Reading

    def find(self, which: str) -> Path | None:
        """The checkpoint to go on from: the latest, or the one before it.

        A latest that is not whole is set aside (`*.broken*`) if the one before it is. Of a file and
        a folder of shards the one with more steps counts.

        Args:
            which: "latest" or "previous".

        Raises:
            InputError: there are checkpoints, but none of them is whole; or no previous one.
        """
        latest = self._of(checkpoint.LATEST, LATEST_SHARDS)
        previous = self._of(checkpoint.PREVIOUS, PREVIOUS_SHARDS)
        if which == "previous":
            if previous is None:
                raise InputError(f"{self.out}: no {checkpoint.PREVIOUS}, asked for by resume")
            self._check(previous)
            return previous
        if latest is None:
            if previous is not None:
                self._check(previous)
                log.warning("%s: the latest checkpoint is missing; %s is", self.out, previous.name)
            return previous
        try:
            self._check(latest)
        except InputError as error:
            if previous is None:
                raise
            self._check(previous)
            aside = latest.with_name(f"{latest.stem}.broken{latest.suffix}")
            self.world.gather(None)
            if self.world.is_main:
                latest.rename(aside)
            log.warning("%s; it is now %s, and %s is whole", error, aside.name, previous)
            return previous
        return latest

    def _of(self, file: str, folder: str) -> Path | None:
        found = [path for path in (self.out / file, self.out / folder) if path.exists()]
        return max(found, key=lambda path: path.stat().st_mtime) if found else None

    def _check(self, path: Path) -> None:
        if path.is_dir():
            sharded_checkpoint.check(path, self.world)
            return
        problem = None
        if self.world.is_main:
            try:
                checkpoint.check_whole(path)
            except InputError as error:
                problem = str(error)
        if problem := self.world.gather(problem)[0]:
            raise InputError(problem)

    def restore(self, path: Path) -> dict[str, Any]:
        """Takes all tensors from a checkpoint, of any strategy and number of processes.

        Returns:
            What was written beside them.

        Raises:
            InputError: it is unreadable, of another model, or of another optimiser layout.
        """
        if path.is_dir():
            sharded_checkpoint.load(path, self.tensors(), self.world)
            return sharded_checkpoint.read_meta(path)
        content = checkpoint.load_training(path)
        model = content.pop("model")
        self.fill_model(model, path)
        for name, ema in self.emas.items():
            ema.load(content.pop(f"model_{name}", None) or model, path)
        self._restore_optimizer(content.pop("optimizer"), path)
        return content

    def fill_model(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Takes the model's weights as they were read, whole, from `path`.

        Raises:
            InputError: they are of another model.
        """
        state_dict.check_fit(self.model, weights, path)
        for name, value in self.model.state_dict().items():
            fill(value, weights[name])

    def _restore_optimizer(self, saved: dict[str, Any], path: Path) -> None:
        groups = [len(group["params"]) for group in saved["param_groups"]]
        wanted = [len(group["params"]) for group in self.optimizer.param_groups]
        if groups != wanted:
            raise InputError(
                f"{path}: its optimizer state is of groups of {groups} parameters; the run has "
                f"{wanted}"
            )
        states = self._optimizer_states()
        names = [name for group in self._names() for name in group]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        order = [i for group in saved["param_groups"] for i in group["params"]]
        for name, parameter, index in zip(names, parameters, order, strict=True):
            for key, value in states[parameter].items():
                found = saved["state"].get(index, {}).get(key)
                if found is None:
                    value.zero_()
                elif tuple(found.shape) != tuple(value.shape):
                    raise InputError(
                        f"{path}: its optimizer's {key} of {name} is {tuple(found.shape)}; "
                        f"the run wants {tuple(value.shape)}"
                    )
                else:
                    fill(value, found)


def convert(folder: Path, path: Path) -> None:
    """Writes a folder of shards as one file in the public layout.

    Raises:
        InputError: the folder is not a whole checkpoint.
    """
    alone = World(0, 1, torch.device("cpu"))
    sharded_checkpoint.check(folder, alone)
    content: dict[str, Any] = sharded_checkpoint.read_meta(folder)
    order, groups = content.pop("optimizer_order"), content.pop("optimizer_groups")
    names = content.pop("model_order")
    index = {name: i for i, name in enumerate(order)}
    states: dict[int, dict[str, Tensor]] = {i: {} for i in index.values()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sharded_checkpoint.gather(folder).items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            parameter, _, key = rest.rpartition(".")
            states[index[parameter]][key] = tensor
        else:
            parts.setdefault(part, {})[rest] = tensor
    weights = {part: {n: found[n] for n in names if n in found} for part, found in parts.items()}
    optimizer = {"state": states, "param_groups": groups}
    checkpoint.save(path, {**weights, "optimizer": optimizer, **content})
