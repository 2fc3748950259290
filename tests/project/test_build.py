"""The package as people install it: by pip, twice, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slow

UNOPTIMISED = "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1"
USE = (
    "import wavflow_kernels as wk, torch, wavflow, sys\n"
    "from wavflow.config.load import load_config\n"
    "from wavflow_kernels import _backend\n"
    "assert load_config('toy_8k').data.target_sample_rate == 8000\n"
    "assert wk.philox_normal(torch.arange(2), 3, 4).shape == (2, 3, 4)\n"
    "print(wk.__file__, _backend.C is not None)\n"
)


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, without what is built in this one."""
    copy = tmp_path_factory.mktemp("clone") / "wavflow"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "out", "*.so", "*.egg-info", ".*cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def install(tree: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """An ordinary isolated `pip install .` of this package alone; torch stays where it is."""
    return run(
        sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--upgrade",
        "--target", str(target), ".",
        cwd=tree, **environment,
    )  # fmt: skip


def use(target: Path, folder: Path) -> str:
    """Imports the installed package from another folder; returns what it prints."""
    # An editable install's finder would find the submodules that are missing here.
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n" + USE
    )
    done = run(sys.executable, "-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    return done.stdout


def files(folder: Path) -> set[Path]:
    """What both packages consist of, but for what is compiled."""
    return {
        path.relative_to(folder)
        for package in ("wavflow", "wavflow_kernels")
        for pattern in ("*.py", "*.yaml", "*.json", "*.safetensors")
        for path in (folder / package).rglob(pattern)
    }


def test_pip_install_twice_in_one_tree(tree: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "first", tmp_path / "second"):
        # How fast the kernels are is no matter here.
        done = install(tree, target, WAVFLOW_BUILD="cpu", CMAKE_ARGS=UNOPTIMISED)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "built the CPU kernels" in done.stdout + done.stderr
        assert use(target, tmp_path).split()[-1] == "True"
        assert files(target) == files(tree)


def test_without_a_compiler_it_is_pure_python_and_says_so(tree: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3", "sh", "env"):
        (tools / name).symlink_to(sys.executable if name == "python3" else shutil.which(name))
    target = tmp_path / "pure"
    done = install(tree, target, PATH=str(tools), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PURE PYTHON INSTALL" in done.stdout + done.stderr
    assert "no C++ compiler was found" in done.stdout + done.stderr
    assert use(target, tmp_path).split()[-1] == "False"


def test_an_unknown_build_is_an_error(tree: Path, tmp_path: Path) -> None:
    done = install(tree, tmp_path / "typo", WAVFLOW_BUILD="gpu")
    assert done.returncode
    assert "WAVFLOW_BUILD is 'gpu', wanted auto, none, cpu or cuda" in done.stdout + done.stderr


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="nvcc in its default place")
def test_cuda_asked_without_nvcc_is_an_error(tree: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "sh"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/false")
    done = install(tree, tmp_path / "cuda", WAVFLOW_BUILD="cuda", PATH=str(tools), CUDA_HOME="")
    assert done.returncode
    assert "WAVFLOW_BUILD=cuda needs nvcc" in done.stdout + done.stderr
