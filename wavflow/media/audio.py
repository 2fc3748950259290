"""Sound files in and out: always mono float32 tensors (t,) in [-1, 1] on the CPU."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write
from wavflow.media.container import open_media, unreadable

#: Containers whose audio track FFmpeg reads; every other suffix goes to libsndfile.
CONTAINERS = frozenset(
    {".mp4", ".m4a", ".m4v", ".mov", ".mkv", ".mka", ".webm", ".avi", ".aac", ".3gp", ".ts"}
)
FORMATS = {".wav": "WAV", ".flac": "FLAC"}
#: One step of a 16-bit file: a sound that never exceeds it is dither or nothing.
SILENCE_PEAK = 2.0**-15
#: Lowest and highest rate of a file, in Hz: resampled from less, a small file would become
#: gigabytes.
RATES = (1_000, 768_000)
#: Samples of one channel that are read of a file, at most: 6 hours at 48 kHz.
MAX_SAMPLES = 2**30
#: Samples of all channels read at a time: a header may promise more than there is memory.
_BLOCK = 2**22
#: Seconds read beyond a cut, so that the resampler sees what lies there.
_MARGIN = 0.25
#: Rates whose ratio has terms up to this are resampled without drift: 44100 to 16000 Hz is 441/160.
_SIMPLE = 1000


def load_audio(
    path: str | os.PathLike[str], rate: int, max_seconds: float | None = None
) -> Tensor:  # (t,)
    """Read a sound file, or the audio track of a video, as mono float32 at `rate` Hz.

    Channels are averaged, then resampled (soxr HQ). `max_seconds` keeps at most the first
    round(max_seconds * rate) samples. InputError when the file is missing, unreadable, has no
    audio, is empty, holds NaN or infinity, has a rate outside `RATES` or more than `MAX_SAMPLES`.
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
    _check_finite(path, wave)
    wave = resample(wave, found, rate)
    if wave.size == 0:
        raise InputError(f"{path}: too short to be resampled from {found} to {rate} Hz")
    if max_seconds is not None:
        wave = wave[: max(1, round(max_seconds * rate))]
    return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))


class SoundFile:
    """A wav or flac whose parts are read when they are asked for: `file[start:stop]`.

    A part is (t,) mono float32 at `rate` Hz: the samples of `load_audio`, exactly where that is the
    file's own rate. Else it is resampled together with what lies around it, which differs by less
    than 1e-5.

    Args:
        path: the file.
        rate: rate of the parts, in Hz.

    Attributes:
        size: number of samples at that rate.
        agrees: whether parts are so near to `load_audio`. They are not where the rates have no
            simple ratio: resampling the whole drifts, by 4e-4 in 15 minutes from 47999 to 16000 Hz.

    Raises:
        InputError: the file is missing, unreadable, empty or has a rate outside `RATES`. Reading a
            part: it ends before its header says, or holds NaN or infinity.
    """

    def __init__(self, path: Path, rate: int) -> None:
        self.path = path
        self._samples, found = _sound_facts(path)
        _check_rate(path, found)
        common = math.gcd(found, rate)
        # So many samples of the file are as long as so many at the rate that is wanted.
        self._theirs, self._ours = found // common, rate // common
        self._found, self._rate = found, rate
        self.agrees = max(self._theirs, self._ours) <= _SIMPLE
        self.size = (2 * self._samples * self._ours // self._theirs + 1) // 2
        if not self.size:
            raise InputError(f"{path}: no audio samples, wanted at least one")

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        if self._found == self._rate:
            return self._read(start, stop)
        margin = math.ceil(_MARGIN * self._rate)
        # Where samples of both rates coincide.
        first = max(start - margin, 0) // self._ours
        last = min(-(-(stop + margin) * self._theirs // self._ours), self._samples)
        wave = resample(self._read(first * self._theirs, last), self._found, self._rate)
        begin = start - first * self._ours
        return wave[begin : begin + stop - start]

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Samples of the file, at its own rate."""
        import soundfile

        try:
            with soundfile.SoundFile(self.path) as file:
                file.seek(start)
                wave = file.read(stop - start, dtype="float32", always_2d=True).mean(axis=1)
        except (soundfile.SoundFileError, OSError) as error:
            raise unreadable(self.path, "audio", " ".join(str(error).split())) from None
        if wave.size < stop - start:
            raise InputError(
                f"{self.path}: ends at sample {start + wave.size}, wanted the {self._samples} that "
                "its header promises"
            )
        _check_finite(self.path, wave, start)
        return wave


class _Mono:
    """Collects what is read: the first `limit` seconds and no more than `MAX_SAMPLES`."""

    def __init__(self, path: Path, rate: int, limit: float | None) -> None:
        _check_rate(path, rate)
        self.path, self.rate = path, rate
        self.wanted = None if limit is None else int(limit * rate) + 1
        self.samples = 0
        self._parts: list[np.ndarray] = []

    def add(self, part: np.ndarray) -> bool:
        """Takes the next samples (t,); returns whether more are wanted."""
        self._parts.append(part)
        self.samples += part.size
        if self.wanted is not None and self.samples >= self.wanted:
            return False
        if self.samples > MAX_SAMPLES:
            raise InputError(f"{self.path}: more than {MAX_SAMPLES} samples, wanted at most that")
        return True

    def wave(self) -> np.ndarray:
        return np.concatenate(self._parts)[: self.wanted] if self._parts else np.zeros(0, "f4")


def resample(wave: np.ndarray, found: int, rate: int) -> np.ndarray:  # (t,) float32
    """Resamples a wave (t,) from `found` to `rate` Hz (soxr HQ); empty where it is too short."""
    if found == rate:
        return wave
    import soxr

    return soxr.resample(wave, found, rate)


def sound_rate(path: str | os.PathLike[str]) -> int:
    """The rate of a wav or flac in Hz, from its header.

    Raises:
        InputError: it is missing or unreadable.
    """
    return _sound_facts(path)[1]


def _sound_facts(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Samples of one channel and rate in Hz of a wav or flac, from its header."""
    import soundfile

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, wanted audio")
    try:
        info = soundfile.info(path)
        return int(info.frames), int(info.samplerate)
    except (soundfile.SoundFileError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as audio ({reason})") from None


def _check_rate(path: Path, rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{path}: {rate} Hz, wanted {RATES[0]} to {RATES[1]}")


def _check_finite(path: Path, wave: np.ndarray, first: int = 0) -> None:
    if not np.isfinite(wave).all():
        at = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise InputError(f"{path}: sample {first + at} is {wave[at]}, wanted finite samples")


def _read_sound(path: Path, limit: float | None) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            mono = _Mono(path, file.samplerate, limit)
            block = max(1, _BLOCK // file.channels)
            more = True
            while more:
                left = block if mono.wanted is None else min(block, mono.wanted - mono.samples)
                part = file.read(left, dtype="float32", always_2d=True)
                more = mono.add(part.mean(axis=1)) and len(part) == left
    except (soundfile.SoundFileError, OSError) as error:
        raise unreadable(path, "audio", " ".join(str(error).split())) from None
    return mono.wave(), mono.rate


def _read_container(path: Path, limit: float | None) -> tuple[np.ndarray, int]:
    import av

    try:
        with open_media(path, "audio") as container:
            if not container.streams.audio:
                raise InputError(f"{path}: no audio track")
            stream = container.streams.audio[0]
            mono = _Mono(path, stream.codec_context.sample_rate, limit)
            planar = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                parts = [part.to_ndarray() for part in planar.resample(frame)]
                if not all([mono.add(part.mean(axis=0, dtype=np.float32)) for part in parts]):
                    break
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, "audio", error.strerror) from None
    return mono.wave(), mono.rate


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
    _check_finite(path, wave)
    import soundfile

    with atomic_write(path) as file:
        soundfile.write(
            file, _pcm(wave), rate, format=FORMATS[path.suffix.lower()], subtype="PCM_16"
        )


class WavWriter:
    """Writes a .wav of 16-bit PCM part by part; after every part the file is whole.

    Args:
        path: the .wav to write; an existing one is replaced.
        rate: samples per second (Hz).
    """

    def __init__(self, path: str | os.PathLike[str], rate: int) -> None:
        from wave import open as open_wave

        self._file = open(path, "wb")
        self._wave = open_wave(self._file, "wb")
        self._wave.setparams((1, 2, rate, 0, "NONE", ""))
        self._wave.writeframes(b"")

    def write(self, part: Tensor) -> None:  # (t,)
        """Appends samples, clipped beyond [-1, 1], and brings them to the disk."""
        self._wave.writeframes(_pcm(part.detach().cpu().double().numpy()).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._wave.close()
        self._file.close()


def _pcm(wave: np.ndarray) -> np.ndarray:  # int16, little-endian
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype("<i2")


def is_silent(wave: Tensor) -> bool:
    """True when no sample of `wave` exceeds one step of a 16-bit file."""
    # numpy: torch would start OpenMP threads beside the loader thread that asks.
    return wave.numel() == 0 or float(np.abs(wave.numpy()).max()) <= SILENCE_PEAK
