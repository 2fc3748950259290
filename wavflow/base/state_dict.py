"""State dicts: read from a file onto the CPU, checked against a module, copied into it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wavflow.base.errors import InputError
from wavflow.base.files import load_tensors

#: What DistributedDataParallel and torch.compile put before the names of a model's tensors.
WRAPPERS = ("module.", "_orig_mod.")


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the model itself, where that of a wrapper around it was written."""
    state = dict(state)
    while state:
        prefix = next((w for w in WRAPPERS if all(str(k).startswith(w) for k in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint, of this library or of the public system, onto the CPU.

    Raises:
        InputError: missing, truncated, not a checkpoint, or holding objects other than
            tensors and plain values.
    """
    content = load_tensors(path, "checkpoint")
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a dict of tensors, found {type(content).__name__}")
    return content


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copies `state` into `module`, every tensor or none; raises as `check_fit` does."""
    check_fit(module, state, path)
    wanted = module.state_dict()
    module.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=True)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raises InputError unless `state`, read from `path`, has the module's tensors.

    It names a tensor of another shape (with the found and the wanted shape), one that holds a
    number that is not finite, a missing or a foreign one. What the module lists as `ignored_keys`
    may be in the file.
    """
    wanted = module.state_dict()
    ignored = getattr(module, "ignored_keys", ())
    state = {k: v for k, v in state.items() if k not in ignored or k in wanted}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name} is a {type(tensor).__name__}; wanted a tensor")
        if name in wanted and tensor.shape != wanted[name].shape:
            raise InputError(
                f"{path}: {name} is {tuple(tensor.shape)}; "
                f"the model wants {tuple(wanted[name].shape)}"
            )
        if name in wanted and tensor.is_floating_point() and not tensor.isfinite().all():
            found = "NaN" if tensor.isnan().any() else "infinity"
            raise InputError(f"{path}: {name} holds {found}; wanted finite weights")
    for kind, names in (
        ("lacks", [n for n in wanted if n not in state]),
        ("has foreign", [n for n in state if n not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path}: it {kind} {names[0]}{more}; it is of another model")
