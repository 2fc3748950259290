"""WavFlow's network, under the public system's module path."""

from wavflow.systems.wavflow.config import PRESETS, WavflowConfig
from wavflow.systems.wavflow.network import WavflowModel, get_wavflow_model

__all__ = ["PRESETS", "WavflowConfig", "WavflowModel", "get_wavflow_model"]
