"""Sound files in and out: always mono float32 tensors (t,) in [-1, 1] on the CPU."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavflow.errors import InputError
from wavflow.files import atomic_write

#: Containers whose audio track FFmpeg reads; every other suffix goes to libsndfile.
CONTAINERS = frozenset(
    {".mp4", ".m4a", ".m4v", ".mov", ".mkv", ".mka", ".webm", ".avi", ".aac", ".3gp", ".ts"}
)
FORMATS = {".wav": "WAV", ".flac": "FLAC"}
#: Containers that `mux` writes, and FFmpeg's names for them.
MUXED = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
#: One step of a 16-bit file: a sound that never exceeds it is dither or nothing.
SILENCE_PEAK = 2.0**-15
#: Seconds read beyond `max_seconds`, so that the resampler sees what follows the cut.
_MARGIN = 0.25


def load_audio(
    path: str | os.PathLike[str], rate: int, max_seconds: float | None = None
) -> Tensor:  # (t,)
    """Read a sound file, or the audio track of a video, as mono float32 at `rate` Hz.

    Channels are averaged, then resampled (soxr HQ). `max_seconds` keeps at most the first
    round(max_seconds * rate) samples. InputError when the file is missing, unreadable, has no
    audio, is empty or holds NaN or infinity.
    """
    path = Path(path)
    if rate <= 0:
        raise ValueError(f"rate is {rate}, wanted a positive number of Hz")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds is {max_seconds}, wanted a positive number")
    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted audio")
    limit = None if max_seconds is None else max_seconds + _MARGIN
    read = _read_container if path.suffix.lower() in CONTAINERS else _read_sound
    wave, found = read(path, limit)
    if wave.size == 0:
        raise InputError(f"{path}: no audio samples, wanted at least one")
    if not np.isfinite(wave).all():
        at = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise InputError(f"{path}: sample {at} is {wave[at]}, wanted finite samples")
    if found != rate:
        import soxr

        wave = soxr.resample(wave, found, rate)
        if wave.size == 0:
            raise InputError(f"{path}: too short to be resampled from {found} to {rate} Hz")
    if max_seconds is not None:
        wave = wave[: max(1, round(max_seconds * rate))]
    return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))


def _read_sound(path: Path, limit: float | None) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            frames = -1 if limit is None else int(limit * file.samplerate) + 1
            wave = file.read(frames, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as audio ({reason})") from None
    return wave.mean(axis=1), rate


def _read_container(path: Path, limit: float | None) -> tuple[np.ndarray, int]:
    import av

    parts: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise InputError(f"{path}: no audio track")
            stream = container.streams.audio[0]
            rate = stream.codec_context.sample_rate
            planar = av.AudioResampler(format="fltp")
            samples = 0
            for frame in container.decode(stream):
                if limit is not None and samples > limit * rate:
                    break
                for part in planar.resample(frame):
                    parts.append(part.to_ndarray().mean(axis=0, dtype=np.float32))
                    samples += parts[-1].size
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not readable as audio ({error.strerror})") from None
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), rate


def save_wav(path: str | os.PathLike[str], wave: Tensor | np.ndarray, rate: int) -> None:
    """Write `wave` (t,) as 16-bit PCM, atomically; a name ending in .flac gives FLAC.

    Samples beyond [-1, 1] are clipped, never wrapped. InputError when a sample is NaN or
    infinite or there is none; ValueError for another shape or suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: suffix {path.suffix!r}, wanted .wav or .flac")
    if isinstance(wave, Tensor):
        wave = wave.detach().to("cpu", torch.float64).numpy()
    wave = np.asarray(wave, dtype=np.float64)
    if wave.ndim != 1:
        raise ValueError(f"{path}: wave has shape {wave.shape}, wanted (t,)")
    if wave.size == 0:
        raise InputError(f"{path}: no samples to write")
    if not np.isfinite(wave).all():
        at = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise InputError(f"{path}: sample {at} is {wave[at]}, wanted finite samples")
    pcm = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    import soundfile

    with atomic_write(path) as file:
        soundfile.write(file, pcm, rate, format=FORMATS[path.suffix.lower()], subtype="PCM_16")


def mux(
    video: str | os.PathLike[str],
    wave: Tensor,
    rate: int,
    path: str | os.PathLike[str],
) -> None:
    """Writes a copy of a video's pictures with `wave` (t,) at `rate` Hz as its only sound.

    Pictures are copied as they are encoded, to the wave's end; sound becomes AAC of 192 kbit/s.

    Args:
        video: with a video track; its own sound is left out.
        wave: float32 in [-1, 1].
        rate: in Hz.
        path: the suffix, .mp4, .mov or .mkv, is the container.

    Raises:
        InputError: no video track, unreadable, or a track the container cannot hold.
        ValueError: another suffix.
    """
    import av

    path, seconds = Path(path), wave.numel() / rate
    if path.suffix.lower() not in MUXED:
        raise ValueError(f"{path}: suffix {path.suffix!r}, wanted {', '.join(MUXED)}")
    pcm = np.clip(wave.detach().cpu().numpy(), -1, 1).astype(np.float32)[None]
    try:
        with av.open(str(video)) as source, atomic_write(path) as file:
            if not source.streams.video:
                raise InputError(f"{video}: no video track")
            pictures = source.streams.video[0]
            with av.open(file, "w", format=MUXED[path.suffix.lower()]) as out:
                shown = out.add_stream_from_template(pictures)
                heard = out.add_stream("aac", rate=rate, layout="mono", bit_rate=192_000)
                for packet in source.demux(pictures):
                    if packet.dts is None:
                        continue
                    if packet.pts is not None and packet.pts * pictures.time_base >= seconds:
                        continue
                    packet.stream = shown
                    out.mux(packet)
                frame = av.AudioFrame.from_ndarray(pcm, format="fltp", layout="mono")
                # With a time of its own AAC's delay of 1024 samples is cut by the container.
                frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
                for packet in (*heard.encode(frame), *heard.encode(None)):
                    out.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{video}: cannot be muxed into {path.name} ({error.strerror})") from None


def normalize_loudness(wave: Tensor, rate: int, lufs: float = -23.0) -> Tensor:  # (t,)
    """Scale `wave` (t,) to an integrated loudness of `lufs` (ITU-R BS.1770-4).

    Left as it is when shorter than one 0.4 s block or below -70 LUFS, the standard's absolute
    gate. When the gain would push the peak beyond 1, the peak becomes 0.99 instead.
    """
    if wave.ndim != 1:
        raise ValueError(f"normalize_loudness: wave has shape {tuple(wave.shape)}, wanted (t,)")
    import pyloudnorm

    meter = pyloudnorm.Meter(rate)
    if wave.numel() < meter.block_size * rate:
        return wave
    with np.errstate(divide="ignore"):
        loudness = meter.integrated_loudness(wave.detach().to("cpu", torch.float64).numpy())
    if not loudness >= -70.0:
        return wave
    wave = wave * 10.0 ** ((lufs - loudness) / 20.0)
    peak = float(wave.abs().max())
    return wave * (0.99 / peak) if peak > 1.0 else wave


def is_silent(wave: Tensor) -> bool:
    """True when no sample of `wave` exceeds one step of a 16-bit file."""
    # numpy: torch would start OpenMP threads beside the loader thread that asks.
    return wave.numel() == 0 or float(np.abs(wave.numpy()).max()) <= SILENCE_PEAK
