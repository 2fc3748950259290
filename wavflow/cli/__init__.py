"""The command line."""

from wavflow.cli.app import main

__all__ = ["main"]
