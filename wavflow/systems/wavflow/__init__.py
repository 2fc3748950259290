"""WavFlow: sound from video and text by flow matching on raw audio.

Its parts are imported when they are asked for: reading a configuration needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wavflow.systems import System
from wavflow.systems.wavflow.config import RunConfig, WavflowDataConfig, WavflowModelConfig

if TYPE_CHECKING:
    from wavflow.data.tracks import Track
    from wavflow.systems.wavflow.conditioner import WavflowMaker
    from wavflow.systems.wavflow.network import WavflowModel
    from wavflow.systems.wavflow.objective import WavflowObjective


def _build(config: RunConfig) -> WavflowModel:
    from wavflow.systems.wavflow.build import build_model

    return build_model(config)


def _objective(config: RunConfig) -> WavflowObjective:
    from wavflow.systems.wavflow.objective import WavflowObjective

    return WavflowObjective(config)


def _maker(*args: Any, **options: Any) -> WavflowMaker:
    from wavflow.systems.wavflow.conditioner import WavflowMaker

    return WavflowMaker(*args, **options)


def _tracks(config: RunConfig) -> tuple[Track, ...]:
    return config.data.tracks


SYSTEM = System(
    sections={"model": WavflowModelConfig, "data": WavflowDataConfig},
    build=_build,
    tracks=_tracks,
    objective=_objective,
    maker=_maker,
)
