"""Training; `python -m wavflow.train --config X.yaml [key=value ...]` is `wavflow train`.

The module can be called like the function `wavflow.train`, whose name it has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavflow.config.schema import Config
    from wavflow.training.trainer import TrainResult


class _Callable(ModuleType):
    """A module that trains when it is called."""

    def __call__(
        self, config: Config | str | os.PathLike[str], overrides: Iterable[str] = ()
    ) -> TrainResult:
        """Trains as a configuration says; see `wavflow.pipeline.train.train`."""
        from wavflow.pipeline.train import train

        return train(config, overrides)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from wavflow.cli import main

    main(["train", *sys.argv[1:]])
