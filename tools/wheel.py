"""Builds sdist and wheel, and tests the wheel in a bare environment for every torch asked for.

    python tools/wheel.py torch==2.13.0 torch==2.14.1

The wheel is built from the sdist, once, without torch: its extension knows pointers alone, and so
it must run beside every supported torch. In each environment that holds the wheel, its dependencies
and nothing else, from a folder without the sources: the kernels are there, every op gives what
its reference gives, and the command line answers. ``--wheel FILE`` tests a wheel that is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "wheels"
# No op's reference is compiled here: the check takes seconds.
CHECK = """
import torch, wavflow, wavflow_kernels as wk
from wavflow_kernels import REGISTRY, _backend
assert _backend.C is not None, _backend.C_MISSING
for package in (wavflow, wk):
    assert "site-packages" in package.__file__, package.__file__
cpu, checked = torch.device("cpu"), 0
def floats(values):
    values = values if isinstance(values, (list, tuple)) else [values]
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
for op in REGISTRY.values():
    if op.internal or op.mutates or _backend.unavailable(op, "cpp", cpu, torch.float64):
        continue
    for sample in op.samples(cpu, torch.float64, 0):
        with wk.use_backend("cpp"):
            ours = floats(op(*sample.args))
        with wk.use_backend("reference"):
            wanted = floats(op(*sample.args))
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    checked += 1
assert checked >= 8, checked
print(f"torch {torch.__version__}: {checked} compiled ops give what their references give")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Runs a command without this checkout on its path; ends the program where it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WAVFLOW_BACKEND")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env | environment)
    if done.returncode:
        raise SystemExit(f"wheel: {' '.join(map(str, command[:4]))} ... ended with an error")


def build() -> Path:
    """The wheel, made from the sdist beside it."""
    kind = os.environ.get("WAVFLOW_BUILD", "cpu")  # not "auto": it may end without kernels
    for old in OUT.glob("wavflow-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", OUT, ROOT, cwd=ROOT, WAVFLOW_BUILD=kind)
    (wheel,) = OUT.glob("wavflow-*.whl")
    return wheel


def try_out(wheel: Path, torch: str) -> None:
    """Tests the wheel in a fresh environment with that torch."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = Path(folder) / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", torch, cwd=Path(folder))
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=Path(folder))
        run(python, "-m", "pip", "check", cwd=Path(folder))
        run(python, "-c", CHECK, cwd=Path(folder))
        run(python, "-m", "wavflow_kernels", cwd=Path(folder))
        run(python.with_name("wavflow"), "info", cwd=Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torch", nargs="+", help="pip's requirement, such as torch==2.13.0")
    parser.add_argument("--wheel", type=Path, help="test this one, build none")
    options = parser.parse_args()
    wheel = options.wheel.resolve() if options.wheel else build()
    for torch in options.torch:
        try_out(wheel, torch)
    print(f"{wheel}: tested with {', '.join(options.torch)}")


if __name__ == "__main__":
    main()
