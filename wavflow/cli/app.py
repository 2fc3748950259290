"""The command line `wavflow`: one function a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from wavflow import __version__
from wavflow.console import console, counter, show_log
from wavflow.errors import InputError

app = typer.Typer(
    name="wavflow",
    help="Flow matching on raw audio: sound for videos and captions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Seed = Annotated[int, typer.Option(help="Base seed.")]
Workers = Annotated[int | None, typer.Option(help="Processes; default one per core.")]
ConfigFile = Annotated[str, typer.Option(help="A YAML file, or a packaged configuration's name.")]
Checkpoint = Annotated[
    Path, typer.Option(help="A checkpoint or EMA file, or packaged weights: toy_8k.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ...")]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 well, 1 some rows failed, 2 unusable input."""
    show_log()
    try:
        app(args=None if argv is None else list(argv), prog_name="wavflow")
    except InputError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}")


@app.command()
def toy(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    clips: Annotated[int, typer.Option(help="Training clips.")] = 1000,
    seed: Seed = 0,
    heldout: Annotated[int, typer.Option(help="Held-out clips.")] = 64,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 2.0,
    rate: Annotated[int, typer.Option(help="Samples per second.")] = 8000,
    workers: Workers = None,
) -> None:
    """Write a toy world: videos of things that are struck, their sounds, captions."""
    from wavflow.data.toy import write_toy_world

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
    _say(f"{clips} training and {heldout} held-out clips in {out}")


@app.command()
def extract(
    csv: Annotated[Path, typer.Option(help="Table: id, audio_path, caption, video_path.")],
    out: Annotated[Path, typer.Option(help="Folder for features and the training table.")],
    overrides: Overrides = None,
    config: ConfigFile = "toy_8k",
    encoders: Annotated[str | None, typer.Option(help="Instead of the configuration's.")] = None,
    seconds: Annotated[
        str | None,
        typer.Option(help="Of each video, instead of the configuration's; whole for all of it."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: of n processes, on any machines, the i-th from 0; default as torchrun says."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace features that were made otherwise.")
    ] = False,
    pack_to: Annotated[
        Path | None,
        typer.Option("--pack", help="Then pack the table into this folder, as `wavflow pack`."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Encode videos and captions, and write the table that training reads."""
    from wavflow.config import load_config
    from wavflow.features.extract import extract
    from wavflow.features.weights import locked

    with counter("extract") as progress:
        result = extract(
            csv,
            out,
            config=load_config(config, overrides or ()),
            encoders=encoders,
            seconds=None if seconds is None else _seconds(seconds),
            shard=None if shard is None else _shard(shard),
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    _say(f"{result.csv}: {result.done} extracted, {result.kept} kept, {result.failed} failed")
    if result.unfinished:
        _say(f"shards that have not ended: {result.unfinished}; the last completes {result.csv}")
    elif pack_to is not None:
        with locked(pack_to):  # two shards may both be the last
            pack(result.csv, pack_to, overrides, config)
    _exit(result.done + result.kept, result.failed, result.report)


@app.command()
def pack(
    csv: Annotated[Path, typer.Option(help="A training table, as `wavflow extract` writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    overrides: Overrides = None,
    config: ConfigFile = "toy_8k",
    shard_mb: Annotated[int, typer.Option(help="MB in a shard.")] = 512,
    workers: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Pack a training table into WebDataset shards, which training reads without decoding."""
    from wavflow.config import load_config
    from wavflow.data.store import pack

    data = load_config(config, overrides or ()).data
    with counter("pack") as progress:
        result = pack(csv, out, data, shard_mb=shard_mb, workers=workers, progress=progress)
    _say(f"{result.folder}: {result.done} packed, {result.failed} failed")
    _exit(result.done, result.failed, result.report)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps and say what the run will need.")
    ] = False,
    overfit: Annotated[
        int | None, typer.Option(help="Train on the first so many clips alone.", min=1)
    ] = None,
) -> None:
    """Train, or go on with the run that the configuration describes."""
    from wavflow.trainer import loss_text
    from wavflow.training import train, try_out

    overrides = list(overrides or ())
    if overfit is not None:
        overrides.append(f"training.overfit={overfit}")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if dry_run:
            found = try_out(config, overrides)
            if is_main:
                _say(str(found))
            return
        result = train(config, overrides)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if is_main:
        _say(
            f"{result.checkpoint}: {result.steps} steps, {result.parameters / 1e6:.1f} M "
            f"parameters{loss_text(result.loss)}, {result.seconds:.0f} s"
        )


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A folder of shards.")],
    out: Annotated[Path, typer.Argument(help="The .pth file to write.")],
) -> None:
    """Write a checkpoint's shards as one file in the public layout."""
    from wavflow.state import convert

    convert(checkpoint, out)
    _say(f"{out}: {out.stat().st_size / 1e9:.2f} GB")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs, overlaid.")],
    out: Annotated[Path | None, typer.Option(help="PNG; default RUN/curves.png.")] = None,
) -> None:
    """Draw the losses of training runs, and what else their metrics.jsonl hold, over the steps."""
    from wavflow.curves import plot_runs

    _say(str(plot_runs(runs, out)))


@app.command()
def generate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="A .wav or .flac file; with --csv a folder.")],
    caption: Annotated[str | None, typer.Option(help="What is heard.")] = None,
    video: Annotated[Path | None, typer.Option(help="What is seen.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table: video_path, caption, ...")] = None,
    config: Annotated[str | None, typer.Option(help="For a checkpoint that carries none.")] = None,
    ema: Annotated[str, typer.Option(help="ema1, ema2 or none.")] = "ema1",
    seed: Seed = 42,
    seconds: Annotated[float | None, typer.Option(help="Length; default as trained.")] = None,
    negative_caption: Annotated[
        str | None, typer.Option(help="What guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 or less is none; default as trained.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Times of guidance, from 0 (noise) to 1 (sound); with --solver throughout."
        ),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0 to 1: how much of guidance's gain in loudness to take back.")
    ] = 0.0,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler (with --steps 50 the public behaviour), midpoint, heun, rk4, ab2, 2m or "
            "adaptive; default the best measured, with its own steps, times and guidance interval."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps; with --solver the default is as trained.")
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(help="even, sigmoid or log-snr; with --solver the default is even."),
    ] = None,
    loudness: Annotated[float, typer.Option(help="LUFS of the output.")] = -23.0,
    keep_loudness: Annotated[bool, typer.Option("--keep-loudness", help="As generated.")] = False,
    window: Annotated[
        float | None,
        typer.Option(
            help="Seconds of the windows that a longer sound is made of, default as trained; 0 "
            "makes any sound at once."
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Seconds that neighbouring windows share; default a fifth of one."),
    ] = None,
    attention_window: Annotated[
        float | None,
        typer.Option(help="Seconds away that sound is attended to; default as trained."),
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="With --window 0, of sounds longer than in training: none, linear or ntk."
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Write --out as it is made, in memory that stays; as generated."
        ),
    ] = False,
    recording: Annotated[
        Path | None, typer.Option(help="A sound to go on from, up to --seconds.")
    ] = None,
    gap: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Seconds from and to which --recording is replaced."),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Lead the sound's end into its beginning.")
    ] = False,
    mux: Annotated[
        bool, typer.Option("--mux", help="Also write the video with the sound, as .mp4.")
    ] = False,
    format: Annotated[str, typer.Option(help="With --csv: wav or flac.")] = "wav",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --csv: replace sounds made otherwise.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Clips at a time, at most.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto, eager, graph (CUDA graphs), compile.")
    ] = "auto",
) -> None:
    """Generate sound for a caption, a video, both, or a table of them."""
    from wavflow.audio import WavWriter, load_audio
    from wavflow.config import load_config
    from wavflow.features import guard
    from wavflow.infer import infer
    from wavflow.parallel import join
    from wavflow.sampler import Sampler
    from wavflow.sound import Sound

    given = [name for name, value in (("--caption", caption), ("--video", video)) if value]
    if (csv is None) == (not given and recording is None):
        raise InputError("give --caption, --video or both, or --csv alone")
    special = {"--stream": stream, "--recording": recording is not None, "--loop": loop}
    asked = [name for name, is_asked in special.items() if is_asked]
    if len(asked) > 1 or (asked and csv is not None):
        others = " and ".join([*asked, *(["--csv"] if csv is not None else [])])
        raise InputError(f"{others} do not go together")
    if loop and (caption is None or video is not None):
        raise InputError("--loop wants --caption, and no video")
    if gap is not None and recording is None:
        raise InputError("--gap wants --recording: what it is a gap of")
    if csv is None and out.suffix.lower() not in (".wav", ".flac"):
        raise InputError(f"--out is {out}; wanted a .wav or .flac file")
    if stream and out.suffix.lower() != ".wav":
        raise InputError(f"--out is {out}; wanted a .wav file with --stream")
    if csv is not None and negative_caption is not None:
        raise InputError("--negative-caption goes with --caption or --video, not with --csv")
    if format not in ("wav", "flac"):
        raise InputError(f"--format is {format!r}; wanted wav or flac")
    if mux and csv is None and video is None:
        raise InputError("--mux wants --video: what the sound goes into")
    # A recording's level stands; that of a stream is known at its end only.
    level = None if keep_loudness or stream or recording is not None else loudness
    if video is not None:
        guard.start()
    options: dict[str, Any] = {
        "solver": solver,
        "steps": steps,
        "times": times,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale,
        "seconds": seconds,
        "window": window,
        "overlap": overlap,
        "batch_size": batch_size,
    }
    with join(device) as world, counter("generate") as progress:
        if world.size > 1 and csv is not None:
            raise InputError("--csv wants one process; several share the windows of one sound")
        sampler = Sampler.load(
            checkpoint,
            str(world.device),
            dtype,
            ema,
            None if config is None else load_config(config),
            engine,
            world,
            attention_window,
            rope_scaling,
        )
        if csv is not None:
            result = infer(
                sampler,
                csv,
                out,
                seed=seed,
                loudness=level,
                format=format,
                mux=mux,
                overwrite=overwrite,
                progress=progress,
                **options,
            )
        else:
            if world.is_main:
                options["on_step"] = lambda step: step.total and progress(step.done, step.total)
            options |= {"seed": seed, "negative_caption": negative_caption}
            if stream:
                writer = WavWriter(out, sampler.sample_rate) if world.is_main else nullcontext()
                with writer as file:
                    for part in sampler.stream(caption, video, **options):
                        if file is not None:
                            file.write(part.audio)
            elif recording is not None:
                sound = sampler.complete(recording, caption, video, gap=gap, **options)
            elif loop and caption is not None:
                sound = sampler.loop(caption, **options)
            else:
                sound = sampler(caption, video, loudness=level, **options)
    if csv is not None:
        _say(f"{result.out}: {result.done} generated, {result.failed} failed")
        _exit(result.done, result.failed, result.report)
    elif world.is_main:
        if stream:
            sound = Sound(load_audio(out, sampler.sample_rate), sampler.sample_rate)
        else:
            sound.save(out)
        _say(f"{out}: {sound.seconds:.2f} s at {sound.sample_rate} Hz")
        if mux and video is not None:
            sound.save_video(video, out.with_suffix(".mp4"))
            _say(str(out.with_suffix(".mp4")))


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="To listen at.", min=1, max=65535)] = 7860,
    max_seconds: Annotated[float, typer.Option(help="Of a sound, at most.")] = 30.0,
    max_upload_mb: Annotated[int, typer.Option(help="Of a video, at most.")] = 256,
    config: Annotated[str | None, typer.Option(help="For a checkpoint that carries none.")] = None,
    ema: Annotated[str, typer.Option(help="ema1, ema2 or none.")] = "ema1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto, eager, graph (CUDA graphs), compile.")
    ] = "auto",
) -> None:
    """Serve a web page to generate sound: captions, videos, previews on the way."""
    from wavflow.config import load_config
    from wavflow.serve.server import serve
    from wavflow.serve.studio import Limits

    serve(
        checkpoint,
        host=host,
        port=port,
        limits=Limits(seconds=max_seconds, upload_mb=max_upload_mb),
        device=device,
        dtype=dtype,
        ema=ema,
        config=None if config is None else load_config(config),
        engine=engine,
    )


@app.command()
def infer(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Generate for a table as a YAML file says: model.ckpt_path, data.csv_path, output, ..."""
    from wavflow.config import load_config
    from wavflow.infer import infer_config

    loaded = load_config(config, overrides or ())
    with counter("generate") as progress:
        result = infer_config(loaded, progress=progress)
    _say(f"{result.out}: {result.done} generated, {result.failed} failed")
    _exit(result.done, result.failed, result.report)


@app.command("eval")
def evaluate(
    gen: Annotated[Path, typer.Option(help="Folder of generated sounds, .wav or .flac.")],
    true: Annotated[Path, typer.Option(help="Folder of true sounds; stems are ids.")],
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
        list[str] | None, typer.Option(help="NAME=GENERATED[,TRUE]: a classifier's.")
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
        bool, typer.Option("--fad-infinity", help="Also without the bias of few sounds.")
    ] = False,
    splits: Annotated[int, typer.Option(help="Parts of an inception score.")] = 10,
    resamples: Annotated[int, typer.Option(help="Of a bootstrap interval.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of an interval.")] = 0.95,
    seed: Seed = 0,
    json: Annotated[Path | None, typer.Option(help="File for everything, by id too.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when anything was left out.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of ast and clap: auto, cpu, cuda, cuda:N.")] = "auto",
    workers: Workers = None,
) -> None:
    """Judge generated sounds by true ones: distances of sets, figures of pairs, checks."""
    from wavflow.evaluation.evaluate import Given, evaluate
    from wavflow.evaluation.figures import Settings
    from wavflow.evaluation.report import show

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
        _say(str(json))
    if strict and result.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for sounds, pictures and report.html.")] = Path(
        "out/demo"
    ),
    seed: Seed = 0,
    train: Annotated[
        str,
        typer.Option(
            help="Of a network from nothing: quick (a minute), full (as many steps as the packaged "
            "one took, to the same bars; says beforehand how long that takes), none."
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


@app.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint or packaged weights to describe.")
    ] = None,
) -> None:
    """Print versions, what runs here, and what a checkpoint holds."""
    import platform

    import torch

    from wavflow import precision
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
    from wavflow.checkpoint import SAFETENSORS, find, load, read_weights

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
        data = config["data"]
        lines.append(
            f"  {config['model']['name']}, encoders {config['model']['encoders']}, "
            f"{data['audio_duration']} s at {data['target_sample_rate']} Hz"
        )
    return lines


def _lines(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _say(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=True, markup=False)


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


def _exit(done: int, failed: int, report: Path) -> None:
    if failed:
        _say(f"{failed} rows failed; {report} says why")
        raise typer.Exit(1 if done else 2)


def _fail(error: object) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)
