"""``python -m wavflow.demo.ship RUN``: makes the weights that come with the package.

Takes a finished training of the toy world, writes its average in half precision, reads that file
back, judges its sounds as the demo does, in every dtype that a CPU may choose and in the world of
several seeds, and puts it in its place with its provenance if every bar is met: in the training's
own world, and by the mean of all worlds, since one world's 64 clips are off by some points by luck.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from wavflow.base.console import counter
from wavflow.base.errors import InputError
from wavflow.base.files import write_json
from wavflow.base.version import __version__
from wavflow.config.load import config_from_dict, load_config
from wavflow.config.schema import Config
from wavflow.demo.run import CLIPS, CONTROL_CLIPS, HELDOUT_CLIPS, PRESET, Demo
from wavflow.demo.score import FULL, QUICK, SHIPPED, WANTED, recompute
from wavflow.demo.sounds import control_jobs, generate, jobs_of, read_heldout
from wavflow.pipeline.sampler import Sampler
from wavflow.training.checkpoint import (
    LATEST,
    PACKAGED,
    SAFETENSORS,
    Weights,
    read_weights,
    save_weights,
)
from wavflow_kernels import cpu

#: Bytes of the file, at most.
MOST_BYTES = 8_000_000
LICENCE = "Apache-2.0"


def ship(
    run: Path, out: Path, work: Path, *, seeds: list[int], dtypes: list[str], commit: str
) -> Weights:
    """Writes the weights of the training in `run` to `out`, if every bar is met.

    Args:
        run: folder of a training of the demo's world.
        out: the .safetensors file.
        work: folder that gets the worlds and the sounds that are judged.
        seeds: seeds of the worlds, the training's own among them.
        dtypes: names of the dtypes that the network is judged in.
        commit: commit of the source that trained it.

    Returns:
        The weights as they were written.

    Raises:
        InputError: a bar is missed, or the file is too large.
    """
    weights = read_weights(run / LATEST, "ema1")
    if weights.config is None:
        raise InputError(f"{run}: its checkpoint carries no configuration")
    config = config_from_dict(weights.config, where=str(run))
    changed = _overrides(config)
    state = {name: tensor.half() for name, tensor in weights.state.items()}
    about = {
        "licence": LICENCE,
        "commit": commit,
        "wavflow": __version__,
        "seed": config.training.seed,
        "steps": weights.global_step,
        "commands": [
            f"wavflow toy --out toy --clips {CLIPS[FULL]} --heldout {HELDOUT_CLIPS} "
            f"--seed {config.training.seed}",
            "wavflow extract --csv toy/train.csv --out features",
            f"wavflow train --config {PRESET} data.csv_path=features/train.csv {changed}".strip(),
            f"python -m wavflow.demo.ship {run.name}",
        ],
        "made_on": f"{cpu.name()}, torch {torch.__version__}",
    }
    here = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, csv_path=None, val_csv_path=None),
        training=dataclasses.replace(config.training, output_dir="outputs"),
        experiment_id=PRESET,
    )
    made = Weights(out, state, weights.which, here.to_dict(), weights.global_step, about)
    candidate = work / f"candidate{SAFETENSORS}"
    save_weights(candidate, made)
    figures = [found for seed in seeds for found in judge(candidate, work, seed, dtypes)]
    for dtype in dtypes:
        rows = [row for row in figures if row["dtype"] == dtype]
        own = [row for row in rows if row["world"] == config.training.seed]
        missed = {f"worlds {seeds}": _missed(rows), f"world {config.training.seed}": _missed(own)}
        for worlds, bars in missed.items():
            if bars:
                raise InputError(f"{run}: {worlds}, {dtype}: {'; '.join(bars)}")
    save_weights(candidate, dataclasses.replace(made, provenance=about | {"figures": figures}))
    if (size := candidate.stat().st_size) >= MOST_BYTES:
        raise InputError(f"{candidate}: {size} bytes; wanted less than {MOST_BYTES}")
    save_weights(out, read_weights(candidate))
    return read_weights(out)


def judge(checkpoint: Path, work: Path, seed: int, dtypes: list[str]) -> list[dict[str, Any]]:
    """The demo's figures of a network on the held-out clips of a world, one row a dtype.

    Args:
        checkpoint: the network.
        work: folder that gets the world and the sounds.
        seed: what the world and the noise depend on.
        dtypes: names of the dtypes that the network runs in.

    Raises:
        InputError: a control is too good, so that what judges cannot be trusted.
    """
    folder = work / f"world{seed}"
    demo = Demo(folder, seed, CLIPS[QUICK], HELDOUT_CLIPS, load_config(PRESET), stages=0)
    demo.write_clips("heldout")
    demo.write_clips("train")
    demo.extract("heldout")
    rows = []
    for dtype in dtypes:
        sampler = Sampler.load(checkpoint, "cpu", dtype)
        clips = read_heldout(folder, sampler.config)
        jobs = jobs_of(sampler, SHIPPED, clips)
        jobs += control_jobs(sampler, clips.first(CONTROL_CLIPS), seed)
        with counter(f"world {seed}, {dtype}") as show:
            entries = generate(
                folder, jobs, seed=seed, progress=lambda _, *at, show=show: show(*at)
            )
        write_json(folder / "events.json", entries)
        found = recompute(folder, demo.heard)
        missed = [
            f"{name} {bar['value']:.3f}, wanted {bar['wanted']}"
            for name, bar in found["bars"].items()
            if not bar["passed"] and not name.startswith(SHIPPED)
        ]
        if missed:
            raise InputError(f"world {seed}, {dtype}: {'; '.join(missed)}")
        about = {"world": seed, "dtype": dtype, "clips": HELDOUT_CLIPS}
        rows.append(about | found[SHIPPED])
        print(rows[-1], file=sys.stderr)
    return rows


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that the mean of the rows' figures misses, in words."""
    means = {
        f"{mode}.{name}": (sum(row[mode][name] for row in rows) / len(rows), least)
        for mode, wanted in WANTED.items()
        for name, least in wanted.items()
        if rows
    }
    return [
        f"{SHIPPED}.{name} {mean:.3f}, wanted >= {least:g}"
        for name, (mean, least) in means.items()
        if mean < least
    ]


def _overrides(config: Config) -> str:
    """What a training's configuration changes of the preset, as the command line takes it."""
    preset, found = load_config(PRESET).to_dict(), []
    for section, values in config.to_dict().items():
        if isinstance(values, dict):
            for key, value in values.items():
                is_place = (section, key) in {("data", "csv_path"), ("training", "output_dir")}
                if value != preset[section][key] and not is_place:
                    text = "null" if value is None else value
                    found.append(shlex.quote(f"{section}.{key}={text}"))
    return " ".join(found)


def _commit() -> str:
    """The commit of the source tree that this module lies in."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"{root}: not a git checkout; give --commit")
    return done.stdout.strip()


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = PACKAGED / f"{PRESET}{SAFETENSORS}",
    seed: Annotated[list[int] | None, typer.Option(help="Of a world; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the source that trained it.")] = None,
) -> None:
    """Judge a training of the toy world and make it the package's weights."""
    with tempfile.TemporaryDirectory(prefix="wavflow-ship-") as work:
        try:
            made = ship(
                run,
                out,
                Path(work),
                seeds=seed or [0, 1, 2],
                dtypes=dtype or ["float32", "bfloat16"],
                commit=commit or _commit(),
            )
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {made.global_step} steps")


if __name__ == "__main__":
    typer.run(main)
