"""WavFlow: flow matching on raw audio, from video and text to sound.

Names below are imported when they are first used, so that `import wavflow` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Cancelled": "wavflow.errors",
    "Config": "wavflow.config",
    "FlowMatching": "wavflow.model.flow_matching",
    "InputError": "wavflow.errors",
    "Sampler": "wavflow.sampler",
    "evaluate": "wavflow.evaluation.evaluate",
    "extract": "wavflow.features.extract",
    "get_wavflow_model": "wavflow.model.networks",
    "load": "wavflow.sampler",
    "load_config": "wavflow.config",
    "train": "wavflow.training",
    "write_toy_world": "wavflow.data.toy",
}

__all__ = [
    "Cancelled",
    "Config",
    "FlowMatching",
    "InputError",
    "Sampler",
    "__version__",
    "evaluate",
    "extract",
    "get_wavflow_model",
    "load",
    "load_config",
    "train",
    "write_toy_world",
]

if TYPE_CHECKING:
    from wavflow.config import Config, load_config
    from wavflow.data.toy import write_toy_world
    from wavflow.errors import Cancelled, InputError
    from wavflow.evaluation.evaluate import evaluate
    from wavflow.features.extract import extract
    from wavflow.model.flow_matching import FlowMatching
    from wavflow.model.networks import get_wavflow_model
    from wavflow.sampler import Sampler, load
    from wavflow.training import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wavflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
