"""`python -m wavflow_kernels.tools.aot` compiles kernels without a GPU and finds what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.paths import TESTS

from wavflow_kernels import REGISTRY
from wavflow_kernels.tools import sass
from wavflow_kernels.tools.aot import main
from wavflow_kernels.tools.offline import collect

TOYS = TESTS / "support/aot_toys.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own: Triton there must not be in its interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows and problems of both reports."""
    folder = tmp_path_factory.mktemp("aot")
    paths = [folder / "sm_90.json", folder / "others.json"]
    done = aot(str(TOYS), *map(str, paths))
    assert done.returncode == 1, done.stderr
    reports = [json.loads(path.read_text()) for path in paths]
    report = {key: reports[0][key] + reports[1][key] for key in ("kernels", "problems")}
    assert all(f"problem: {problem}" in done.stdout for problem in report["problems"])
    return report


def problems(toys: dict[str, Any], op: str) -> list[str]:
    return [problem for problem in toys["problems"] if f"toy_{op} (" in problem]


FAULTS = {
    "spill": ("product [N=128 ROWS=128 STEP=32 ", "instructions on local memory", 3),
    "float64": ("in_float64 [BLOCK=1024 ", "float64 instructions: ", 1),
    "small_tile": ("product [N=128 ROWS=16", "(found: HMMA)", 2),
    "by_sums": ("toy_by_sums (large, bfloat16", "no kernel multiplies matrices (tl.dot)", 1),
    "narrow": ("toy_narrow (large, bfloat16", "shifted loads x 2 bytes at a time", 1),
    "copied": ("toy_copied (large, bfloat16", "no kernel loads x: copied first?", 1),
    "narrow_copy": (
        "toy_narrow_copy (large, bfloat16",
        "shifted loads a tensor made by the launcher 2 bytes at a time",
        1,
    ),
    "shared_memory": ("product [N=128 ROWS=128 STEP=64 ", "bytes of shared memory, a block has", 3),
    "grid": ("toy_grid (large, bfloat16", "grid (1, 131072) of centre is beyond", 1),
    "broken": ("broken [BLOCK=1024 ", "Error: ", 1),
    "raises": ("toy_raises (large, bfloat16", "ValueError: no configuration", 1),
}


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_on_each_architecture_it_depends_on(
    toys: dict[str, Any], fault: str
) -> None:
    begin, end, architectures = FAULTS[fault]
    found = [problem for problem in problems(toys, fault) if end in problem]
    assert len(found) == architectures
    assert all(p.startswith(begin) and "\n" not in p for p in found), found


@needs_triton
@pytest.mark.parametrize("op", ["good_half", "good_bfloat16", "good_single_pass", "good_gather"])
def test_good_kernels_pass(toys: dict[str, Any], op: str) -> None:
    assert not problems(toys, op)


@needs_triton
@pytest.mark.parametrize(
    "architecture, tensor", [("sm_80", "HMMA"), ("sm_90a", "HGMMA"), ("sm_100a", "UTCHMMA")]
)
def test_rows_say_what_a_kernel_is(toys: dict[str, Any], architecture: str, tensor: str) -> None:
    (row,) = (
        row
        for row in toys["kernels"]
        if row["architecture"] == architecture and row["ops"] == ["toy_good_bfloat16"]
    )
    assert row["dtypes"] == ["bfloat16"] and row["constants"] == "N=128 ROWS=128 STEP=32"
    assert row["warps"] == 4 and row["stages"] == 2
    assert row["tensor"][tensor] > 0 and not row["local"] and not row["fp64"]
    assert 32 < row["registers"] <= 255 and row["shared"] >= 16384
    assert set(row["loads"]) == {"16"}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_command_line(capsys, monkeypatch) -> None:
    assert "wanted some of 80,90,100" in refused(capsys, "--arch", "75")
    assert "is no op with a Triton kernel" in refused(capsys, "--op", "flow_mix")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "(pip install 'triton>=3.6')" in refused(capsys)


@needs_triton
def test_the_interpreter_is_refused() -> None:
    done = aot("-m", "wavflow_kernels.tools.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1 is set" in done.stderr


@needs_triton
def test_float16_is_compiled_where_bfloat16_stands_for_it_not() -> None:
    found = {
        number: {call.dtype for call in collect(REGISTRY["swiglu"], number, {})}
        for number in (80, 90, 100)
    }
    float16 = {number for number, dtypes in found.items() if torch.float16 in dtypes}
    assert float16 == {90}
    assert all({torch.float32, torch.bfloat16} <= dtypes for dtypes in found.values())


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1,
	.param .u32 k_param_2
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	ld.param.b32 	%r9, [k_param_2];
	mul.wide.s32 	%rd3, %r9, 2;
	add.s64 	%rd4, %rd1, %rd3;
	// begin inline asm
	mov.u32 %r1, 0x0;
	@%p1 ld.global.L1::evict_first.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 16 ];
	// end inline asm
	ld.global.nc.b32 	%r5, [%rd2];
	mul.wide.s32 	%rd5, %r5, 2;
	add.s64 	%rd6, %rd1, %rd5;
$L__BB0_1:
	mov.b64 	%rd7, %rd8;
	@!%p2 cp.async.cg.shared.global [ %r7 + 0 ], [ %rd7 + 0 ], 0x10, %r8;
	@%p2 ld.global.b16 { %rs1 }, [ %rd6 + 0 ];
	add.s64 	%rd8, %rd7, 128;
	selp.b64 	%rd7, %rd1, %rd2, %p3;
	st.global.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };
}
"""


def test_loads_are_followed_to_the_parameters() -> None:
    loads = [(load.width, set(load.parameters)) for load in sass.global_loads(PTX)]
    assert loads == [(16, {0, 2}), (4, {1}), (16, {0, 1}), (2, {0})]


@pytest.mark.parametrize(
    "opcode, width",
    [
        ("LDG.E", "4"),
        ("LDG.E.U16.CONSTANT", "2"),
        ("LDG.E.64", "8"),
        ("LDG.E.128.CONSTANT", "16"),
        ("LDG.E.ENL2.256", "32"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "16"),
        ("LDGSTS.E.LTC128B", "4"),
        ("UTMALDG.2D", "TMA"),
    ],
)
def test_load_widths(opcode: str, width: str) -> None:
    code = sass.Code("k", "sm_90a")
    code.opcodes.update({opcode: 3, "LDGDEPBAR": 1, "STG.E.128": 1, "LDS.64": 1})
    assert code.loads == {width: 3}


@pytest.mark.parametrize(
    "opcode", ["DFMA", "DADD", "DMUL.RP", "DSETP.GTU.AND", "F2F.F32.F64", "F2F.F64.F32", "I2F.F64"]
)
def test_float64_instructions(opcode: str) -> None:
    code = sass.Code("k", "sm_80")
    code.opcodes.update({opcode: 2, "DEPBAR.LE": 1, "F2F.F16.F32": 1, "FADD": 1, "LDG.E.64": 1})
    assert code.fp64 == {opcode: 2}


SASS = """
arch = sm_90a
Resource usage:
 Function _ZN7wavflow3mixIdLb0EEEvNS_11FlowMixArgsE:
  REG:38 STACK:112 SHARED:72 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : _ZN7wavflow3mixIdLb0EEEvNS_11FlowMixArgsE
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe400078e00ff */
        /*0010*/              @!P0 BRA 0x100 ;                     /* 0x000000b000008947 */
        /*0020*/             @UPT STL.128 [R1], R4 ;               /* 0x000000b000008947 */
        /*0030*/              @P0 LDL R4, [R1+0x10] ;              /* 0x000000b000008947 */
"""


def test_cuobjdump_is_read() -> None:
    (code,) = sass.parse(SASS)
    assert code.architecture == "sm_90a"
    assert (code.registers, code.stack, code.shared, code.local) == (38, 112, 72, 2)
    assert code.opcodes == {"LDC": 1, "BRA": 1, "STL.128": 1, "LDL": 1}
    assert sass.demangled(code.name) == "void wavflow::mix<double, false>(wavflow::FlowMixArgs)"
