"""Builds wavflow_kernels._C with CMake. WAVFLOW_BUILD = auto | none | cpu | cuda (docs/install.md).

CMakeLists.txt alone holds sources and flags; this file decides what to build and reports it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def say(message):
    print(f"wavflow: {message}", file=sys.stderr, flush=True)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_compiler():
    return os.environ.get("CXX") or next(
        (c for c in ("c++", "g++", "clang++") if shutil.which(c)), None
    )


def parallel_jobs():
    """As many as there are cores, at most one for every 2 GiB of memory."""
    cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return cores
    return max(1, min(cores, memory // 2**31))


class CMakeBuild(build_ext):
    def run(self):
        mode = os.environ.get("WAVFLOW_BUILD", "auto")
        if mode not in ("auto", "none", "cpu", "cuda"):
            raise SystemExit(f"wavflow: WAVFLOW_BUILD is '{mode}', wanted auto, none, cpu or cuda")
        nvcc = find_nvcc() if mode in ("auto", "cuda") else None
        if mode == "none":
            return self.pure("WAVFLOW_BUILD=none")
        if find_compiler() is None:
            if mode == "auto":
                return self.pure("no C++ compiler was found (c++, g++, clang++ or $CXX)")
            raise SystemExit(f"wavflow: WAVFLOW_BUILD={mode} needs a C++ compiler (g++ or clang++)")
        if mode == "cuda" and nvcc is None:
            raise SystemExit("wavflow: WAVFLOW_BUILD=cuda needs nvcc on PATH or under CUDA_HOME")
        try:
            self.build(nvcc)
        except subprocess.CalledProcessError as error:
            if mode != "auto":
                raise SystemExit(f"wavflow: WAVFLOW_BUILD={mode} failed: {error}") from error
            if nvcc is None:
                return self.pure(f"the C++ build failed ({error}); see the output above")
            say(f"the CUDA build failed ({error}); building the CPU kernels alone")
            nvcc = None
            try:
                self.build(nvcc)
            except subprocess.CalledProcessError as second:
                return self.pure(f"the C++ build failed ({second}); see the output above")
        say(
            f"built the CPU kernels{f' and the CUDA kernels with {nvcc}' if nvcc else ''}"
            + ("" if nvcc else " (no CUDA kernels: nvcc not used)")
        )

    def pure(self, reason):
        # An extension that an earlier build of this tree left would be installed with the rest.
        Path(self.get_ext_fullpath("wavflow_kernels._C")).unlink(missing_ok=True)
        self.extensions.clear()
        say("-" * 72)
        say(f"PURE PYTHON INSTALL, without compiled kernels: {reason}")
        say("every op runs as its torch reference; results are the same, speed is not")
        say("-" * 72)

    def build(self, nvcc):
        import pybind11

        target = Path(self.get_ext_fullpath("wavflow_kernels._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = "cuda" if nvcc else "cpu"
        build = ROOT / "build" / f"cmake-{kind}-{sys.implementation.cache_tag}"
        ninja = shutil.which("ninja")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # An isolated build has its tools in a folder that is gone at the next build of the same
            # tree, so their paths are given anew each time.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DWAVFLOW_WITH_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DWAVFLOW_SANITIZE={'ON' if os.environ.get('WAVFLOW_SANITIZE') else 'OFF'}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(build), "--parallel", str(parallel_jobs())], check=True
        )


setup(
    ext_modules=[Extension("wavflow_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
