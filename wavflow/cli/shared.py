"""What several commands have in common: options, and how they speak and end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wavflow.base.console import console

Seed = Annotated[int, typer.Option(help="Base seed.")]
Workers = Annotated[int | None, typer.Option(help="Processes; default one per core.")]
ConfigFile = Annotated[str, typer.Option(help="A YAML file, or a packaged configuration's name.")]
Checkpoint = Annotated[
    Path, typer.Option(help="A checkpoint or EMA file, or packaged weights: toy_8k.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings of the configuration to change: key=value ...")
]


def say(text: str) -> None:
    """Prints a line as it is."""
    console().print(text, highlight=False, soft_wrap=True, markup=False)


def finish(done: int, failed: int, report: Path) -> None:
    """Exits with 1 where rows of a job failed, with 2 where all did; else returns."""
    if failed:
        say(f"{failed} rows failed; {report} says why")
        raise typer.Exit(1 if done else 2)
