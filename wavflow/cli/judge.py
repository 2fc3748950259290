"""Commands that judge and describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wavflow.base.console import counter
from wavflow.base.version import __version__
from wavflow.cli.shared import Overwrite, Seed, Workers, say


def evaluate(
    gen: Annotated[Path, typer.Option(help="Folder of generated sounds, .wav or .flac.")],
    true: Annotated[Path, typer.Option(help="Folder of true sounds, paired by file stems.")],
    rate: Annotated[
        int | None, typer.Option(help="Hz of the comparison; default the lowest of the files.")
    ] = None,
    extractor: Annotated[
        list[str] | None,
        typer.Option(help="melstats (the default), ast or clap, [=FOLDER or hub name]."),
    ] = None,
    embeddings: Annotated[
        list[str] | None,
        typer.Option(help="NAME=GENERATED,TRUE: .safetensors, .npz or a folder of .npy by id."),
    ] = None,
    logits: Annotated[
        list[str] | None, typer.Option(help="NAME=GENERATED[,TRUE]: logits of a classifier.")
    ] = None,
    similarity: Annotated[
        list[str] | None, typer.Option(help="NAME=GENERATED,OTHER: embeddings in one space.")
    ] = None,
    offsets: Annotated[
        list[str] | None, typer.Option(help="NAME=GENERATED: logits of a synchrony model.")
    ] = None,
    offset_limit: Annotated[float, typer.Option(help="Seconds of the last offset class.")] = 2.0,
    captions: Annotated[
        Path | None, typer.Option(help="Table: id, caption, for clap's similarity.")
    ] = None,
    toy: Annotated[
        Path | None, typer.Option(help="A toy world's events.json, for onsets and kinds.")
    ] = None,
    fad_infinity: Annotated[
        bool,
        typer.Option(
            "--fad-infinity", help="Also extrapolate Frechet distances to endlessly many sounds."
        ),
    ] = False,
    splits: Annotated[int, typer.Option(help="Parts of an inception score.")] = 10,
    resamples: Annotated[int, typer.Option(help="Resamples of a bootstrap interval.")] = 1000,
    confidence: Annotated[
        float, typer.Option(help="Confidence of an interval, from 0 to 1.")
    ] = 0.95,
    seed: Seed = 0,
    json: Annotated[Path | None, typer.Option(help="JSON file for all figures, by id too.")] = None,
    overwrite: Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when anything was left out.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Device of ast and clap: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    workers: Workers = None,
) -> None:
    """Judge generated sounds by true ones: distances of sets, figures of pairs, checks."""
    from wavflow.base.files import check_output
    from wavflow.evaluation.evaluate import Given, evaluate
    from wavflow.evaluation.figures import Settings
    from wavflow.evaluation.report import show

    if json is not None:
        check_output(json, captions, toy, overwrite=overwrite)
    rows = {
        "embeddings": embeddings,
        "logits": logits,
        "similarity": similarity,
        "offsets": offsets,
    }
    result = evaluate(
        gen,
        true,
        rate=rate,
        extractors=extractor or ["melstats"],
        given=[Given.parse(kind, text) for kind, texts in rows.items() for text in texts or ()],
        captions=captions,
        toy=toy,
        settings=Settings(splits, fad_infinity, offset_limit, resamples, confidence, seed),
        device=device,
        workers=workers,
        progress=counter,
    )
    show(result)
    if json is not None:
        result.save(json)
        say(str(json))
    if strict and result.problems:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for sounds, pictures and report.html.")] = Path(
        "out/demo"
    ),
    seed: Seed = 0,
    train: Annotated[
        str,
        typer.Option(
            help="Training from nothing: quick (a minute), full (as many steps as the packaged "
            "network took, to the same bars; says beforehand how long that takes), none."
        ),
    ] = "quick",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in the folder.")] = False,
) -> None:
    """Toy world, the packaged network's sounds for it, their figures, a training, a report.

    Ends with 1 if a bar is missed.
    """
    from wavflow.demo.run import run_demo

    try:
        metrics = run_demo(out, seed=seed, train=train, fresh=fresh)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not all(bar["passed"] for bar in metrics["bars"].values()):
        raise typer.Exit(1)


def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint or packaged weights to describe.")
    ] = None,
) -> None:
    """Print versions, what runs here, and what a checkpoint holds."""
    import platform

    import torch

    from wavflow.base import precision
    from wavflow_kernels.__main__ import report

    device = precision.resolve_device()
    dtype = precision.resolve_dtype("auto", device)
    print(f"wavflow {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"model: {precision.describe(device, dtype)}")
    print(report())
    if checkpoint is not None:
        for line in _describe_checkpoint(checkpoint):
            print(line)


def _describe_checkpoint(path: Path) -> list[str]:
    from wavflow.base.state_dict import load
    from wavflow.training.checkpoint import SAFETENSORS, find, read_weights

    path = find(path)
    if path.suffix == SAFETENSORS:
        weights = read_weights(path)
        state: dict[str, Any] = weights.state
        config = weights.config
        content: dict[str, Any] = {"which": weights.which, "global_step": weights.global_step}
        content |= weights.provenance or {}
    else:
        content = load(path)
        state, config = content.get("model", content), content.get("config")
    numbers = sum(t.numel() for t in state.values() if hasattr(t, "numel"))
    lines = [f"{path}: {len(state)} tensors, {numbers:,} numbers"]
    for key in (
        "which", "epoch", "global_step", "loss", "elapsed", "ema_age", "ema_decay",
        "licence", "seed", "commit", "commands", "made_on", "figures",
    ):  # fmt: skip
        if key in content:
            lines += [f"  {key}: {line}" for line in _lines(content[key])]
    if config:
        data, model = config["data"], config["model"]
        said = [f"system {config['system']}"] if "system" in config else []
        said += [model["name"]] if model.get("name") else []
        said += [f"encoders {model['encoders']}"] if "encoders" in model else []
        said.append(f"{data['audio_duration']} s at {data['target_sample_rate']} Hz")
        lines.append(f"  {', '.join(said)}")
    return lines


def _lines(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
