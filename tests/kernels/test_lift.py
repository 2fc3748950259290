"""Amplitude lifting and patchify against golden vectors of the public system."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.numerics import relative
from support.paths import GOLDEN

import wavflow_kernels as wk
from wavflow_kernels import _backend

CASES = [
    pytest.param(name, wave, vectors, id=name)
    for file in ("audio_lift", "edge_audio")
    for vectors in [load_file(GOLDEN / f"{file}.safetensors")]
    for key, wave in vectors.items()
    if key.startswith("wave.")
    for name in [key.removeprefix("wave.")]
]
BACKENDS = ["reference", *(["cpp"] if _backend.C is not None else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, wave, vectors", CASES)
def test_golden(
    name: str, wave: torch.Tensor, vectors: dict[str, torch.Tensor], backend: str
) -> None:
    lifted, tokens = vectors[f"lifted.{name}"], vectors[f"tokens200x3.{name}"]
    with wk.use_backend(backend):
        whole = wk.lift_patchify(wave[None], token_size=1, tokens=len(wave), audio_scale=1.0)
        cut = wk.lift_patchify(wave[None], token_size=200, tokens=len(tokens))
        joined = wk.unpatchify(cut, samples=min(len(wave), tokens.numel()))
    assert relative(whole.flatten(), lifted) < 1e-5
    assert relative(cut[0], tokens) < 1e-5
    assert relative(joined[0], lifted[: joined.shape[1]]) < 1e-5
