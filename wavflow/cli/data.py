"""Commands that make data: toy worlds, features, packs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from wavflow.base.console import counter
from wavflow.base.errors import InputError
from wavflow.cli.shared import ConfigFile, Overrides, Seed, Workers, finish, say


def toy(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    clips: Annotated[int, typer.Option(help="Training clips.")] = 1000,
    seed: Seed = 0,
    heldout: Annotated[int, typer.Option(help="Held-out clips.")] = 64,
    seconds: Annotated[float, typer.Option(help="Length of a clip, in seconds.")] = 2.0,
    rate: Annotated[int, typer.Option(help="Samples per second.")] = 8000,
    workers: Workers = None,
) -> None:
    """Write a toy world: videos of things that are struck, their sounds, captions."""
    from wavflow.toy.world import write_toy_world

    try:
        write_toy_world(
            out,
            clips,
            seed,
            heldout=heldout,
            seconds=seconds,
            rate=rate,
            workers=workers,
            progress=True,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    say(f"{clips} training and {heldout} held-out clips in {out}")


def extract(
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Table: id, audio_path, caption, video_path. Without it and --out: data.csv_path, "
            "output.pth_dir and output.csv_path of the configuration."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for features and the training table.")
    ] = None,
    overrides: Overrides = None,
    config: ConfigFile = "toy_8k",
    encoders: Annotated[
        str | None, typer.Option(help="Name of the encoders, instead of the configuration's.")
    ] = None,
    seconds: Annotated[
        str | None,
        typer.Option(
            help="Seconds of each video, instead of the configuration's; whole for all of it."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: the part of the table for process i of n, from 0; default as torchrun says."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace features of other encoders, weights or seconds."),
    ] = False,
    pack_to: Annotated[
        Path | None,
        typer.Option("--pack", help="Then pack the table into this folder, as `wavflow pack`."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Encode videos and captions, and write the table that training reads."""
    from wavflow.base.files import locked
    from wavflow.config.load import load_config
    from wavflow.features.extract import extract, extract_config

    if (csv is None) != (out is None):
        given, other = ("--out", "--csv") if csv is None else ("--csv", "--out")
        raise InputError(f"{given} without {other}; wanted both, or a configuration's paths alone")
    loaded = load_config(config, overrides or ())
    run = partial(extract_config, loaded)
    if csv is not None and out is not None:
        run = partial(extract, csv, out, config=loaded)
    with counter("extract") as progress:
        result = run(
            encoders=encoders,
            seconds=None if seconds is None else _seconds(seconds),
            shard=None if shard is None else _shard(shard),
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    say(f"{result.csv}: {result.done} extracted, {result.kept} kept, {result.failed} failed")
    if result.unfinished:
        say(f"shards that have not ended: {result.unfinished}; the last completes {result.csv}")
    elif pack_to is not None:
        with locked(pack_to):  # two shards may both be the last
            pack(result.csv, pack_to, overrides, config)
    finish(result.done + result.kept, result.failed, result.report)


def pack(
    csv: Annotated[Path, typer.Option(help="A training table, as `wavflow extract` writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    overrides: Overrides = None,
    config: ConfigFile = "toy_8k",
    shard_mb: Annotated[int, typer.Option(help="Size of a shard, in MB.")] = 512,
    workers: Annotated[int, typer.Option(help="Threads that read files.")] = 2,
) -> None:
    """Pack a training table into WebDataset shards, which training reads without decoding."""
    from wavflow.config.load import load_config
    from wavflow.data.pack import pack
    from wavflow.systems import system

    loaded = load_config(config, overrides or ())
    tracks = system(loaded.system).tracks(loaded)
    with counter("pack") as progress:
        result = pack(
            csv, out, loaded.data, tracks, shard_mb=shard_mb, workers=workers, progress=progress
        )
    say(f"{result.folder}: {result.done} packed, {result.failed} failed")
    finish(result.done, result.failed, result.report)


def _seconds(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise InputError(f"--shard is {text!r}; wanted i/n, such as 0/4")
    return int(number), int(count)
