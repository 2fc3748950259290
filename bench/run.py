"""``python -m bench.run``: the door to all benchmarks.

``python -m bench.run [op ...]`` times every op against eager torch, torch.compile and the libraries
(:mod:`bench.ops`);
``python -m bench.run sample`` times whole steps of the network (:mod:`bench.sample`);
``python -m bench.run fidelity`` says what fast choices cost in sound (:mod:`bench.fidelity`);
``python -m bench.run solvers`` how far every solver ends from the exact one (:mod:`bench.solvers`);
``python -m bench.run train`` times whole training steps (:mod:`bench.train`);
``python -m bench.run profile`` shows where both spend their time (:mod:`bench.profile`);
``python -m bench.run length`` how fast long sounds are made (:mod:`bench.length`);
``python -m bench.run synchformer`` times the encoder of motion (:mod:`bench.synchformer`).
"""

from __future__ import annotations

import importlib
import sys

import typer

PROGRAMS = ("sample", "fidelity", "solvers", "train", "length", "synchformer", "profile")

if __name__ == "__main__":
    program = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in PROGRAMS else "ops"
    typer.run(importlib.import_module(f"bench.{program}").main)
