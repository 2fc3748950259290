"""The systems that can be trained and sampled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from wavflow.sampling.field import Maker
    from wavflow.training.objective import Objective

#: One line a system: its name, and the module that holds its `SYSTEM`.
SYSTEMS = {"wavflow": "wavflow.systems.wavflow"}


@dataclass(frozen=True)
class System:
    """What a system offers to training and sampling.

    Attributes:
        build: build(config): its network, as it is initialised.
        objective: objective(config): what is trained (`wavflow.training.objective.Objective`).
        maker: maker(config, model, device, dtype, *, prepare): what sampling asks
            (`wavflow.sampling.field.Maker`); `prepare` says whether weights are laid out for
            inference.
    """

    build: Callable[[Any], nn.Module]
    objective: Callable[[Any], Objective]
    maker: Callable[..., Maker]


def system(name: str) -> System:
    """The system of that name."""
    found: System = importlib.import_module(SYSTEMS[name]).SYSTEM
    return found
