"""What the CPU can do is asked in one place, can be feigned lower, and changes no result."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.paths import PYTHONPATH, TESTS

import wavflow_kernels as wk
from wavflow.base import precision
from wavflow_kernels import cpu
from wavflow_kernels.__main__ import report

CPU = torch.device("cpu")
AVX2 = dict.fromkeys(("avx2", "fma3", "bmi2"), True)
AVX512 = AVX2 | dict.fromkeys([f"avx512_{x}" for x in ("f", "bw", "cd", "dq", "vl")], True)
# What torch's libraries are told, to be told the same as ours.
LIBRARIES = {
    "default": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
}
LOWER = cpu.LEVELS[: cpu.LEVELS.index(cpu.PROCESSOR) + 1]


@pytest.mark.parametrize(
    ("capabilities", "level"),
    [
        ({}, "default"),
        (AVX2, "avx2"),
        (AVX2 | {"fma3": False}, "default"),
        (AVX512, "avx512"),
        (AVX512 | {"avx512_dq": False, "avx512_bf16": True}, "avx2"),
        (AVX512 | {"avx512_bf16": True}, "avx512_bf16"),
        ({"architecture": "aarch64", "neon": True}, "default"),
    ],
)
def test_the_level_is_the_highest_with_everything_below(
    capabilities: dict[str, object], level: str
) -> None:
    assert cpu.of_processor(capabilities) == level


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("", "avx512_bf16"),
        ("ALL", "avx512_bf16"),
        ("SSE41", "default"),
        ("AVX", "default"),
        ("avx2", "avx2"),
        ("AVX2_VNNI_2", "avx2"),
        ("AVX512_CORE", "avx512"),
        ("AVX512_CORE_BF16", "avx512_bf16"),
        ("AVX512_CORE_AMX", "avx512_bf16"),
    ],
)
def test_onednns_own_limit_is_read(name: str, level: str) -> None:
    assert cpu.onednn_limit({"ONEDNN_MAX_CPU_ISA": name}) == level
    assert cpu.onednn_limit({"DNNL_MAX_CPU_ISA": name}) == level


def test_more_than_the_processor_has_cannot_be_feigned() -> None:
    assert cpu.checked("", "avx2", "X") == cpu.checked("avx2", "avx2", "X") == "avx2"
    with pytest.raises(ValueError, match="X is 'avx512', which this processor does not have; its"):
        cpu.checked("avx512", "avx2", "X")
    with pytest.raises(ValueError, match="X is 'sse9', wanted one of avx512_bf16, avx512, avx2, d"):
        cpu.checked("sse9", "avx2", "X")
    with pytest.raises(ValueError, match="feign is 'sse9'"), cpu.feign("sse9"):
        pass


def test_choices_follow_what_is_feigned() -> None:
    real, weight = cpu.current(), torch.randn(8, 8, 3)
    x = torch.randn(1, 4, 8).bfloat16()
    results = []
    for level in LOWER:
        with pytest.raises(KeyError), cpu.feign(level):
            assert cpu.current().level == cpu.current().onednn_level == level
            assert precision.has_fast_bf16(CPU) == (level == "avx512_bf16")
            by_itself = level.startswith("avx512")
            assert cpu.product_dtype(torch.bfloat16) == (
                torch.bfloat16 if by_itself else torch.float32
            )
            prepared = wk.prepare_conv(weight, dtype=torch.bfloat16)
            assert prepared.dtype == torch.bfloat16
            if prepared.packed:
                assert prepared.weights[0].dtype == cpu.product_dtype(torch.bfloat16)
            results.append(wk.conv1d(x, prepared).float())
            assert f"kernels {level}, oneDNN {level}, torch " in report()
            raise KeyError
        assert cpu.current() == real
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=2**-7, atol=2**-7)


def test_float16_and_wide_dtypes_are_computed_as_ever() -> None:
    for level in LOWER:
        with cpu.feign(level):
            assert cpu.product_dtype(torch.float16) == torch.float32
            for dtype in (torch.float32, torch.float64):
                assert cpu.product_dtype(dtype) == dtype


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_everything_runs_and_is_right_as_on_a_lesser_processor(level: str) -> None:
    """In a process whose torch, oneDNN and kernels all keep to the instructions of the level."""
    if level not in LOWER:
        pytest.skip(f"this processor has {cpu.PROCESSOR} alone")
    torchs, onednns = LIBRARIES[level]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "support/cpu_job.py"), level],
        env={
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "WAVFLOW_CPU_ISA": level,
            "ATEN_CPU_CAPABILITY": torchs,
            "ONEDNN_MAX_CPU_ISA": onednns,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.split()[-1] == "a_sampler_generates"
