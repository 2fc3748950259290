"""The exceptions that a caller may want to catch."""

from __future__ import annotations


class InputError(ValueError):
    """A file, row or option a user gave cannot be used.

    The message is one line that names the file, row or option, what was found and what was
    wanted, so that a command line can print it as it is.
    """


class Cancelled(Exception):
    """Generation was told to stop before it was done."""
