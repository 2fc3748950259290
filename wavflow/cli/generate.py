"""Commands that make sound."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wavflow.base.console import counter
from wavflow.base.errors import InputError
from wavflow.cli.shared import Checkpoint, ConfigFile, Overrides, Overwrite, Seed, finish, say

if TYPE_CHECKING:
    from wavflow.pipeline.request import Options
    from wavflow.sampling.plan import Step


def generate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="A .wav or .flac file; with --csv a folder.")],
    caption: Annotated[str | None, typer.Option(help="Text of what is heard.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video to make sound for.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table: video_path, caption, ...")] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration, for a checkpoint that carries none.")
    ] = None,
    ema: Annotated[str, typer.Option(help="Weights: ema1, ema2 or none.")] = "ema1",
    seed: Seed = 42,
    seconds: Annotated[float | None, typer.Option(help="Seconds; default as trained.")] = None,
    negative_caption: Annotated[
        str | None, typer.Option(help="Text that guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 or less is none; default as trained.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Times of guidance, from 0 (noise) to 1 (sound); with --solver the default is all."
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
        typer.Option(
            help="Spacing of times: even, sigmoid or log-snr; with --solver the default is even."
        ),
    ] = None,
    loudness: Annotated[float, typer.Option(help="Loudness of the sound, in LUFS.")] = -23.0,
    keep_loudness: Annotated[
        bool, typer.Option("--keep-loudness", help="Leave the loudness as generated.")
    ] = False,
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
        typer.Option(help="How many seconds away sound is attended to; default as trained."),
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="Positions in sounds longer than in training, with --window 0: none, linear, ntk."
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Write --out as it is made, in constant memory; loudness as generated."
        ),
    ] = False,
    recording: Annotated[
        Path | None, typer.Option(help="A sound to go on from, up to --seconds.")
    ] = None,
    gap: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Part of --recording to replace: from and to, in seconds."),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Lead the sound's end into its beginning.")
    ] = False,
    mux: Annotated[
        bool, typer.Option("--mux", help="Also write the video with the sound, as .mp4.")
    ] = False,
    format: Annotated[str, typer.Option(help="With --csv: wav or flac.")] = "wav",
    overwrite: Overwrite = False,
    batch_size: Annotated[int, typer.Option(help="Most clips at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto, eager, graph (CUDA graphs), compile.")
    ] = "auto",
) -> None:
    """Generate sound for a caption, a video, both, or a table of them."""
    from wavflow.base.files import check_output
    from wavflow.base.processes import join
    from wavflow.config.load import load_config
    from wavflow.media import video_worker
    from wavflow.media.audio import WavWriter, load_audio
    from wavflow.media.sound import Sound
    from wavflow.pipeline.request import Request, check_loudness
    from wavflow.pipeline.sampler import Sampler
    from wavflow.pipeline.table import infer

    request = Request(
        caption=caption,
        video=video,
        negative_caption=negative_caption,
        seconds=seconds,
        seed=seed,
        recording=recording,
        gap=gap,
        loop=loop,
        stream=stream,
    )
    given = {
        "--caption": caption,
        "--video": video,
        "--recording": recording,
        "--negative-caption": negative_caption,
        "--gap": gap,
        "--loop": loop,
        "--stream": stream,
    }
    others = [name for name, value in given.items() if value]
    if not others and csv is None:
        raise InputError("give --caption, --video or both, or --csv alone")
    if csv is not None and others:
        raise InputError(f"--csv and {', '.join(others)} do not go together")
    if csv is None:
        request.check()
        if out.suffix.lower() not in (".wav", ".flac"):
            raise InputError(f"--out is {out}; wanted a .wav or .flac file")
        if stream and out.suffix.lower() != ".wav":
            raise InputError(f"--out is {out}; wanted a .wav file with --stream")
        if mux and video is None:
            raise InputError("--mux wants --video: what the sound goes into")
        read = (video, recording, checkpoint, config)
        for path in (out, out.with_suffix(".mp4")) if mux else (out,):
            check_output(path, *read, overwrite=overwrite)
    check_loudness(loudness)
    if format not in ("wav", "flac"):
        raise InputError(f"--format is {format!r}; wanted wav or flac")
    # A recording's level stands; that of a stream is known at its end only.
    level = None if keep_loudness or stream or recording is not None else loudness
    if video is not None:
        video_worker.start()
    options: Options = {
        "solver": solver,
        "steps": steps,
        "times": times,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale,
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
                seconds=seconds,
                loudness=level,
                format=format,
                mux=mux,
                overwrite=overwrite,
                progress=progress,
                **options,
            )
            say(f"{result.out}: {result.done} generated, {result.failed} failed")
            return finish(result.done, result.failed, result.report)

        def show(step: Step) -> None:
            if step.total is not None:  # as of an adaptive solver
                progress(step.done, step.total)

        if world.is_main:
            options["on_step"] = show
        if stream:
            parts = sampler.stream(
                caption,
                video,
                negative_caption=negative_caption,
                seconds=seconds,
                seed=seed,
                **options,
            )
            with WavWriter(out, sampler.sample_rate) if world.is_main else nullcontext() as file:
                for part in parts:
                    if file is not None:
                        file.write(part.audio)
        else:
            sound = sampler.make(request, **options)
    if not world.is_main:
        return
    if stream:
        sound = Sound(load_audio(out, sampler.sample_rate), sampler.sample_rate)
    else:
        sound = sound if level is None or loop else sound.loud(level)
        sound.save(out)
    say(f"{out}: {sound.seconds:.2f} s at {sound.sample_rate} Hz")
    if mux and video is not None:
        sound.save_video(video, out.with_suffix(".mp4"))
        say(str(out.with_suffix(".mp4")))


def serve(
    checkpoint: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 7860,
    max_seconds: Annotated[float, typer.Option(help="Longest sound, in seconds.")] = 30.0,
    max_upload_mb: Annotated[int, typer.Option(help="Largest video, in MB.")] = 256,
    config: Annotated[
        str | None, typer.Option(help="Configuration, for a checkpoint that carries none.")
    ] = None,
    ema: Annotated[str, typer.Option(help="Weights: ema1, ema2 or none.")] = "ema1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto, eager, graph (CUDA graphs), compile.")
    ] = "auto",
) -> None:
    """Serve a web page to generate sound: captions, videos, previews on the way."""
    from wavflow.config.load import load_config
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


def infer(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Generate for a table as a YAML file says: model.ckpt_path, data.csv_path, output, ..."""
    from wavflow.config.load import load_config
    from wavflow.pipeline.table import infer_config

    loaded = load_config(config, overrides or ())
    with counter("generate") as progress:
        result = infer_config(loaded, progress=progress)
    say(f"{result.out}: {result.done} generated, {result.failed} failed")
    finish(result.done, result.failed, result.report)
