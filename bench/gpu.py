"""``make gpu``: build, test, tune and measure on this machine's GPU, without network, in 9 minutes.

Uses the Python that runs it and what is installed there. The kernels go to ``build/gpu/site``;
each stage's output goes to ``build/gpu/<stage>.log`` as it comes, results to ``bench/results``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
SITE = WORK / "site"
TABLES = Path("wavflow_kernels") / "tuned"
TOTAL_SECONDS = 530.0
MODULES = (
    "triton", "pybind11", "setuptools", "numpy", "pytest", "hypothesis", "safetensors",
    "torchdiffeq", "typer", "rich",
)  # fmt: skip
PROGRAMS = ("cmake", "ninja")
#: What the trainer's benchmark needs beside these.
TRAINING = ("omegaconf", "soundfile")


@dataclass(frozen=True)
class Stage:
    """One command with a time limit; `unless` is why it is left out here, '' if it is not."""

    name: str
    command: Sequence[str]
    limit: float
    unless: str = ""
    needs: str = ""  # the stage that must have succeeded
    then: Callable[[], None] | None = None  # called at the end, however that was


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: result is ok, failed, stopped or skipped."""

    name: str
    result: str
    seconds: float
    note: str


def run_stage(stage: Stage, folder: Path, environment: Mapping[str, str], limit: float) -> Outcome:
    """Run one stage: its output is shown and written as it comes; killed at its limit."""
    start = time.monotonic()
    log = folder / f"{stage.name}.log"
    said = ""
    print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
    process = subprocess.Popen(
        stage.command,
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a stage is ended with all that it started
    )

    def pass_on() -> None:
        nonlocal said
        with open(log, "w", encoding="utf-8") as file:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
                said = line.strip() or said

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # A process that left the group may hold the pipe open: its output is not waited for.
        reader.join(5)
    if stage.then is not None:
        stage.then()
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(stage.name, "stopped", seconds, f"not done after {limit:.0f} s: {log}")
    if code:
        return Outcome(stage.name, "failed", seconds, f"exit code {code}: {said} ({log})")
    return Outcome(stage.name, "ok", seconds, said)


def run_stages(
    stages: Sequence[Stage], folder: Path, environment: Mapping[str, str], seconds: float
) -> list[Outcome]:
    """Run stages in turn within `seconds`; one that cannot run is skipped with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        left = end - time.monotonic()
        needed = outcomes.get(stage.needs)
        reason = stage.unless
        if needed is not None and needed.result != "ok":
            reason = f"{stage.needs} did not succeed"
        elif left < 5:
            reason = f"the {seconds:.0f} s were up"
        if reason:
            outcomes[stage.name] = Outcome(stage.name, "skipped", 0.0, reason)
        else:
            limit = min(stage.limit, left)
            outcomes[stage.name] = run_stage(stage, folder, environment, limit)
    return list(outcomes.values())


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that is printed last."""
    width = max(len(o.name) for o in outcomes)
    return "\n".join(
        f"{o.name:<{width}}  {o.result:<7} {o.seconds:5.0f} s  {o.note}" for o in outcomes
    )


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 if a stage failed or was stopped at its limit, else 0: skipped ones say why."""
    return int(any(o.result in ("failed", "stopped") for o in outcomes))


def missing() -> list[str]:
    """What this machine lacks, each with where it was looked for."""
    lacks = []
    if importlib.util.find_spec("torch") is None:
        lacks.append(f"torch ({sys.executable} has none)")
    else:
        import torch

        if not torch.cuda.is_available():
            lacks.append(f"a CUDA device (torch {torch.__version__} sees none)")
    if find_nvcc() is None:
        lacks.append("nvcc (not on PATH, under CUDA_HOME or in /usr/local/cuda)")
    lacks += [f"Python's {name}" for name in MODULES if importlib.util.find_spec(name) is None]
    lacks += [name for name in PROGRAMS if shutil.which(name, path=tools_path()) is None]
    return lacks


def find_nvcc() -> str | None:
    """nvcc where setup.py looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else []
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((found for p in places if (found := shutil.which("nvcc", path=p))), None)


def tools_path() -> str:
    """PATH with this Python's own programs first."""
    return sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def architecture(capability: tuple[int, int]) -> str:
    """The one CUDA architecture to build for."""
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def plan(capability: tuple[int, int], gpu: str, workers: int) -> list[Stage]:
    """The stages on a GPU of that name and compute capability."""
    from wavflow_kernels._tuned import slug

    python = [sys.executable]
    results = ROOT / "bench" / "results"
    pytest = [*python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    pytest += [str(ROOT / "tests"), "-q", "-p", "no:cacheprovider", "--durations", "5"]
    parallel = []
    if importlib.util.find_spec("xdist") is not None:
        parallel = ["-n", str(workers)]
    no_plots = "" if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"
    absent = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    no_training = f"{' and '.join(absent)} not installed" if absent else ""

    def keep_tables() -> None:
        """The installed package holds the new table; the sources get it too."""
        if (SITE / TABLES).is_dir():
            shutil.copytree(SITE / TABLES, ROOT / TABLES, dirs_exist_ok=True)

    build = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--upgrade"]
    return [
        Stage("build", [*build, "--target", str(SITE), str(ROOT)], 180),
        Stage("report", [*python, "-m", "wavflow_kernels"], 60, needs="build"),
        Stage("test", [*pytest, "-m", "gpu and not large", *parallel], 190, needs="build"),
        Stage("test-large", [*pytest, "-m", "gpu and large"], 60, needs="build"),
        Stage(
            "tune",
            [*python, "-m", "wavflow_kernels.tools.tune", "--seconds", "75"],
            110,
            needs="build",
            then=keep_tables,
        ),
        Stage(
            "bench",
            [*python, "-m", "bench.run", "--device", "cuda", "--seconds", "0.1", "--budget", "110",
             "--json", str(results / f"{slug(gpu)}.json")],
            150,
            needs="build",
        ),
        Stage(
            "plot",
            [*python, "-m", "bench.plot", str(results / f"{slug(gpu)}.json")],
            30,
            unless=no_plots,
            needs="bench",
        ),
        *(
            Stage(
                f"sample-{batch}",
                [*python, "-m", "bench.run", "sample", "--device", "cuda", "--batch", str(batch),
                 "--seconds", "5", "--compiled",
                 "--json", str(results / f"sample-{slug(gpu)}-{batch}.json")],
                150,
                needs="build",
            )
            for batch in (1, 8)
        ),
        Stage(
            "train",
            [*python, "-m", "bench.run", "train", "--device", "cuda", "--model", "medium_16k",
             "--batch", "8", "--seconds", "5", "--compile",
             "--json", str(results / f"train-{slug(gpu)}.json")],
            150,
            unless=no_training,
            needs="build",
        ),
        Stage(
            "length",
            [*python, "-m", "bench.run", "length", "--device", "cuda", "--models",
             "medium_16k,medium_44k", "--batch", "8", "--limit", "10",
             "--json", str(results / f"length-{slug(gpu)}.json")],
            150,
            unless=no_training,
            needs="build",
        ),
    ]  # fmt: skip


def environment(capability: tuple[int, int]) -> dict[str, str]:
    """The kernels just built come before the sources, which lend `bench` and `tests` alone."""
    return {
        **os.environ,
        "PATH": tools_path(),
        "PYTHONPATH": os.pathsep.join((str(SITE), str(ROOT))),
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "WAVFLOW_BUILD": "cuda",
        "WAVFLOW_TEST_KERNELS": str(SITE),
        "CMAKE_ARGS": f"-DWAVFLOW_CUDA_ARCHITECTURES={architecture(capability)}",
    }


def main() -> int:
    lacks = missing()
    if lacks:
        print(f"make gpu: this machine lacks {'; '.join(lacks)}", file=sys.stderr)
        return 2
    import torch

    capability, gpu = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    stages = plan(capability, gpu, workers)
    known = [stage.name for stage in stages]
    wanted = sys.argv[1:] or known
    for name in wanted:
        if name not in known:
            print(f"make gpu: no stage '{name}'; there are {', '.join(known)}", file=sys.stderr)
            return 2
    outcomes = run_stages(
        [stage for stage in stages if stage.name in wanted],
        WORK,
        environment(capability),
        TOTAL_SECONDS,
    )
    print(f"\n{gpu}, torch {torch.__version__}\n{summary(outcomes)}")
    return exit_code(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
