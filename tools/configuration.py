"""Prints the reference of all configuration keys as Markdown, from the dataclasses themselves.

    python -m tools.configuration > docs/configuration.md

What a key does is its line under ``Attributes:`` in the docstring of its section's class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from wavflow import Config

HEAD = """\
# Configuration

<!-- Written by `python -m tools.configuration` from the docstrings of the dataclasses. -->

A configuration is a packaged one's name (`wavflow train --config medium_16k`) or a YAML file,
whose keys are those of the public system and some more. `key=value` on the command line overrides
a key (`training.batch_size=8`; values are YAML), and `_base_: other.yaml` in a file reads that file
first, relative to this one. A key that nobody gives has the default below, and so has one that is
null where null has no meaning of its own. An unknown key is an error that names the nearest known
one; those of the public files that have no effect here are named in one line of the log.
"""


def texts(cls: type) -> dict[str, str]:
    """What each attribute of a class is for, by the ``Attributes:`` list of its docstring."""
    found: dict[str, str] = {}
    for base in reversed(cls.__bases__):
        found |= texts(base)
    lines = inspect.cleandoc(vars(cls).get("__doc__") or "").splitlines()
    if "Attributes:" not in lines:
        return found
    name = ""
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+): (.+)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def sections() -> Iterator[tuple[str, Any]]:
    """Names and default values of the sections; under "" the keys outside any."""
    config = Config()
    yield "", config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield field.name, value


def shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def kind(hint: Any) -> str:
    """A type in words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(kind(part) for part in typing.get_args(hint))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"list of {kind(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return f"{kind(arguments[1])} by name"
    names = {bool: "true or false", str: "text", int: "integer", float: "number"}
    return names.get(hint, "null" if hint is type(None) else hint.__name__)


def allowed(field: dataclasses.Field[Any]) -> str:
    """The values that a key may have, beyond its type."""
    if "choices" in field.metadata:
        return ", ".join(f"`{shown(choice)}`" for choice in field.metadata["choices"])
    if "low" in field.metadata:
        return f"{'>=' if field.metadata['equal'] else '>'} {field.metadata['low']}"
    return ""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, value in sections():
        cls, hints = type(value), typing.get_type_hints(type(value))
        about = texts(cls)
        rows = []
        for field in dataclasses.fields(value):
            default = getattr(value, field.name)
            if dataclasses.is_dataclass(default):
                continue
            cells = (
                f"`{field.name}`",
                kind(hints[field.name]),
                f"`{shown(default)}`",
                allowed(field),
                about.get(field.name, ""),
            )
            rows.append("| " + " | ".join(cells) + " |")
        first = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        parts.append(f"## {name or 'The whole file'}\n\n{first}\n")
        header = "| key | type | default | allowed | what it does |\n|---|---|---|---|---|\n"
        parts.append(header + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
