"""From a checkpoint to a network: its weights, and the configuration that they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from wavflow.base.errors import InputError
from wavflow.base.state_dict import load_into
from wavflow.config.load import config_from_dict
from wavflow.config.schema import Config
from wavflow.systems import system
from wavflow.training.checkpoint import Weights, read_weights


def read_model(
    checkpoint: str | os.PathLike[str],
    ema: str,
    config: Config | None,
    own: Mapping[str, Any],
) -> tuple[nn.Module, Config, Weights]:
    """The network of a checkpoint with its weights, on the CPU.

    Args:
        checkpoint: a file, or the name of packaged weights.
        ema: which average of the weights: `ema1`, `ema2`, or `none` for the weights as trained.
        config: for a file that carries none; must agree with one that it carries.
        own: values of the section `model`, by key, in place of the configuration's.

    Returns:
        The network, its configuration, and the weights as they were read.

    Raises:
        InputError: an unreadable file, no configuration, or weights of another model.
    """
    weights = read_weights(checkpoint, ema)
    config = _settle(checkpoint, config, weights.config)
    values = config.to_dict()
    values["model"] |= own
    config = config_from_dict(values, where=str(checkpoint))
    model = system(config.system).build(config)
    load_into(model, weights.state, checkpoint)
    return model, config, weights


def _settle(
    checkpoint: str | os.PathLike[str], given: Config | None, carried: dict | None
) -> Config:
    if carried is None:
        if given is None:
            raise InputError(
                f"{checkpoint}: it carries no configuration; give one (a run keeps its own in "
                "config.yaml beside its checkpoints)"
            )
        return given
    trained = config_from_dict(carried, where=str(checkpoint))
    if given is None:
        return trained
    if given.system != trained.system:
        raise InputError(
            f"{checkpoint}: trained as system {trained.system}; asked for {given.system}"
        )
    for key in trained.data.TRAINED_KEYS:
        asked, was = getattr(given.data, key), getattr(trained.data, key)
        if asked != was:
            raise InputError(f"{checkpoint}: trained with data.{key} {was}; asked for {asked}")
    return given
