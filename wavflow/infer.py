"""Generation for a table; `python -m wavflow.infer --config X.yaml` is `wavflow infer`."""

from __future__ import annotations

import sys

from wavflow.pipeline.table import InferResult, infer, infer_config, row_seed

__all__ = ["InferResult", "infer", "infer_config", "row_seed"]

if __name__ == "__main__":
    from wavflow.cli import main

    main(["infer", *sys.argv[1:]])
