"""`python -m wavflow.train --config X.yaml [key=value ...]`: the command `wavflow train`."""

from __future__ import annotations

import sys

from wavflow.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
