"""The version of wavflow."""

__version__ = "0.1.0"
