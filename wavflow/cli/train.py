"""Commands that train, convert checkpoints and draw losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from wavflow.cli.shared import ConfigFile, Overrides, Overwrite, say


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps and say what the run will need.")
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(help="Train only on this many clips, the first of the table.", min=1),
    ] = None,
) -> None:
    """Train, or go on with the run that the configuration describes."""
    from wavflow.pipeline.train import train, try_out
    from wavflow.training.trainer import loss_text

    overrides = list(overrides or ())
    if overfit is not None:
        overrides.append(f"training.overfit={overfit}")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if dry_run:
            found = try_out(config, overrides)
            if is_main:
                say(str(found))
            return
        result = train(config, overrides)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if is_main:
        say(
            f"{result.checkpoint}: {result.steps} steps, {result.parameters / 1e6:.1f} M "
            f"parameters{loss_text(result.loss)}, {result.seconds:.0f} s"
        )


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A folder of shards.")],
    out: Annotated[Path, typer.Argument(help="The .pth file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint's shards as one file in the public layout."""
    from wavflow.base.files import check_output
    from wavflow.training.run_state import convert

    check_output(out, checkpoint, overwrite=overwrite)
    convert(checkpoint, out)
    say(f"{out}: {out.stat().st_size / 1e9:.2f} GB")


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs, overlaid.")],
    out: Annotated[Path | None, typer.Option(help="PNG; default RUN/curves.png.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the losses of training runs, and what else their metrics.jsonl hold, over the steps."""
    from wavflow.base.files import check_output
    from wavflow.training.curves import plot_runs

    if out is not None:
        check_output(out, overwrite=overwrite)

    say(str(plot_runs(runs, out)))
