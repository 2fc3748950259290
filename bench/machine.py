"""The machine a benchmark runs on: its name, versions and memory; the one-line error."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

from wavflow.base.memory import available_memory

ROOT = Path(__file__).resolve().parent.parent


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return available_memory(device)


def machine(device: torch.device) -> dict[str, object]:
    """The device, versions and commit that every row of results carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def version(package: str) -> str | None:
    """The installed version of a package; None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
