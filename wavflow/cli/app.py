"""The command line `wavflow`: its commands, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from wavflow.base.console import show_log
from wavflow.base.errors import InputError
from wavflow.cli import data, generate, judge, train

app = typer.Typer(
    name="wavflow",
    help="Flow matching on raw audio: sound for videos and captions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    data.toy,
    data.extract,
    data.pack,
    train.train,
    train.convert,
    train.plot,
    generate.generate,
    generate.serve,
    generate.infer,
):
    app.command()(command)
app.command("eval")(judge.evaluate)
app.command()(judge.demo)
app.command()(judge.info)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 well, 1 some rows failed, 2 unusable input."""
    show_log()
    try:
        app(args=None if argv is None else list(argv), prog_name="wavflow")
    except InputError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}")


def _fail(error: object) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)
