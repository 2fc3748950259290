"""Sound files in and out: always mono float32 tensors (t,) in [-1, 1] on the CPU."""

from __future__ import annotations

import math
import os
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write
from wavflow.media.container import (
    SLACK,
    broken_off,
    claimed_end,
    first_picture,
    open_media,
    packet_end,
    track,
    unreadable,
)

if TYPE_CHECKING:
    import av

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
#: Seconds that a container's times may differ from the count of samples: some count milliseconds.
_JITTER = Fraction(1, 20)
#: Seconds by which a container's times may go back; what is there already is left out.
_BACK = 1
#: Share of the power of unrelated channels below which their mean is what is left of antiphase.
_CANCELLED = 1e-3
#: Bytes of sound from which on a wav's header means that its writer did not know their number.
_ENDLESS = 2**31 - 2**16


def load_audio(
    path: str | os.PathLike[str],
    rate: int,
    max_seconds: float | None = None,
    *,
    partial: bool = False,
) -> Tensor:  # (t,)
    """Read a sound file, or the audio track of a video, as mono float32 at `rate` Hz.

    The first sample is heard when a video's first picture is shown: sound before it is left out,
    and where the track begins later, or has gaps, there is silence. Channels are averaged, then
    resampled (soxr HQ). `max_seconds` keeps at most the first round(max_seconds * rate) samples.
    What the file is decides who reads it, not what its name ends in.

    Raises InputError when the file is missing, unreadable, has no audio, is empty, holds NaN or
    infinity, has a rate outside `RATES` or more than `MAX_SAMPLES`, when its channels cancel out,
    or when it ends before its header says; `partial` takes what there is and warns.
    """
    path = Path(path)
    if rate <= 0:
        raise ValueError(f"rate is {rate}, wanted a positive number of Hz")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds is {max_seconds}, wanted a positive number")
    if not path.is_file():
        raise InputError(f"{path}: no such file, wanted audio")
    limit = None if max_seconds is None else max_seconds + _MARGIN
    mono = _read_sound(path, limit) if is_sound_file(path) else _read_container(path, limit)
    wave, found = mono.wave(), mono.rate
    if mono.broken is not None and (max_seconds is None or wave.size < int(max_seconds * found)):
        if not partial:
            raise InputError(mono.broken)
        warnings.warn(mono.broken, stacklevel=2)
    if wave.size == 0:
        raise InputError(f"{path}: no audio samples, wanted at least one")
    _check_finite(path, wave)
    mono.check_phase()
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
        agrees: whether parts are as near to the whole. They are not where the rates have no simple
            ratio: the whole's resampling drifts, by 4e-4 in 15 minutes from 47999 to 16000 Hz.
        phase: whether the channels of the parts that were read cancel out.

    Raises:
        InputError: the file is missing, unreadable, empty, ends before its header says or has a
            rate outside `RATES`. Reading a part: it ends before, or holds NaN or infinity.
    """

    def __init__(self, path: Path, rate: int) -> None:
        self.path = path
        self._samples, found = _sound_facts(path)
        if (broken := _cut_off(path, self._samples)) is not None:
            raise InputError(broken)
        self.phase = Phase()
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
                wave = self.phase.mix(file.read(stop - start, dtype="float32", always_2d=True).T)
        except (soundfile.SoundFileError, OSError) as error:
            raise unreadable(self.path, "audio", " ".join(str(error).split())) from None
        if wave.size < stop - start:
            raise InputError(
                f"{self.path}: ends at sample {start + wave.size}, wanted the {self._samples} that "
                "its header promises"
            )
        _check_finite(self.path, wave, start)
        return wave


class Phase:
    """Averages channels and notes whether they cancel out, as stereo in antiphase does."""

    def __init__(self) -> None:
        self._mixed = self._alone = 0.0

    def mix(self, part: np.ndarray) -> np.ndarray:  # (channels t) -> (t,)
        """The mean of the channels."""
        mixed = part.mean(axis=0, dtype=np.float32)
        if len(part) > 1 and part.size and np.isfinite(mixed).all():
            self._mixed += float(np.square(mixed, dtype=np.float64).sum())
            self._alone += float(np.square(part, dtype=np.float64).sum()) / len(part) ** 2
        return mixed

    def check(self, path: Path, samples: int) -> None:
        """Raises InputError where the mean is silent, or nearly, though the channels are not."""
        heard = self._alone > samples * SILENCE_PEAK**2
        if heard and self._mixed < _CANCELLED * self._alone:
            left = 10 * math.log10(max(self._mixed / self._alone, 1e-12))
            raise InputError(
                f"{path}: its channels are in antiphase and cancel out (their mean has {left:.0f} "
                "dB of their power), wanted one of them inverted or left out"
            )


class _Mono:
    """Collects what is read: the first `limit` seconds and no more than `MAX_SAMPLES`.

    Attributes:
        broken: what is wrong where sound ends before the file's header says, else None.
    """

    def __init__(self, path: Path, rate: int, limit: float | None) -> None:
        _check_rate(path, rate)
        self.path, self.rate = path, rate
        self.wanted = None if limit is None else int(limit * rate) + 1
        self.samples = 0
        self.broken: str | None = None
        self._parts: list[np.ndarray] = []
        self._phase = Phase()

    def add(self, part: np.ndarray) -> bool:
        """Takes the next samples (channels t); returns whether more are wanted."""
        return self._append(self._phase.mix(part))

    def _append(self, part: np.ndarray) -> bool:
        self._parts.append(part)
        self.samples += part.size
        if self.is_full:
            return False
        self.check_size(self.samples)
        return True

    @property
    def is_full(self) -> bool:
        return self.wanted is not None and self.samples >= self.wanted

    def check_size(self, samples: int) -> None:
        if samples > MAX_SAMPLES:
            raise InputError(f"{self.path}: more than {MAX_SAMPLES} samples, wanted at most that")

    def check_phase(self) -> None:
        self._phase.check(self.path, self.samples)

    def wave(self) -> np.ndarray:
        return np.concatenate(self._parts)[: self.wanted] if self._parts else np.zeros(0, "f4")


class _Track(_Mono):
    """Collects the frames of an audio track, each where its time says.

    Args:
        path: of the file.
        rate: in Hz, of the first frame; frames of another are resampled to it.
        limit: seconds after `zero` that are wanted, or None.
        zero: the time of the first sample, on the file's clock.
        timed: whether frames have times. Of raw AAC FFmpeg counts them by the first frame's rate.
    """

    def __init__(
        self, path: Path, rate: int, limit: float | None, zero: Fraction, *, timed: bool = True
    ) -> None:
        super().__init__(path, rate, limit)
        self._next, self._begun, self._timed = zero, False, timed
        self._gaps = Fraction(0)
        self._form: tuple[Any, ...] = ()
        self._run: list[np.ndarray] = []  # (channels t) each, of one rate that is not the first's
        self._run_size = 0

    def frame(self, frame: av.AudioFrame) -> bool:
        """Whether more is wanted after `frame`."""
        import av

        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self._form:
            self._end_run()
            if frame.sample_rate != self.rate:
                _check_rate(self.path, frame.sample_rate)
            self._planar, self._form = av.AudioResampler(format="fltp"), form
        rate = frame.sample_rate
        time = None
        if self._timed and frame.pts is not None and frame.time_base is not None:
            time = frame.pts * Fraction(frame.time_base)
        for each in self._planar.resample(frame):
            part = each.to_ndarray()
            late = Fraction(0) if time is None else time - self._next
            if self._begun and abs(late) <= _JITTER:
                late = Fraction(0)
            if late > 0:
                self._end_run()
                self._silence(late)
            elif late < 0:
                if self._begun and late < -_BACK:
                    raise InputError(
                        f"{self.path}: the times of its sound go back by {float(-late):.3f} s, "
                        "wanted times that rise"
                    )
                part = part[:, min(round(-late * rate), part.shape[1]) :]
            if part.shape[1]:
                self._begun = True
                self._next += Fraction(part.shape[1], rate)
                if rate == self.rate:
                    self.add(part)
                else:
                    self._run.append(part)
                    self._run_size += part.shape[1]
                    self.check_size(self._run_size)
            time = None
        if self._run and self.wanted is not None:
            return self.samples + self._run_size * self.rate // rate < self.wanted + self.rate
        return not self.is_full

    def _silence(self, seconds: Fraction) -> None:
        count = round(seconds * self.rate)
        self.check_size(self.samples + (count if self.wanted is None else 0))
        if self.wanted is not None:
            count = min(count, max(self.wanted - self.samples, 0))
        self._append(np.zeros(count, np.float32))
        self._next += seconds
        if self._begun:
            self._gaps += seconds

    def _end_run(self) -> None:
        """Puts what has another rate than the first frame behind the rest."""
        if self._run:
            run = np.concatenate(self._run, axis=1)
            found = self._form[2]
            self._run, self._run_size = [], 0
            wave = resample(self._phase.mix(run), found, self.rate)
            self._append(wave)

    def end(self) -> None:
        """Is called when there are no more frames."""
        self._end_run()
        if self._gaps:
            found = f"its sound has gaps of {float(self._gaps):.3f} s in all"
            warnings.warn(f"{self.path}: {found}, which are silent", stacklevel=4)


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


def is_sound_file(path: Path) -> bool:
    """Whether libsndfile is who reads a file, by how it begins; FFmpeg reads all others."""
    try:
        with open(path, "rb") as file:
            head = _skip_id3(file)
    except OSError as error:
        raise unreadable(path, "audio", error.strerror) from None
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return head[8:12] == b"WAVE"
    if head[:4] == b"FORM":
        return head[8:12] in (b"AIFF", b"AIFC")
    if head[:4] in (b"fLaC", b".snd", b"caff", b"riff"):
        return True
    # MPEG audio begins with 11 ones and a layer; ADTS, which FFmpeg reads, has layer 0.
    return len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0


def is_seekable_sound(path: Path) -> bool:
    """Whether a file is a wav or flac, of which `SoundFile` reads parts."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[:4] == b"fLaC" or (head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE")


def _counts_frames(path: Path) -> bool:
    """Whether the first frame of an MP3 says how many there are."""
    with open(path, "rb") as file:
        head = _skip_id3(file)
    return b"Xing" in head or b"Info" in head


def _skip_id3(file: BinaryIO) -> bytes:
    """The first bytes after the tag that may stand before sound."""
    head = file.read(64)
    if head[:3] == b"ID3" and len(head) > 10:
        size = 0
        for byte in head[6:10]:  # 7 bits each
            size = size << 7 | byte & 0x7F
        file.seek(10 + size)
        head = file.read(64)
    return head


def _cut_off(path: Path, found: int) -> str | None:
    """What is wrong with a sound file that ends before its header says; None for a whole one.

    Args:
        path: of the file.
        found: samples of one channel that there are.
    """
    with open(path, "rb") as file:
        promised = _promised(file, path.stat().st_size)
    if promised is None or promised <= found:
        return None
    return f"{path}: ends at sample {found}, wanted the {promised} that its header promises"


def _promised(file: BinaryIO, size: int) -> int | None:
    """Samples of one channel that a wav's header promises, where they are more than there is room.

    libsndfile goes by the size of the file. A writer that does not know the end, as of a stream,
    promises all that the header can say: that is no promise.
    """
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        return None
    align, large = 0, None
    while len(chunk := file.read(8)) == 8:
        name, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            if length == 0xFFFFFFFF and large is not None:
                length = large
            elif length >= _ENDLESS:
                return None
            return length // align if align and length > size - file.tell() else None
        begin = file.tell()
        body = file.read(min(length, 64))
        if name == b"fmt " and len(body) >= 16:
            align = struct.unpack_from("<H", body, 12)[0]
        if name == b"ds64" and len(body) >= 16:
            large = struct.unpack_from("<Q", body, 8)[0]
        file.seek(begin + length + length % 2)
    return None


def _read_sound(path: Path, limit: float | None) -> _Mono:
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            mono = _Mono(path, file.samplerate, limit)
            block = max(1, _BLOCK // file.channels)
            promised = file.frames
            if file.format in ("MP3", "MPEG"):  # an estimate, where its first frame does not say
                promised = promised - int(SLACK * file.samplerate) if _counts_frames(path) else 0
            more = True
            while more:
                left = block if mono.wanted is None else min(block, mono.wanted - mono.samples)
                part = file.read(left, dtype="float32", always_2d=True)
                more = mono.add(part.T) and len(part) == left
    except (soundfile.SoundFileError, OSError) as error:
        raise unreadable(path, "audio", " ".join(str(error).split())) from None
    if not mono.is_full:
        mono.broken = _cut_off(path, mono.samples)
        if mono.broken is None and mono.samples < promised:
            wanted = f"the {promised} that its header promises"
            mono.broken = f"{path}: ends at sample {mono.samples}, wanted {wanted}"
    return mono


def _read_container(path: Path, limit: float | None) -> _Mono:
    import av

    zero = first_picture(path, "audio")
    mono: _Track | None = None
    try:
        with open_media(path, "audio") as container:
            stream = track(container, "audio")
            if stream is None:
                raise InputError(f"{path}: no audio track")
            heard = seen = None  # up to when the sound and all streams go
            more = True
            # Of other streams packets alone are read: Matroska says how long the longest is.
            for packet in container.demux():
                end = packet_end(packet)
                seen = end if seen is None else max(seen, end or seen)
                if packet.stream.index != stream.index:
                    continue
                heard = end if heard is None else max(heard, end or heard)
                frame: Any  # of sound, as its packet is
                for frame in packet.decode():
                    if mono is None:
                        if zero is None:
                            zero = _time(frame)
                        timed = container.format.name != "aac"
                        mono = _Track(path, frame.sample_rate, limit, zero, timed=timed)
                    more = mono.frame(frame)
                    if not more:
                        break
                if not more:
                    break
            if mono is None:
                raise InputError(f"{path}: no audio samples, wanted at least one")
            mono.end()
            if more:
                for what, end in ((stream, heard), (None, seen)):
                    claimed = claimed_end(container, what)
                    if claimed is not None and end is not None and end < claimed - SLACK:
                        mono.broken = broken_off(path, "sound", end, claimed)
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, "audio", error.strerror) from None
    return mono


def _time(frame: av.AudioFrame) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        return Fraction(0)
    return frame.pts * Fraction(frame.time_base)


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
