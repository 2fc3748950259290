"""Another checkout's network in a process of its own, to be timed in turns with this one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import fail

CHILD = """
import sys, torch
from wavflow.model.networks import get_wavflow_model
job = torch.load(sys.stdin.buffer.readline().strip().decode(), weights_only=True)
device, dtype = job["device"], getattr(torch, job["dtype"])
torch.set_num_threads(job["threads"])
model = get_wavflow_model(job["model"])
model.load_state_dict(job["state"], strict=False)
model = model.to(device).eval()
clip, sync, text, latent, t = (x.to(device) for x in job["inputs"])
with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
    conditions = model.preprocess_conditions(clip, sync, text)
    empty = model.get_empty_conditions(len(latent))
    for line in sys.stdin.buffer:
        out = model.ode_wrapper(t, latent, conditions, empty, job["guidance"])
        if device == "cuda":
            torch.cuda.synchronize()
        if line.strip():
            torch.save(out.float().cpu(), line.strip().decode())
        print("done", flush=True)
"""


class Checkout:
    """Another checkout's network in a child process, one step for a line on its stdin.

    `program` reads the path of the saved job from its first line; of a line that is not empty it
    takes a path to save the step's output to.
    """

    def __init__(self, path: Path, job: dict[str, Any], folder: Path, program: str = CHILD) -> None:
        torch.save(job, folder / "job.pt")
        self._output = folder / "out.pt"
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(path)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ask(str(folder / "job.pt"))

    def _ask(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()

    def _step(self, line: str) -> None:
        self._ask(line)
        assert self._child.stdout is not None
        if not self._child.stdout.readline():
            fail(f"bench.run: the checkout's process ended with code {self._child.wait()}")

    def step(self) -> None:
        self._step("")

    def output(self) -> Tensor:
        self._step(str(self._output))
        return torch.load(self._output, weights_only=True)

    def close(self) -> None:
        self._child.communicate()
