"""Finding two folders' sounds by id, and measuring all of them in worker processes, each once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.evaluation.signals import Checks, check, compare
from wavflow.media.audio import FORMATS, load_audio, resample, sound_rate

GENERATED, TRUE = "generated", "true"
SIDES = (GENERATED, TRUE)


@dataclass(frozen=True)
class Measure:
    """A function of (wave (t,), rate in Hz) that is computed for every sound.

    With `rate` None it is computed at the rate of the comparison.
    """

    name: str
    function: Callable[[Tensor, int], Any]
    rate: int | None = None


@dataclass(frozen=True)
class Heard:
    """What was measured of an id's sounds; a side that is missing has no entry anywhere.

    Attributes:
        id: the files' stem.
        checks: checks of each sound, by side.
        measured: results of the measures, by side and name.
        distances: distances of the pair, by name; empty where a side is missing.
        problems: why a file could not be read, by side.
    """

    id: str
    checks: dict[str, Checks] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def find_sounds(folder: Path) -> dict[str, Path]:
    """The wav and flac files of a folder by id, their stem.

    Raises:
        InputError: no such folder, no sound in it, or two of one id.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, wanted sounds")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in FORMATS or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise InputError(f"{folder}: {found[path.stem].name} and {path.name} have one id")
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: no .wav or .flac file")
    return found


def lowest_rate(sounds: Mapping[str, Mapping[str, Path]]) -> int:
    """The lowest rate in Hz of all sounds that can be read; above it a side may lack frequencies.

    Raises:
        InputError: no sound of a side can be read.
    """
    lowest = []
    for side, paths in sounds.items():
        rates, reasons = [], []
        for path in paths.values():
            try:
                rates.append(sound_rate(path))
            except InputError as error:
                reasons.append(error)
        if not rates:
            raise InputError(f"no {side} sound can be read, the first one: {reasons[0]}")
        lowest.append(min(rates))
    return min(lowest)


def listen(
    sounds: Mapping[str, Mapping[str, Path]],
    rate: int,
    measures: Sequence[Measure] = (),
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Heard]:
    """Measures all sounds, in the order of their ids.

    Args:
        sounds: the files, {side: {id: path}}.
        rate: Hz at which pairs are compared.
        measures: functions of every sound. They are sent to the workers, by pickle.
        workers: number of processes; default one per core, 0 stays in this one.
        progress: called with (ids done, ids in all).
    """
    ids = sorted(set().union(*sounds.values()))
    jobs = [(id, {side: by[id] for side, by in sounds.items() if id in by}) for id in ids]
    found: dict[str, Heard] = {}
    for heard in _run(partial(_listen, rate=rate, measures=tuple(measures)), jobs, workers):
        found[heard.id] = heard
        if progress is not None:
            progress(len(found), len(ids))
    return [found[id] for id in ids]


_Job = tuple[str, dict[str, Path]]


def _run(
    work: Callable[[_Job], Heard], jobs: Sequence[_Job], workers: int | None
) -> Iterator[Heard]:
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    # Forked workers start at once; a process that uses CUDA cannot be forked.
    fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                id, paths = futures.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield Heard(id, problems=dict.fromkeys(paths, "a worker process died"))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _listen(job: _Job, rate: int, measures: Sequence[Measure]) -> Heard:
    id, paths = job
    heard = Heard(id)
    waves = {}
    for side, path in paths.items():
        try:
            own = sound_rate(path)
            wave = load_audio(path, own)
            rates = {rate, *(measure.rate or rate for measure in measures)}
            at = {wanted: _resampled(path, wave, own, wanted) for wanted in rates}
            results = {m.name: m.function(at[m.rate or rate], m.rate or rate) for m in measures}
        except InputError as error:
            heard.problems[side] = str(error)
            continue
        except Exception as error:  # one file must not take the others along
            heard.problems[side] = f"{path}: {type(error).__name__}: {error}"
            continue
        waves[side] = at[rate]
        heard.checks[side], heard.measured[side] = check(wave, own), results
    if len(waves) == len(SIDES):
        heard.distances.update(_distances(heard, waves))
    return heard


def _resampled(path: Path, wave: Tensor, own: int, rate: int) -> Tensor:
    new = resample(wave.numpy(), own, rate)
    if not new.size:
        raise InputError(f"{path}: too short to be resampled from {own} to {rate} Hz")
    return torch.from_numpy(new)


def _distances(heard: Heard, waves: Mapping[str, Tensor]) -> dict[str, float]:
    got, true = (heard.checks[side] for side in SIDES)
    found = compare(waves[GENERATED], waves[TRUE])
    found["duration_difference"] = abs(got.seconds - true.seconds)
    if got.lufs is not None and true.lufs is not None:
        found["loudness_difference"] = abs(got.lufs - true.lufs)
    return found
