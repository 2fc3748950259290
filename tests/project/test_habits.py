"""What people's tools and a host's machines run is what `make` runs, in the same versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path: str) -> dict[str, Any]:
    import yaml  # a GPU machine may lack it

    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    """The version in the dev extra, the only one in the file."""
    (version,) = re.findall(rf'"{package}==([\d.]+)"', PROJECT)
    return version


def test_pre_commit_has_the_linter_of_the_dev_extra() -> None:
    found = {repo["repo"]: repo for repo in load(".pre-commit-config.yaml")["repos"]}
    ruff = found["https://github.com/astral-sh/ruff-pre-commit"]
    assert ruff["rev"] == f"v{pinned('ruff')}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_host_tries_every_supported_python() -> None:
    low, end = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT)[0]
    jobs = load(".github/workflows/ci.yml")["jobs"]
    wanted = [f"3.{minor}" for minor in range(int(low), int(end))]
    assert jobs["python"]["strategy"]["matrix"]["python"] == wanted


@pytest.mark.parametrize("job", ["python", "all"])
def test_the_host_runs_what_is_there(job: str) -> None:
    """Its commands are `.ci/run` and make's targets, with variables that the Makefile knows."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = load(".github/workflows/ci.yml")["jobs"][job]["steps"]
    commands = [step for step in steps if "run" in step]
    assert commands
    for step in commands:
        if step["run"].startswith("make "):
            assert re.search(rf"^{step['run'].removeprefix('make ')}:", makefile, re.M)
        else:
            assert (ROOT / step["run"]).stat().st_mode & 0o111
        known = {name for name in step["env"] if not name.startswith("PIP_")}
        assert all(re.search(rf"^{name} \?=", makefile, re.M) for name in known)


def test_both_packages_are_typed() -> None:
    """An importer's type checker reads their annotations."""
    for package in ("wavflow", "wavflow_kernels"):
        assert (ROOT / package / "py.typed").is_file()
        assert re.search(rf'^{package} = \[.*"py.typed".*\]$', PROJECT, re.M)


@pytest.mark.slow
def test_a_wrong_type_is_found(tmp_path: Path) -> None:
    """The checker reads the types of both packages as an importer does, and torch's."""
    user = tmp_path / "user.py"
    user.write_text(
        "import torch\nimport wavflow_kernels as wk\n"
        "from wavflow.config.load import load_config\n"
        "good: torch.Tensor = wk.philox_normal(torch.arange(2), 3, 4)\n"
        "bad: int = wk.philox_normal(torch.arange(2), 3, 4)\n"
        "worse: int = load_config('toy_8k')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"),
         "--config-file", str(ROOT / "pyproject.toml"), str(user)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.findall(r"user\.py:(\d+): error", done.stdout) == ["5", "6"]
