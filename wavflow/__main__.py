"""`python -m wavflow`: the command line."""

from __future__ import annotations

from wavflow.cli.app import main

if __name__ == "__main__":
    main()
