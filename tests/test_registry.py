"""The registry's rules: one op, one stem; public functions; errors; choice of backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend
from wavflow_kernels.__main__ import report

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = sorted(name for name, op in REGISTRY.items() if not op.internal)


def stem(name: str) -> str:
    return name.rstrip("_").removesuffix("_backward")


def test_one_op_one_stem() -> None:
    """Each op has its files under one stem, and no file belongs to no op."""
    stems = {stem(name) for name in REGISTRY}
    package = Path(wk.__file__).parent
    files = {
        "csrc/{}.h": {"bind", "check", "math"},
        "csrc/cpu/{}.cpp": set(),
        "csrc/cuda/{}.cu": {"launch"},
        "wavflow_kernels/ops/{}.py": {"__init__"},
        "wavflow_kernels/_triton/{}.py": {"__init__", "launch"},
    }
    found = {}
    for pattern, common in files.items():
        folder = package.parent if pattern.startswith("wavflow_kernels") else ROOT
        found[pattern] = {p.stem for p in folder.glob(pattern.format("*"))} - common
        assert found[pattern] <= stems, f"{pattern}: {found[pattern] - stems} belong to no op"
    assert found["wavflow_kernels/ops/{}.py"] == stems
    for op in REGISTRY.values():
        wanted = ["wavflow_kernels/_triton/{}.py"] if "triton" in op.supported else []
        devices = op.supported.get("cpp", {})
        wanted += ["csrc/{}.h", "csrc/cpu/{}.cpp"] if "cpu" in devices else []
        wanted += ["csrc/cuda/{}.cu"] if "cuda" in devices else []
        for pattern in wanted:
            assert stem(op.name) in found[pattern], f"{op.name} has no {pattern}"


def test_public_functions() -> None:
    exported = set(wk.__all__)
    assert set(PUBLIC) <= exported
    for name in exported - {"REGISTRY", "BackendError"}:
        assert getattr(wk, name).__doc__, f"{name} has no docstring"


def test_specs_are_complete() -> None:
    for op in REGISTRY.values():
        for sample in op.samples(torch.device("cpu"), torch.float32, 0):
            assert op.bytes(*sample.args) >= 0
            assert op.flops(*sample.args) >= 0
        if op.backward and not op.internal:
            assert any(s.differentiable for s in op.samples(torch.device("cpu"), torch.float32, 0))


def test_report_names_every_op() -> None:
    text = report()
    for name in PUBLIC:
        assert name in text
    assert "CPU kernels" in text or "absent" in text


X = torch.zeros(2, 3, 4)
T = torch.zeros(2)
INDEX = torch.zeros(1, dtype=torch.int64)
WAVE = torch.zeros(2, 12)


def lift(wave: Any = WAVE, lengths: Any = None, **sizes: Any) -> Any:
    return wk.lift_patchify(wave, lengths, **{"token_size": 4, "tokens": 3, **sizes})


Q = torch.zeros(2, 3, 5, 4)
D = torch.ones(4)

BAD_CALLS = {
    "lift_patchify: wave must have shape (b, t), got (2, 3, 4)": lambda: lift(X),
    "lift_patchify: wave must hold at least 1 sample": lambda: lift(WAVE[:, :0]),
    "lift_patchify: wave must be float32": lambda: lift(WAVE.long()),
    "lift_patchify: the first argument must be a tensor, got list": lambda: lift([1.0]),
    "lift_patchify: token_size must be positive, got 0": lambda: lift(token_size=0),
    "lift_patchify: tokens must be positive, got -1": lambda: lift(tokens=-1),
    "lift_patchify: lengths must have shape (b) with b = 2": lambda: lift(lengths=T[:1].long()),
    "lift_patchify: lengths must be int64, got float32": lambda: lift(lengths=T),
    "lift_patchify: out_dtype must be": lambda: lift(WAVE.double(), out_dtype=torch.bfloat16),
    "unpatchify: tokens must have shape": lambda: wk.unpatchify(WAVE),
    "unpatchify: samples must lie in [1, 12], got 13": lambda: wk.unpatchify(X, samples=13),
    "unpatchify: hop needs windows": lambda: wk.unpatchify(X, hop=2),
    "unpatchify: hop must be at most the window's 3 tokens, got 4": lambda: wk.unpatchify(
        torch.zeros(1, 2, 3, 4), hop=4
    ),
    "unpatchify: window must have shape (n) with n = 3, got (2,)": lambda: wk.unpatchify(
        torch.zeros(1, 2, 3, 4), hop=2, window=torch.ones(2)
    ),
    "flow_mix: t must have shape (b) with b = 2, got (3,)": lambda: wk.flow_mix(
        X, torch.zeros(3), noise=X
    ),
    "flow_mix: exactly one of noise and seeds must be given, got neither": lambda: wk.flow_mix(
        X, T
    ),
    "flow_mix: noise must be float32, got float64": lambda: wk.flow_mix(X, T, noise=X.double()),
    "flow_mix: seeds must be int64": lambda: wk.flow_mix(X, T, seeds=T),
    "flow_mix: x_1 must hold at least one token": lambda: wk.flow_mix(X[:, :0], T, noise=X[:, :0]),
    "flow_mix: noise is on meta, wanted cpu": lambda: wk.flow_mix(X, T, noise=X.to("meta")),
    "flow_loss: prediction and loss must each be 'x' or 'v', got 'e' and 'v'": (
        lambda: wk.flow_loss(X, X, T, prediction="e")
    ),
    "flow_loss: x_t must be given": lambda: wk.flow_loss(X, X, T, prediction="v", loss="x"),
    "flow_loss: x_0 must be given": lambda: wk.flow_loss(X, X, T, prediction="v", loss="v"),
    "flow_loss: x_1 must have shape (b, n, d) with n = 3": lambda: wk.flow_loss(X, X[:, :2], T),
    "flow_loss: x_1 must be float32, got bfloat16": lambda: wk.flow_loss(X, X.bfloat16(), T),
    "ode_step: state must have 1 to 3 slots, got 4": lambda: wk.ode_step(
        torch.zeros(4, 2, 3, 4), X, torch.zeros(1, 22), INDEX
    ),
    "ode_step: rows of table must hold t, w and 1 x 2 coefficients = 4 numbers, got 5": (
        lambda: wk.ode_step(X[None], X, torch.zeros(1, 5), INDEX)
    ),
    "ode_step: index is 1, table has 1 rows": lambda: wk.ode_step(
        X[None], X, torch.zeros(1, 4), INDEX + 1
    ),
    "ode_step: index is -1": lambda: wk.ode_step(X[None], X, torch.zeros(1, 4), INDEX - 1),
    "ode_step: a torch.float64 pred needs a torch.float64 state": lambda: wk.ode_step(
        X[None], X.double(), torch.zeros(1, 4), INDEX
    ),
    "ode_step_: state must be contiguous": lambda: wk.ode_step_(
        torch.zeros(1, 2, 4, 3).transpose(2, 3), X, torch.zeros(1, 4), INDEX.clone()
    ),
    "rope_attention: q must have shape (b, h, nq, d), got (2, 3, 4)": lambda: wk.rope_attention(
        X, Q, Q
    ),
    "rope_attention: v must have shape (b, h, n, d) with n = 5, got (2, 3, 4, 4)": (
        lambda: wk.rope_attention(Q, Q, Q[:, :, 1:])
    ),
    "rope_attention: k must be a tensor, got NoneType": lambda: wk.rope_attention(Q, None, Q),
    "rope_attention: k is on meta, wanted cpu": lambda: wk.rope_attention(Q, Q.to("meta"), Q),
    "rope_attention: q must be float32, float64, bfloat16, float16, got int64": (
        lambda: wk.rope_attention(Q.long(), Q.long(), Q.long())
    ),
    "rope_attention: k must be float32, got bfloat16": lambda: wk.rope_attention(
        Q, Q.bfloat16(), Q
    ),
    "rope_attention: q_weight must be float32, got bfloat16": lambda: wk.rope_attention(
        Q, Q, Q, q_weight=D.bfloat16(), k_weight=D
    ),
    "rope_attention: q_weight and k_weight must be given together": lambda: wk.rope_attention(
        Q, Q, Q, k_weight=D
    ),
    "rope_attention: rope needs the norm weights, got rope alone": lambda: wk.rope_attention(
        Q, Q, Q, rope=Q[0, 0]
    ),
    "rope_attention: rope must have shape (n, d) with n = 5, got (4, 4)": (
        lambda: wk.rope_attention(Q, Q, Q, q_weight=D, k_weight=D, rope=Q[0, 0, 1:])
    ),
    "rope_attention: there must be at least one of the queries, got none": (
        lambda: wk.rope_attention(Q[:, :, :0], Q, Q)
    ),
    "rope_attention: there must be at least one of the keys, got none": (
        lambda: wk.rope_attention(Q, Q[:, :, :0], Q[:, :, :0])
    ),
    "rope_attention: d must be even, got 3": lambda: wk.rope_attention(*(Q[..., :3],) * 3),
    "rope_attention: q has 5 tokens, k only 4": lambda: wk.rope_attention(
        Q, Q[:, :, 1:], Q[:, :, 1:]
    ),
    "rope_attention: window must be at least 0, got -2": lambda: wk.rope_attention(
        Q, Q, Q, window=-2
    ),
    "rope_attention: local must lie in [0, 5], got 6": lambda: wk.rope_attention(
        Q, Q, Q, window=1, local=6
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_bad_arguments(message: str, backend: str | None) -> None:
    with (
        wk.use_backend(backend),
        pytest.raises((ValueError, TypeError), match=re.escape(message)) as error,
    ):
        BAD_CALLS[message]()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(_backend.C is None, reason="the compiled kernels check what they read")
@pytest.mark.parametrize("length", [0, 13])
def test_lengths_out_of_range(length: int) -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in \[1, 12\]"):
        lift(lengths=torch.tensor([1, length]))


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="use_backend is 'fast', wanted one of cpp"),
        wk.use_backend("fast"),
    ):
        pass


def test_a_choice_that_cannot_be_met_says_why() -> None:
    with (
        wk.use_backend("triton"),
        pytest.raises(wk.BackendError, match="flow_loss has no triton kernel.*reference: runs"),
    ):
        wk.flow_loss(X, X, T)


def test_no_gradient_where_none_exists() -> None:
    table = torch.zeros(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient with respect to table"):
        wk.ode_step(X[None], X, table, INDEX)
    with pytest.raises(RuntimeError, match="no gradient with respect to t"):
        wk.flow_loss(X, X, T.clone().requires_grad_()).sum().backward()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


MIX = "import torch, wavflow_kernels as wk; print(wk.philox_normal(torch.arange(9), 60, 700).sum())"


def test_environment_chooses_backend_and_refuses_unknown_names() -> None:
    done = python(MIX, WAVFLOW_BACKEND="quick")
    assert done.returncode and "WAVFLOW_BACKEND is 'quick', wanted one of" in done.stderr
    done = python("import wavflow_kernels as wk; " + MIX, WAVFLOW_BACKEND="reference")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(_backend.C is None, reason="no compiled kernels")
def test_every_instruction_set_gives_the_same_bits() -> None:
    """But for matrix products, whose sums are as wide as the vectors."""
    code = (
        "import sys, torch, hashlib, wavflow_kernels as wk\n"
        "digest = hashlib.sha256()\n"
        "for op in wk.REGISTRY.values():\n"
        "    if op.tolerance == 'matrix': continue\n"
        "    for sample in op.samples(torch.device('cpu'), torch.float32, 3):\n"
        "        args = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]\n"
        "        out = op(*args)\n"
        "        out = op.mutated(args) if op.mutates else out\n"
        "        for x in out if isinstance(out, (tuple, list)) else [out]:\n"
        "            digest.update(x.float().numpy().tobytes())\n"
        "print(digest.hexdigest())"
    )
    best = _backend.ISA
    names = ("default", "avx2", "avx512")
    runs = [python(code, WAVFLOW_CPU_ISA=i) for i in names[: names.index(best) + 1]]
    assert all(r.returncode == 0 for r in runs), [r.stderr for r in runs]
    assert len({r.stdout for r in runs}) == 1
    done = python(code, WAVFLOW_CPU_ISA="sse9")
    assert done.returncode and "WAVFLOW_CPU_ISA is 'sse9'" in done.stderr


def test_without_the_extension_the_ops_run() -> None:
    """A pure-Python install: one log line an op, the reference's numbers."""
    code = "import sys; sys.modules['wavflow_kernels._C'] = None\n" + MIX
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == python(MIX).stdout
    assert "the compiled extension is absent" in done.stderr
