"""Shared settings of the tests: hypothesis profile, skips, seeds."""

from __future__ import annotations

import os

# One thread a process, before torch is imported: pytest-xdist keeps the cores busy, and two
# processes of two threads each wait for one another. Tests of threads set their own number; a
# waiting thread then sleeps.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from wavflow_kernels import _backend

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header() -> str:
    return f"kernels: {_backend.C.__file__ if _backend.C else 'none, references only'}"


def pytest_sessionstart() -> None:
    """WAVFLOW_TEST_KERNELS: the folder that the compiled kernels under test must come from."""
    folder = os.environ.get("WAVFLOW_TEST_KERNELS")
    if folder and (_backend.C is None or folder not in _backend.C.__file__):
        pytest.exit(f"the kernels under test are not those in {folder}", returncode=3)


# The files that take longest, in that order: they come first, so that the last process to end waits
# for a short one. The tests in them are marked "long".
LONG = (
    "ops",
    "parallel",
    "resume",
    "scale",
    "long",
    "aot",
    "serve",
    "readme",
    "bench_length",
    "sampler",
    "engine",
    "training",
    "public_job",
    "collect_gpu",
    "hostile",
    "synchformer",
    "registry",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
    for item in items:
        if place(item) < len(LONG):
            item.add_marker("long")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `compiled` run with the compiled kernels whatever WAVFLOW_BACKEND says."""
    if "compiled" not in request.keywords:
        yield
        return
    if _backend.C is None:
        pytest.skip("no compiled kernels")
    with _backend.use_backend(None):
        yield


class Recorder:
    """Stands for CUDA's capture: its graph is the step itself, run at replay."""

    def __init__(self):
        self.captured = 0

    def __call__(self, step, rewind, device):
        self.captured += 1
        output = step()
        places = output if isinstance(output, tuple) else (output,)
        rewind()

        def replay():
            again = step()
            again = again if isinstance(again, tuple) else (again,)
            for place, value in zip(places, again, strict=True):
                place.copy_(value)

        return replay, output


@pytest.fixture
def graphs(monkeypatch):
    """An engine that believes to be on a GPU, and the count of what it captures."""
    from support.networks import field_of

    from wavflow.sampling import engine

    recorder = Recorder()
    monkeypatch.setattr(engine, "capture", recorder)

    def make(model, limit=4):
        made = engine.Engine(field_of(model), "eager", limit=limit)
        made.kind = "graph"
        return made, recorder

    return make
