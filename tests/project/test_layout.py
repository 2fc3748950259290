"""Where code lives: folders import downwards only, and nothing but a system's folder knows it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

#: From the ground up. A folder imports those of earlier lines, and none of its own line.
FLOORS = (
    ("base",),
    ("flow", "layers", "config"),
    ("media",),
    ("data", "sampling"),
    ("features", "training", "evaluation", "toy"),
    ("systems",),
    ("pipeline",),
    ("serve", "demo"),
    ("cli",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
#: The packages that may know a system by its name, and the modules outside them that may.
INSIDERS = ("systems", "pipeline", "demo")
DOORS = ("__init__", "train", "infer", "model.networks", "model.flow_matching")
#: Files beside the folders, at most.
ROOT_FILES = 6
#: Breaches that are there, as "importer -> imported".
KNOWN: frozenset[str] = frozenset()

Edges = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package by name, without the package's own name; "" is its __init__."""
    found = {}
    for path in sorted((root / "wavflow").rglob("*.py")):
        parts = path.relative_to(root / "wavflow").with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imported(path: Path, name: str, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports: anywhere in it, in functions and for types."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            if node.level:
                up = ["wavflow", *package][: len(package) + 2 - node.level]
                whole = ".".join([*up, *whole.split(".")]).rstrip(".")
            targets = [(whole, alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in targets:
            if module == "wavflow" or module.startswith("wavflow."):
                base = module.removeprefix("wavflow").lstrip(".")
                inner = f"{base}.{attribute}".lstrip(".") if attribute else base
                yield inner if inner in known else base


def edges(root: Path) -> Edges:
    """Which modules each module imports."""
    known = modules(root)
    return {name: set(imported(path, name, known)) - {name} for name, path in known.items()}


def floor_breaches(graph: Edges) -> set[str]:
    """Imports of a folder that is not below."""
    return {
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if (here := name.split(".")[0]) in FLOOR
        and (there := target.split(".")[0]) != here
        and FLOOR.get(there, len(FLOORS)) >= FLOOR[here]
    }


def system_breaches(graph: Edges) -> set[str]:
    """Imports of one system by what has to do with all."""
    return {
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if target.startswith("systems.")
        and name.split(".")[0] not in INSIDERS
        and name not in (*DOORS, "")
    }


def circle(graph: Edges) -> list[str]:
    """Modules that import each other in a ring; none if there is no such ring."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if ring := visit(target, [*trail, name]):
                    return ring
            done.add(name)
        return []

    return next((ring for name in graph if (ring := visit(name, []))), [])


def root_files(root: Path) -> list[str]:
    """Files that lie beside the folders."""
    return sorted(path.name for path in (root / "wavflow").iterdir() if path.is_file())


GRAPH = edges(ROOT)


def test_every_folder_has_a_floor():
    folders = {name.split(".")[0] for name in GRAPH if "." in name}
    assert folders - {"model"} == FLOOR.keys()  # `model` is a door


def test_few_files_lie_beside_the_folders():
    assert len(root_files(ROOT)) <= ROOT_FILES, root_files(ROOT)


def test_folders_import_downwards():
    assert floor_breaches(GRAPH) == KNOWN


def test_one_system_is_known_to_its_folder_alone():
    assert system_breaches(GRAPH) == KNOWN


def test_a_folder_of_systems_knows_no_other_system():
    for name, targets in GRAPH.items():
        own = name.split(".")[:2]
        if own[0] == "systems" and len(name.split(".")) > 1:
            others = {t for t in targets if t.startswith("systems.") and t.split(".")[:2] != own}
            assert not others, name


def test_no_modules_import_each_other():
    assert circle(GRAPH) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "wavflow", tmp_path / "wavflow", ignore=shutil.ignore_patterns("__pycache__", "*.*s")
    )
    return tmp_path


BREACHES = [
    (floor_breaches, "base/files.py", "import wavflow.config.load", "base.files -> config.load"),
    (floor_breaches, "flow/times.py", "from wavflow.layers import prepare", "layers.prepare"),
    (floor_breaches, "media/mux.py", "def f():\n    import wavflow.data.pack", "data.pack"),
    (floor_breaches, "data/pack.py", "from ..training.ema import Ema", "training.ema"),
    (floor_breaches, "config/schema.py", "from wavflow import systems", "-> systems"),
    (floor_breaches, "data/crop.py", "from wavflow import __version__", "data.crop -> "),
    (floor_breaches, "serve/page.py", "if 0:\n    from wavflow.cli.app import main", "cli.app"),
    (system_breaches, "cli/app.py", "import wavflow.systems.wavflow.network", "wavflow.network"),
    (system_breaches, "serve/gate.py", "from wavflow.systems import wavflow", "systems.wavflow"),
    (system_breaches, "training/ema.py", "from ..systems.wavflow import config", "flow.config"),
]


@pytest.mark.parametrize(("rule", "file", "line", "breach"), BREACHES)
def test_a_breach_is_found(copy, rule, file, line, breach):
    with open(copy / "wavflow" / file, "a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    (found,) = rule(edges(copy)) - KNOWN
    assert found.endswith(breach) or found.startswith(breach)


def test_a_circle_is_found(copy):
    with open(copy / "wavflow/base/errors.py", "a", encoding="utf-8") as source:
        source.write("\ndef f():\n    from wavflow.base.files import atomic_write\n")
    assert {"base.errors", "base.files"} <= set(circle(edges(copy)))


def test_a_file_too_many_is_found(copy):
    for name in ("one.py", "two.py", "three.py"):
        (copy / "wavflow" / name).touch()
    assert len(root_files(copy)) > ROOT_FILES
