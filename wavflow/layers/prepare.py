"""A network with weights prepared for inference: cast, joined and laid out once.

Preparing copies the large matrices: the copy does not follow later changes of the model. On a CPU
convolutions of width 3 (in float32 only the large ones) run by Winograd's F(2,3);
:func:`wavflow_kernels.prepare_conv` tells its error and times.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, TypeVar

import torch
from torch import nn


class Preparing(nn.Module):
    """A network whose layers can be prepared."""

    is_prepared = False  # True in a copy that prepare_inference made


Network = TypeVar("Network", bound=Preparing)
PREPARED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prepare_inference(model: Network, dtype: torch.dtype, *, winograd: bool = True) -> Network:
    """A copy of `model` without gradients, its matrices prepared for inputs of `dtype`.

    It shares no memory with the model, and in float32 on a CPU takes 1.2 times as much. Biases,
    norms and embeddings keep their dtypes. Off the CPU, where preparing is a cast, a model whose
    weights have the dtype already is returned itself.

    Args:
        model: the network; its layers with a method ``prepare`` are prepared.
        dtype: torch.bfloat16, torch.float16 or torch.float32: what autocast casts to where the copy
            runs, float32 for no autocast.
        winograd: whether Winograd's F(2,3) takes the convolutions that it can.

    Raises:
        ValueError: another dtype, in which plain weights are more exact; or a network that is
            prepared already.
    """
    if model.is_prepared:
        raise ValueError("the network is prepared already")
    if dtype not in PREPARED_DTYPES:
        wanted = ", ".join(map(str, PREPARED_DTYPES))
        raise ValueError(f"dtype is {dtype}, wanted one of {wanted}")
    weight = next(model.parameters())
    if weight.device.type != "cpu" and weight.dtype == dtype:
        return model
    parameters: dict[int, Any] = {id(p): p for p in model.parameters()}  # not copied just yet
    prepared = copy.deepcopy(model, parameters)
    _prepare(prepared, dtype, None if winograd else False)
    for module in prepared.modules():
        for name, left in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(left.detach().clone(), requires_grad=False))
    prepared.is_prepared = True
    return prepared.eval()


def _prepare(module: nn.Module, dtype: torch.dtype, winograd: bool | None) -> None:
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        return prepare(dtype, winograd)
    for child in module.children():
        _prepare(child, dtype, winograd)


class PreparedNetwork:
    """The prepared copy of a model, made at its first use; conditions keep one for their steps."""

    def __init__(self) -> None:
        self._made_of: tuple[Any, torch.dtype] | None = None
        self._network: Any = None

    def of(self, model: Network) -> Network:
        """The copy for the dtype that autocast asks for, else the weights'; or the model itself.

        The model itself runs in float64, with gradients, while torch.compile traces, and where
        :func:`prepare_inference` returns it.
        """
        weight = next(model.parameters())
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if dtype not in PREPARED_DTYPES or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return model
        made_of = weakref.ref(model), dtype
        if self._made_of != made_of:
            network = prepare_inference(model, dtype)
            if network is model:  # held by nothing here
                return model
            self._network, self._made_of = network, made_of
        return self._network

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedNetwork, ()  # copied and pickled empty
