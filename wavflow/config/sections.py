"""The sections of a configuration that differ from system to system."""

from __future__ import annotations

import importlib
from typing import Any


def _systems() -> Any:
    """The list of systems, imported when it is asked for, since systems import configurations."""
    return importlib.import_module("wavflow.systems")


def sections(system: str) -> dict[str, type]:
    """The classes of the sections `model` and `data` of a system, by the section's name.

    Raises:
        InputError: there is no such system.
    """
    return _systems().system(system).sections


def is_known(system: str) -> bool:
    """Whether a system is in the list, or is a module that has been imported already."""
    return _systems().is_known(system)
