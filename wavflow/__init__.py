"""WavFlow: flow matching on raw audio, from video and text to sound.

Names below are imported when they are first used, so that `import wavflow` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wavflow.base.version import __version__

_HOMES = {
    "Cancelled": "wavflow.base.errors",
    "Config": "wavflow.config.schema",
    "FlowMatching": "wavflow.flow.matching",
    "InputError": "wavflow.base.errors",
    "Sampler": "wavflow.pipeline.sampler",
    "evaluate": "wavflow.evaluation.evaluate",
    "extract": "wavflow.features.extract",
    "get_wavflow_model": "wavflow.systems.wavflow.network",
    "load": "wavflow.pipeline.sampler",
    "load_config": "wavflow.config.load",
    "train": "wavflow.pipeline.train",
    "write_toy_world": "wavflow.toy.world",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from wavflow.base.errors import Cancelled as Cancelled
    from wavflow.base.errors import InputError as InputError
    from wavflow.config.load import load_config as load_config
    from wavflow.config.schema import Config as Config
    from wavflow.evaluation.evaluate import evaluate as evaluate
    from wavflow.features.extract import extract as extract
    from wavflow.flow.matching import FlowMatching as FlowMatching
    from wavflow.pipeline.sampler import Sampler as Sampler
    from wavflow.pipeline.sampler import load as load
    from wavflow.pipeline.train import train as train
    from wavflow.systems.wavflow.network import get_wavflow_model as get_wavflow_model
    from wavflow.toy.world import write_toy_world as write_toy_world


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wavflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
