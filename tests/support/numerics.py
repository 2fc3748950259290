"""How far a result may lie from the truth. Every tolerance of the op tests lives here.

The truth is the reference in float64 on the same inputs. A result in a dtype cannot be nearer than
the truth rounded once to that dtype, so the bound is 1.25 times that rounding error plus a few
units of the precision the op computes in (float32, or float64 for float64).

Matrix products round their half-precision inputs on the way: there the yardstick is the error of
the reference run in the same dtype, called the peer.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from wavflow_kernels import _backend

# Units of computed precision, relative to the largest element of the truth.
SLACK = {"exact": 0.0, "single_pass": 4.0, "reduction": 16.0}


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def to_float64(value: Any) -> Any:
    """Float tensors and float dtypes become float64; everything else stays."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, (tuple, list)):
        return type(value)(to_float64(v) for v in value)
    return value


def excess(actual: Tensor, truth: Tensor, tolerance: str) -> float:
    """Error over allowed error: at most 1 is within the tolerance. NaN and Inf must agree."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    if not actual.numel():
        return 0.0
    truth = truth.double()
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual.double(), truth) else float("inf")
    if not torch.equal(actual.isfinite(), truth.isfinite()):
        return float("inf")
    error = (actual.double() - truth).nan_to_num()
    rounding = (truth.to(actual.dtype).double() - truth).nan_to_num()
    computed = eps(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    slack = SLACK[tolerance] * computed * truth.nan_to_num().abs().max()
    # The largest element may err by its own rounding anywhere: half an ulp of the largest truth.
    largest = 1.25 * max(
        rounding.abs().max(), eps(actual.dtype) / 4 * truth.nan_to_num().abs().max()
    )
    tiny = torch.finfo(actual.dtype).smallest_normal
    worst = error.abs().max() / (largest + slack + tiny)
    norm = error.norm() / (1.25 * rounding.norm() + slack * actual.numel() ** 0.5 + tiny)
    return float(max(worst, norm))


def excess_over_peer(actual: Tensor, truth: Tensor, peer: Tensor) -> float:
    """Error of a matrix product over what is allowed: 1.25 times the peer's in norm, 2 at worst.

    The peer's error is one draw of rounding errors. Norms of two draws of n elements differ by
    1 / sqrt(n) of themselves (one standard deviation); three of them are allowed on top.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    if not actual.numel():
        return 0.0
    truth = truth.double()
    if not torch.equal(actual.isfinite(), truth.isfinite()):
        return float("inf")
    error, usual = ((x.double() - truth).nan_to_num() for x in (actual, peer))
    # In float64 the peer is the truth itself: only the slack speaks.
    slack = 64 * eps(torch.float64) if actual.dtype == torch.float64 else 4 * eps(torch.float32)
    size, tiny = truth.nan_to_num(), torch.finfo(actual.dtype).smallest_normal
    luck = 1 + 3 / actual.numel() ** 0.5
    norm = error.norm() / (1.25 * luck * usual.norm() + slack * size.norm() + tiny)
    rounding = eps(actual.dtype) / 2 * size.abs().max()
    worst = error.abs().max() / (
        2 * usual.abs().max() + rounding + 4 * slack * size.abs().max() + tiny
    )
    return float(max(worst, norm))


def assert_close(
    actual: Any, truth: Any, tolerance: str, what: str = "result", peer: Any = None
) -> None:
    """Fail unless each tensor of `actual` is within the tolerance class of `truth` (float64).

    peer: the reference's results in the dtype of `actual`; needed with the class "matrix".
    """
    actual, truth, peer = (
        list(x) if isinstance(x, (tuple, list)) else [x] for x in (actual, truth, peer)
    )
    assert len(actual) == len(truth), f"{what}: {len(actual)} tensors, wanted {len(truth)}"
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        if t is None:
            assert a is None, f"{what} {i}: wanted None"
            continue
        ratio = (
            excess_over_peer(a, t, peer[i]) if tolerance == "matrix" else excess(a, t, tolerance)
        )
        assert ratio <= 1, f"{what} {i} ({a.dtype}): {ratio:.3g} times the allowed error"


def relative(actual: Tensor, truth: Tensor) -> float:
    """norm(actual - truth) / norm(truth), in float64."""
    actual, truth = actual.double(), truth.double()
    return float((actual - truth).norm() / truth.norm().clamp_min(1e-300))


def assert_recorded(
    actual: Tensor, recorded: Tensor, exact: Tensor, plain: Tensor, tolerance: float
) -> None:
    """A float32 result of many steps against one that was recorded on another processor.

    The recorded one is off the exact one by float32's rounding in its processor's order of sums,
    and so is every other. So what is computed is compared in float64, and how well in float32, with
    the reference's on the same processor: at most 1.25 times its error, as a matrix product's.

    exact, plain: the same run in float64, and by the references in float32.
    """
    assert relative(exact, recorded) < tolerance, "another result than the recorded one"
    allowed = max(tolerance, 1.25 * relative(plain, exact))
    error = relative(actual, exact)
    assert error < allowed, f"error {error:.3g}, allowed are {allowed:.3g}"


DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])

BACKEND = st.sampled_from(["cpp", "reference"] if _backend.C is not None else ["reference"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def filters(o: int, c: int, k: int, seed: int = 5) -> Tensor:
    return normal(o, c, k, seed=seed) * (c * k) ** -0.5
