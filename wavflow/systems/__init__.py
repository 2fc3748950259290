"""The systems that can be trained and sampled, by the name that a configuration's `system` gives.

A system is a module that holds a `SYSTEM`. One of ours is a folder here and a line in `SYSTEMS`;
one of yours is any module that Python can import, by its dotted path
(`system: my_package.my_system`).
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wavflow.base.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from wavflow.data.tracks import Track
    from wavflow.sampling.field import Maker
    from wavflow.training.objective import Objective

#: One line a system: its name, and the module that holds its `SYSTEM`.
SYSTEMS = {"wavflow": "wavflow.systems.wavflow"}


@dataclass(frozen=True)
class System:
    """What a system offers to training and sampling.

    Attributes:
        sections: the dataclasses of the sections `model` and `data` of its configurations, by these
            two names; they extend `ModelConfig` and `DataConfig` of `wavflow.config.schema`.
        build: build(config): its network, freshly initialised.
        tracks: tracks(config): the features of a clip that training reads.
        objective: objective(config): what the trainer drives
            (`wavflow.training.objective.Objective`).
        maker: maker(config, model, device, dtype, *, prepare): what sampling drives
            (`wavflow.sampling.field.Maker`); `prepare` says whether weights are laid out for
            inference.
    """

    sections: dict[str, type]
    build: Callable[[Any], nn.Module]
    tracks: Callable[[Any], tuple[Track, ...]]
    objective: Callable[[Any], Objective]
    maker: Callable[..., Maker]


def system(name: str) -> System:
    """The system of that name, or of the module with that dotted path.

    Raises:
        InputError: there is none, its module cannot be imported, or holds no `SYSTEM`.
    """
    path = SYSTEMS.get(name, name if "." in name else None)
    if path is None:
        near = sorted(difflib.get_close_matches(name, SYSTEMS, len(SYSTEMS), 0.6))
        said = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"system is {name!r}; wanted {_wanted()}{said}")
    try:
        module = importlib.import_module(path)
    except (ImportError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"system is {name!r}, which cannot be imported ({why}); wanted {_wanted()}"
        ) from None
    found = getattr(module, "SYSTEM", None)
    if not isinstance(found, System):
        raise InputError(
            f"system is {name!r}, a module whose SYSTEM is a {type(found).__name__}; wanted a "
            "wavflow.systems.System"
        )
    return found


def is_known(name: str) -> bool:
    """Whether a system needs no import that nobody has asked for: it is listed, or imported."""
    return "." not in name or name in sys.modules


def _wanted() -> str:
    return f"{', '.join(sorted(SYSTEMS))} or the dotted path of a module"
