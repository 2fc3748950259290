"""A GPU machine has torch, triton and little else: the GPU tests and the model need no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

ABSENT = ("soundfile", "av", "omegaconf", "matplotlib", "soxr", "pyloudnorm", "sklearn", "psutil")
# As a plugin of pytest, or imported first, it makes those packages look as if not installed.
BLOCKER = f"""
import sys

class Blocker:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Blocker(finder) for finder in sys.meta_path]
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "blocker.py").write_text(BLOCKER, encoding="utf-8")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_gpu_tests_are_collected_without_the_optional_packages(tmp_path: Path) -> None:
    done = run(
        tmp_path, "-m", "pytest", "-p", "blocker", "-m", "gpu", "--collect-only", "-q", "tests"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_gpu.py::" in done.stdout
    assert "tests/kernels/test_ops.py::test_forward" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


def test_modules_are_imported_without_the_optional_packages(tmp_path: Path) -> None:
    kernels = "import blocker, wavflow_kernels.tools.tune, bench.run, bench.plot, bench.gpu"
    done = run(
        tmp_path, "-c", f"{kernels}; import wavflow.model.networks, wavflow.pipeline.sampler"
    )
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "import blocker, soundfile")
    assert done.returncode == 1 and "No module named 'soundfile'" in done.stderr


def test_a_picture_without_matplotlib_is_refused_in_one_line(tmp_path: Path) -> None:
    code = "import blocker, pathlib; from bench.plot import main; main(pathlib.Path('x.json'))"
    done = run(tmp_path, "-c", code)
    assert done.returncode == 2
    assert done.stderr == "bench.plot: matplotlib is not installed (pip install matplotlib)\n"
