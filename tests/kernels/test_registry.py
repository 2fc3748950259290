"""The registry's rules: one op, one stem; public functions; errors; choice of backend."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT

import wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend, cpu
from wavflow_kernels.__main__ import report
from wavflow_kernels._registry import by_name
from wavflow_kernels.ops import conv1d

PUBLIC = sorted(name for name, op in REGISTRY.items() if not op.internal)


def test_one_op_one_stem() -> None:
    """Each op has its files under one stem, and no file belongs to no op."""
    stems = {op.stem for op in REGISTRY.values()}
    names = {op.name.removesuffix("_backward").rstrip("_") for op in REGISTRY.values()}
    package = Path(wk.__file__).parent
    files = {
        "csrc/{}.h": {"bind", "args", "numeric", "random"},
        "csrc/cpu/{}.cpp": {"isa"},
        "csrc/cuda/{}.cu": {"launch"},
        "wavflow_kernels/_triton/{}.py": {"__init__", "launch"},
    }
    found = {}
    for pattern, common in files.items():
        folder = package.parent if pattern.startswith("wavflow_kernels") else ROOT
        found[pattern] = {p.stem for p in folder.glob(pattern.format("*"))} - common
        assert found[pattern] <= stems, f"{pattern}: {found[pattern] - stems} belong to no op"
    assert {p.stem for p in (package / "ops").glob("*.py")} - {"__init__"} == names
    for op in REGISTRY.values():
        wanted = ["wavflow_kernels/_triton/{}.py"] if "triton" in op.supported else []
        devices = op.supported.get("cpp", {})
        own = op.name != "conv_swiglu"  # which runs the kernels of conv1d and of swiglu
        wanted += ["csrc/{}.h", "csrc/cpu/{}.cpp"] if "cpu" in devices and own else []
        wanted += ["csrc/cuda/{}.cu"] if "cuda" in devices else []
        for pattern in wanted:
            assert op.stem in found[pattern], f"{op.name} has no {pattern}"


def test_an_op_takes_arguments_by_name() -> None:
    names = ("x", "scale", "flag")
    call = (1, 2, 3)
    assert by_name(lambda flag, x: (flag, x), names)(*call) == (3, 1)
    assert by_name(lambda scale, **rest: (scale, rest), names)(*call) == (2, {"x": 1, "flag": 3})
    assert by_name(lambda out, scale: (out, scale), names, own=1)(0, *call) == (0, 2)
    assert by_name(lambda x, *rest: rest, names)(*call) == (2, 3)
    with pytest.raises(TypeError, match="parameters .'shift'., wanted of x, scale, flag"):
        by_name(lambda shift: shift, names)


def test_no_file_imports_itself_by_way_of_others() -> None:
    package = Path(wk.__file__).parent
    files = {p.relative_to(package.parent).with_suffix("").parts: p for p in package.rglob("*.py")}
    files = {parts[:-1] if parts[-1] == "__init__" else parts: p for parts, p in files.items()}
    imports: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for parts, path in files.items():
        found = imports.setdefault(parts, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                up = node.level - (path.stem == "__init__")
                base = parts[: len(parts) - up] + tuple((node.module or "").split(".")) * bool(
                    node.module
                )
                for alias in node.names:
                    found.add((*base, alias.name) if (*base, alias.name) in files else base)
    for start in imports:
        seen, todo = set(), list(imports[start] - {start})
        while todo:
            at = todo.pop()
            assert at != start, f"{'.'.join(start)} is in a circle of imports"
            if at not in seen:
                seen.add(at)
                todo += imports.get(at, ())


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
W = torch.zeros(5, 4, 3)
Y = torch.zeros(2, 3, 5)

ROW = torch.zeros(2, 1, 4)


def rows(*index: int) -> wk.TokenRows:
    return wk.token_rows(torch.tensor(index, dtype=torch.int64), 3)


def qkv(*widths: int, heads: int = 2, d: int = 4, rows: int | None = None, **changes: Any) -> Any:
    """qkv_rope on streams of 3 tokens and these widths, with some arguments changed."""
    arguments = {
        "qkv": [torch.zeros(2, 3, width) for width in widths],
        "q_weight": [torch.ones(d) for _ in widths],
        "k_weight": [torch.ones(d) for _ in widths],
        "rope": torch.zeros(3 * len(widths) if rows is None else rows, d),
    }
    return wk.qkv_rope(**{**arguments, **changes}, heads=heads)


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
    "lift_patchify: levels must have shape (b, 2) with b = 2": lambda: lift(levels=X[0, :, :2]),
    "lift_patchify: levels must be float32, got float64": lambda: lift(levels=X[:, 0, :2].double()),
    "lift_patchify: out_dtype must be": lambda: lift(WAVE.double(), out_dtype=torch.bfloat16),
    "unpatchify: tokens must have shape": lambda: wk.unpatchify(WAVE),
    "unpatchify: samples must lie in [1, 12], got 13": lambda: wk.unpatchify(X, samples=13),
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
    "qkv_rope: the first argument must be a tensor, got list": lambda: qkv(),
    "qkv_rope: qkv[0] must be 3 or 2 x 2 heads x d = 4 wide, got 25": lambda: qkv(25),
    "qkv_rope: qkv[0] must supply queries, got 16 channels": lambda: qkv(16, 24),
    "qkv_rope: streams without queries must come last, got qkv[2]": lambda: qkv(24, 16, 24),
    "qkv_rope: qkv[1] must have shape (b, n1, c1) with b = 2, got (1, 3, 24)": lambda: qkv(
        24, 24, qkv=[torch.zeros(2, 3, 24), torch.zeros(1, 3, 24)]
    ),
    "qkv_rope: qkv[0] must hold at least one token, got none": lambda: qkv(
        24, qkv=[torch.zeros(2, 0, 24)], rows=0
    ),
    "qkv_rope: qkv[1] must be float32, got bfloat16": lambda: qkv(
        24, 24, qkv=[torch.zeros(2, 3, 24), torch.zeros(2, 3, 24).bfloat16()]
    ),
    "qkv_rope: qkv[0] must be float32, float64, bfloat16, float16, got int64": lambda: qkv(
        24, qkv=[torch.zeros(2, 3, 24).long()]
    ),
    "qkv_rope: q_weight must hold one tensor for each of the 2 streams, got 1": lambda: qkv(
        24, 24, q_weight=[torch.ones(4)]
    ),
    "qkv_rope: k_weight[0] must have shape (d) with d = 4, got (6,)": lambda: qkv(
        24, k_weight=[torch.ones(6)]
    ),
    "qkv_rope: k_weight[0] must be float32, got bfloat16": lambda: qkv(
        24, k_weight=[torch.ones(4).bfloat16()]
    ),
    "qkv_rope: rope must have a row for each of the 6 tokens, got 5": lambda: qkv(24, 24, rows=5),
    "qkv_rope: rope must be float32, got float64": lambda: qkv(
        24, rope=torch.zeros(3, 4, dtype=torch.float64)
    ),
    "qkv_rope: rope is on meta, wanted cpu": lambda: qkv(24, rope=torch.zeros(3, 4, device="meta")),
    "qkv_rope: d must be even and positive, got 3": lambda: qkv(18, d=3),
    "qkv_rope: heads must be positive, got 0": lambda: qkv(24, heads=0),
    "rope_table: tokens must be positive, got 0": lambda: wk.rope_table(0, 4),
    "rope_table: head_dim must be even and positive, got 5": lambda: wk.rope_table(3, 5),
    "token_rows: index[2] is 3, wanted a row in [0, 3)": lambda: rows(0, 1, 3),
    "token_rows: index[0] is -1, wanted a row in [0, 3)": lambda: rows(-1, 1, 1),
    "token_rows: index must not decrease, got 0 at 2 after 1": lambda: rows(0, 1, 0),
    "token_rows: index must be int32, int64, got float32": lambda: wk.token_rows(T, 3),
    "token_rows: index must have shape (n), got (2, 3, 4)": lambda: wk.token_rows(X.long(), 3),
    "token_rows: index must hold at least one token": lambda: rows(),
    "token_rows: rows must be positive, got 0": lambda: wk.token_rows(INDEX, 0),
    "adaln: x must have shape (b, n, c), got (2,)": lambda: wk.adaln(T, X, X),
    "adaln: x must be float32": lambda: wk.adaln(X.long(), X, X),
    "adaln: x must hold at least one token": lambda: wk.adaln(X[:, :0], ROW, ROW),
    "adaln: x must have 1 to 8192 channels, got 8193": lambda: wk.adaln(
        *(torch.zeros(1, 1, 8193),) * 3
    ),
    "adaln: x must have 1 to 8192 channels, got 0": lambda: wk.adaln(
        X[..., :0], ROW[..., :0], ROW[..., :0]
    ),
    "adaln: eps must be positive, got -1.0": lambda: wk.adaln(X, ROW, ROW, eps=-1.0),
    "adaln: shift must have shape (b, r, c) with b = 2, got (1, 1, 4)": (
        lambda: wk.adaln(X, ROW[:1], ROW)
    ),
    "adaln: scale must have shape (b, r, c) with r = 1": lambda: wk.adaln(X, ROW, X),
    "adaln: scale must be float32, got float64": lambda: wk.adaln(X, ROW, ROW.double()),
    "adaln: shift is on meta, wanted cpu": lambda: wk.adaln(X, ROW.to("meta"), ROW),
    "adaln: without rows there must be one row for all tokens, got 3": lambda: wk.adaln(X, X, X),
    "adaln: rows.index must have shape (n) with n = 3, got (2,)": (
        lambda: wk.adaln(X, X, X, rows(0, 1))
    ),
    "adaln: rows.offsets must have 2 elements for 1 rows, got 4": (
        lambda: wk.adaln(X, ROW, ROW, rows(0, 1, 2))
    ),
    "adaln: rows.index must be int32, got int64": lambda: wk.adaln(
        X, X, X, wk.TokenRows(rows(0, 1, 2).index.long(), rows(0, 1, 2).offsets)
    ),
    "gated_residual_adaln: y must have shape (b, n, c) with n = 3": (
        lambda: wk.gated_residual_adaln(X, X[:, :2], ROW, None, ROW, ROW)
    ),
    "gated_residual_adaln: gate must be float32, got bfloat16": (
        lambda: wk.gated_residual_adaln(X, X, ROW.bfloat16(), None, ROW, ROW)
    ),
    "gated_residual_adaln: without gate_rows there must be one row for all tokens, got 3": (
        lambda: wk.gated_residual_adaln(X, X, X, None, ROW, ROW)
    ),
    "gated_residual_adaln: gate_rows.offsets must have 2 elements for 1 rows, got 4": (
        lambda: wk.gated_residual_adaln(X, X, ROW, rows(0, 1, 2), ROW, ROW)
    ),
    "conv1d: x must have shape (b, n, c), got (2, 12)": lambda: wk.conv1d(WAVE, W),
    "conv1d: weight must have shape (o, c, k) with c = 4, got (5, 3, 3)": lambda: wk.conv1d(
        X, W[:, :3]
    ),
    "conv1d: weight must be float32, got bfloat16": lambda: wk.conv1d(X, W.bfloat16()),
    "conv1d: weight is on meta, wanted cpu": lambda: wk.conv1d(X, W.to("meta")),
    "conv1d: weight must be a tensor, got list": lambda: wk.conv1d(X, [W]),
    "conv1d: the width of the weight must be odd, got 2": lambda: wk.conv1d(X, W[..., :2]),
    "conv1d: there must be at least one of the tokens, got none": lambda: wk.conv1d(X[:, :0], W),
    "conv1d: bias must have shape (o) with o = 5, got (2,)": lambda: wk.conv1d(X, W, T),
    "conv1d: activation must be None or 'selu', got 'relu'": lambda: wk.conv1d(
        X, W, activation="relu"
    ),
    "conv1d: residual must have shape (b, n, o) with o = 5, got (2, 3, 4)": lambda: wk.conv1d(
        X, W, residual=X
    ),
    "conv1d: an activation and a residual exclude each other": lambda: wk.conv1d(
        X, W, activation="selu", residual=Y
    ),
    "conv1d: a gate needs a residual": lambda: wk.conv1d(X, W, gate=Y),
    "conv1d: gate must have one row where no gate_rows are given, got 3": lambda: wk.conv1d(
        X, W, residual=Y, gate=Y
    ),
    "conv1d: gate_rows must be TokenRows, got Tensor": lambda: wk.conv1d(
        X, W, residual=Y, gate=Y, gate_rows=INDEX
    ),
    "conv1d: gate_index must be int32, got int64": lambda: conv1d.OP(
        X, W, None, False, Y, Y, torch.arange(3)
    ),
    "conv1d: weight was prepared for conv_swiglu": lambda: wk.conv1d(X, wk.prepare_conv([W, W])),
    "conv_swiglu: w3 must have shape (o, c, k) with k = 3, got (5, 4, 1)": lambda: wk.conv_swiglu(
        X, W, W[..., :1]
    ),
    "conv_swiglu: w3 must be float32, got float64": lambda: wk.conv_swiglu(X, W, W.double()),
    "conv_swiglu: there must be at least one of the tokens": lambda: wk.conv_swiglu(X[:, :0], W, W),
    "conv_swiglu: [w1, w3] must be prepared together": lambda: wk.conv_swiglu(
        X, wk.prepare_conv(W), W
    ),
    "prepare_conv: Winograd needs width 3, got 1": lambda: wk.prepare_conv(
        W[..., :1], winograd=True
    ),
    "prepare_conv: weight must be one tensor or [w1, w3], got 3": lambda: wk.prepare_conv([W] * 3),
    "prepare_conv: the width of the weight must be odd, got 2": lambda: wk.prepare_conv(W[..., :2]),
    "prepare_conv: dtype must be a float dtype, got torch.int64": lambda: wk.prepare_conv(
        W, dtype=torch.int64
    ),
    "prepare_conv: w3 must have shape (o, c, k) with o = 5, got (4, 4, 3)": lambda: wk.prepare_conv(
        [W, W[:4]]
    ),
    "swiglu: b must have shape (b, n, i) with n = 3, got (2, 2, 4)": lambda: wk.swiglu(X, X[:, :2]),
    "swiglu: b must be float32, got float16": lambda: wk.swiglu(X, X.half()),
    "swiglu: a must be float32, float64, bfloat16, float16, got int64": lambda: wk.swiglu(
        X.long(), X
    ),
    "swiglu: there must be at least one of the channels": lambda: wk.swiglu(X[..., :0], X[..., :0]),
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
    "rope_attention: the window's size must be at least 0, got -1": lambda: wk.rope_attention(
        Q, Q, Q, window=wk.AttentionWindow(-1, 5)
    ),
    "rope_attention: local must lie in [1, 5], got 6": lambda: wk.rope_attention(
        Q, Q, Q, window=wk.AttentionWindow(1, 6)
    ),
    "rope_attention: spread must lie in [0, 2], got 3": lambda: wk.rope_attention(
        Q, Q, Q, window=wk.AttentionWindow(1, 3, 3)
    ),
    "rope_attention: local must lie in [1, 5], got 0": lambda: wk.rope_attention(
        Q, Q, Q, window=wk.AttentionWindow(1, 0)
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


@pytest.mark.compiled
def test_no_gradient_where_none_exists() -> None:
    table = torch.zeros(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient with respect to table"):
        wk.ode_step(X[None], X, table, INDEX)
    with pytest.raises(RuntimeError, match="no gradient with respect to t"):
        wk.flow_loss(X, X, T.clone().requires_grad_()).sum().backward()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "WAVFLOW_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
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
    """But for matrix products, whose sums are as wide as the vectors, and the gate behind them."""
    code = (
        "import sys, torch, hashlib, wavflow_kernels as wk\n"
        "digest = hashlib.sha256()\n"
        "for op in wk.REGISTRY.values():\n"
        "    if op.tolerance == 'matrix' or 'swiglu' in op.name: continue\n"
        "    kinds = 'float32 float64 bfloat16 float16'.split()\n"
        "    every = [op.samples(torch.device('cpu'), getattr(torch, k), 3) for k in kinds]\n"
        "    for sample in sum(map(list, every), []):\n"
        "        args = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]\n"
        "        out = op(*args)\n"
        "        out = op.mutated(args) if op.mutates else out\n"
        "        for x in out if isinstance(out, (tuple, list)) else [out]:\n"
        "            digest.update(x.double().numpy().tobytes())\n"
        "print(digest.hexdigest())"
    )
    best = cpu.current().level
    names = cpu.LEVELS
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


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_is_traced_in_one_graph(backend: str | None) -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(16, 8)
    compiled = torch.compile(lambda x: wk.conv1d(x, weight), fullgraph=True, backend="eager")
    with wk.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(x), wk.conv1d(x, weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
