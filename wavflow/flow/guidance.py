"""Classifier-free guidance: mixing predictions with and without conditions."""

from __future__ import annotations

import torch
from torch import Tensor

# What a step returns: the prediction, or predictions with and without conditions.
Output = Tensor | tuple[Tensor, Tensor]


def rescale_guidance(cond: Tensor, uncond: Tensor, weight: Tensor | float, share: float) -> Tensor:
    """The guided prediction with `share` of its standard deviation brought back to `cond`'s.

    Strong guidance makes sounds louder than any that was learned; this takes the gain back (Lin
    et al., arXiv 2305.08891, equations 15 and 16), for each clip over all its samples.

    Args:
        cond, uncond: (b n d) predictions with and without conditions.
        weight: guidance weight, a number or a 0-d tensor.
        share: 0 changes nothing, 1 gives the standard deviation of `cond`.

    Returns:
        The guided prediction (b n d), float32 at least.
    """
    cond, uncond = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (cond, uncond))
    guided = torch.lerp(uncond, cond, torch.as_tensor(weight).to(cond))
    gain = cond.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True).clamp_min(1e-12)
    return guided * torch.lerp(torch.ones_like(gain), gain, share)


def mix_guidance(predicted: Output, weight: float) -> Tensor:
    """The guided prediction (b n d), float32 at least, out of what a step returned.

    Args:
        predicted: the prediction, or the pair with and without conditions.
        weight: guidance weight, used for a pair alone.
    """
    cond, uncond = predicted if isinstance(predicted, tuple) else (predicted, None)
    cond = cond.to(torch.promote_types(cond.dtype, torch.float32))
    return cond if uncond is None else torch.lerp(uncond.to(cond), cond, weight)
