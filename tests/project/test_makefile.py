"""What `make` would run: it installs what a goal needs, once, and kernels for this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def planned(tmp_path: Path, goal: str, smi: str = "exit 9", **variables: str) -> str:
    """The commands for a goal where nothing is installed and nvidia-smi does this."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (tools / "nvidia-smi").chmod(0o755)
    given = [f"{name}={value}" for name, value in variables.items()]
    env = {k: v for k, v in os.environ.items() if k not in ("WAVFLOW_BUILD", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "-n", goal, f"VENV={tmp_path / 'venv'}", *given],
        cwd=ROOT,
        env={**env, "PATH": f"{tools}{os.pathsep}{env['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_installs_what_it_needs_and_development_the_rest(tmp_path: Path) -> None:
    demo, setup = planned(tmp_path, "demo", TRAIN="full"), planned(tmp_path, "setup")
    assert demo.count(" -e ") == setup.count(" -e ") == 1  # the kernels are built once
    assert '".[demo]"' in demo and "[dev]" not in demo and "--train full" in demo
    assert '".[demo]"' in setup and '"wavflow[dev]"' in setup


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU")
def test_kernels_for_gpus_are_built_where_one_is_seen_or_asked_for(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert f"WAVFLOW_BUILD={'cpu' if compiler else 'auto'} " in planned(tmp_path, "demo")
    assert "WAVFLOW_BUILD=auto " in planned(tmp_path, "demo", "echo GPU 0: H100")
    assert "WAVFLOW_BUILD=cuda " in planned(tmp_path, "demo", WAVFLOW_BUILD="cuda")
