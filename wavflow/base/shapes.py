"""Shape checks of public arguments."""

from __future__ import annotations

from torch import Tensor


def check_shape(argument: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Raises ValueError naming ``argument``, its shape and the wanted one unless they agree.

    A string in ``wanted`` names a size that may be anything.
    """
    fits = tensor.dim() == len(wanted) and all(
        isinstance(want, str) or size == want
        for size, want in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        shape = ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)}, wanted ({shape})")
