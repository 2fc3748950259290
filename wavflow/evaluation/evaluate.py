"""Judging one folder of sounds by another, in figures: `wavflow eval`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.files import write_json
from wavflow.base.precision import resolve_device
from wavflow.base.version import __version__
from wavflow.data.manifest import read_manifest
from wavflow.evaluation.extractors import Clap, Extractor, get_extractor, melstats
from wavflow.evaluation.figures import Collector, Figure, Rows, Settings
from wavflow.evaluation.listen import (
    GENERATED,
    SIDES,
    TRUE,
    Heard,
    Measure,
    find_sounds,
    listen,
    lowest_rate,
)
from wavflow.evaluation.rows import read_rows
from wavflow.evaluation.toy import Listener, kind_features, match, onsets
from wavflow.media.audio import load_audio

MELSTATS, TOY = "melstats", "toy"
LEAST_RATE = 1000
_UNITS = {
    "log_spectral_distance": "dB",
    "stft_distance": "",
    "loudness_difference": "LU",
    "duration_difference": "s",
}
_PACKAGES = ("torch", "numpy", "soundfile", "soxr", "pyloudnorm")


@dataclass(frozen=True)
class Given:
    """Rows that were computed elsewhere, of the generated sounds and of what they go with.

    Attributes:
        kind: "embeddings" (Frechet and kernel distance), "logits" (inception score, KL),
            "similarity" (cosine of pairs), "offsets" (DeSync).
        name: name that the figures' names begin with.
        found: file or folder of the generated sounds' rows by id.
        wanted: the same for the true sounds, captions or videos; logits can do without it, offsets
            have none.
    """

    kind: str
    name: str
    found: Path
    wanted: Path | None = None

    @classmethod
    def parse(cls, kind: str, text: str) -> Given:
        """Reads NAME=FILE or NAME=FILE,FILE, as the command line has it.

        Raises:
            InputError: another form, or not as many files as the kind wants.
        """
        name, equals, files = text.partition("=")
        paths = [Path(path) for path in files.split(",") if path]
        counts = {"logits": (1, 2), "offsets": (1,)}.get(kind, (2,))
        if not (name and equals and len(paths) in counts):
            wanted = {"logits": "NAME=GENERATED[,TRUE]", "offsets": "NAME=GENERATED"}
            raise InputError(f"--{kind} {text}: wanted {wanted.get(kind, 'NAME=GENERATED,TRUE')}")
        return cls(kind, name, *paths)

    def __str__(self) -> str:
        files = ",".join(str(path) for path in (self.found, self.wanted) if path is not None)
        return f"{self.kind} {self.name}={files}"


@dataclass(frozen=True)
class Problem:
    """Something that was left out.

    Attributes:
        where: "generated" or "true" for a file that cannot be read, "missing" or "extra" for an id
            of one folder alone, else the option whose rows lack the id.
        id: the sound's id.
        reason: what is wrong.
    """

    where: str
    id: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """The result of judging sounds.

    Attributes:
        figures: the figures, in the order they were computed.
        counts: numbers of files and sounds by side, and of pairs.
        problems: what was left out, or is in one folder alone.
        sounds: what was found of each sound, {id: {"generated": checks, "true": checks, name of a
            figure: value}}.
        settings: what was asked for, and the rate in Hz.
        versions: versions of the packages that took part, by name.
    """

    figures: list[Figure]
    counts: dict[str, Any]
    problems: list[Problem]
    sounds: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it as JSON, atomically."""
        write_json(path, dataclasses.asdict(self))


class Progress(Protocol):
    """Makes a progress bar with a name: a context that gives a function (done, total)."""

    def __call__(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]: ...


def evaluate(
    gen: str | os.PathLike[str],
    true: str | os.PathLike[str],
    *,
    rate: int | None = None,
    extractors: Sequence[str] = ("melstats",),
    given: Sequence[Given] = (),
    captions: str | os.PathLike[str] | None = None,
    toy: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judges the sounds in `gen` by those in `true`: wav and flac files, paired by their stems.

    Distances of sets take all readable sounds of each folder, figures of pairs the ids in both.
    A file that cannot be read, or has no partner, raises nothing: it is left out and reported.

    Args:
        gen, true: folders of generated and of true sounds.
        rate: Hz at which pairs are compared, and melstats computed; by default the lowest rate of
            any file.
        extractors: "melstats", "ast", "clap"; "ast=SOURCE" names a folder or hub entry.
        given: rows that were computed elsewhere.
        captions: a table with columns id and caption, for the similarity of CLAP.
        toy: the events.json of a toy world, whose clips the sounds are.
        settings: splits, intervals, seed.
        device: where extractors compute.
        workers: processes that read and measure; default one per core, 0 stays in this one.
        progress: makes progress bars.

    Raises:
        InputError: no sounds, an option that does not fit, rows that cannot be read.
    """
    sounds = {GENERATED: find_sounds(Path(gen)), TRUE: find_sounds(Path(true))}
    rate = lowest_rate(sounds) if rate is None else rate
    if rate < LEAST_RATE:
        raise InputError(f"rate is {rate} Hz, wanted at least {LEAST_RATE}")
    judge = _Judge(sounds, rate, settings or Settings())
    models: dict[str, Extractor] = {}
    for text in extractors:
        name, _, source = text.partition("=")
        if name in models:
            raise InputError(f"--extractor {text}: {name} is there twice")
        if text != MELSTATS:
            models[name] = get_extractor(name, source or None, resolve_device(device))
    if captions is not None and "clap" not in models:
        raise InputError(f"--captions {captions}: wanted --extractor clap with it")
    world = None if toy is None else Listener(Path(toy))

    measures = [Measure(MELSTATS, melstats)] if MELSTATS in extractors else []
    if world is not None:
        measures.append(Measure(TOY, hear, world.rate))
    with _bar(progress, "listen") as show:
        judge.listen(measures, workers, show)
    judge.pairs()
    if MELSTATS in extractors:
        rows = ({id: x[None] for id, x in judge.measured(s, MELSTATS).items()} for s in SIDES)
        judge.collector.embeddings(MELSTATS, *rows)
    for name, model in models.items():
        with _bar(progress, name) as show:
            judge.model(name, model, None if captions is None else Path(captions), show)
    for files in given:
        judge.given(files)
    if world is not None:
        judge.toy(world)
    asked = {
        "gen": str(gen),
        "true": str(true),
        "rate": judge.rate,
        "extractors": list(extractors),
        "given": [str(files) for files in given],
        "captions": None if captions is None else str(captions),
        "toy": None if toy is None else str(toy),
        **dataclasses.asdict(judge.collector.settings),
    }
    return judge.result(asked, _versions(bool(models), toy is not None))


def hear(wave: Tensor, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The onsets (s) of a toy world's sound, and its `kind_features`."""
    return onsets(wave, rate), kind_features(wave, rate)


class _Judge:
    def __init__(self, sounds: dict[str, dict[str, Path]], rate: int, settings: Settings) -> None:
        self.rate = rate
        self.collector = Collector(settings)
        self._sounds = sounds
        self._heard: list[Heard] = []
        self._problems: list[Problem] = []

    def listen(
        self,
        measures: Sequence[Measure],
        workers: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._heard = listen(self._sounds, self.rate, measures, workers=workers, progress=progress)
        for heard in self._heard:
            for side, reason in heard.problems.items():
                self._problems.append(Problem(side, heard.id, reason))
            for side, what in ((GENERATED, "missing"), (TRUE, "extra")):
                if heard.id not in self._sounds[side]:
                    self._problems.append(Problem(what, heard.id, f"no {side} sound"))
        for side in SIDES:
            if not self._ids(side):
                reason = next(p.reason for p in self._problems if p.where == side)
                raise InputError(f"no {side} sound can be read, the first one: {reason}")

    def _ids(self, side: str) -> list[str]:
        return [heard.id for heard in self._heard if side in heard.checks]

    def measured(self, side: str, name: str) -> dict[str, Any]:
        """Results of a measure by id."""
        return {h.id: h.measured[side][name] for h in self._heard if side in h.checks}

    def pairs(self) -> None:
        for name, unit in _UNITS.items():
            values = {h.id: h.distances[name] for h in self._heard if name in h.distances}
            self.collector.mean(f"pairs.{name}", values, "lower", unit)

    def model(
        self,
        name: str,
        model: Extractor,
        captions: Path | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        jobs = [(side, id) for side in SIDES for id in self._ids(side)]
        rows: dict[str, dict[str, np.ndarray]] = {side: {} for side in SIDES}
        logits: dict[str, dict[str, np.ndarray]] = {side: {} for side in SIDES}
        for done, (side, id) in enumerate(jobs, 1):
            found = model(load_audio(self._sounds[side][id], model.rate))
            rows[side][id] = found.rows
            if found.logits is not None:
                logits[side][id] = found.logits
            if progress is not None:
                progress(done, len(jobs))
        self.collector.embeddings(name, *rows.values())
        if logits[GENERATED]:
            self.collector.logits(name, *logits.values())
        if captions is not None and isinstance(model, Clap):
            said = self._captions(captions)
            ids = [id for id in rows[GENERATED] if id in said]
            texts = model.captions([said[id] for id in ids])
            words = {id: text[None] for id, text in zip(ids, texts, strict=True)}
            self.collector.similarity(name, {id: rows[GENERATED][id] for id in ids}, words)

    def _captions(self, path: Path) -> dict[str, str]:
        table = read_manifest(path, ("id", "caption"))
        said = {row.id: row.caption for row in table if row.caption}
        self._missing("captions", path, said, GENERATED)
        return said

    def _missing(self, where: str, path: Path, found: Container[str], side: str) -> None:
        ids = self._ids(side)
        missing = [id for id in ids if id not in found]
        if len(missing) == len(ids):
            raise InputError(f"{path}: nothing of the {len(ids)} {side} sounds, wanted {ids[0]!r}")
        self._problems += [Problem(where, id, f"{path} does not have it") for id in missing]

    def given(self, files: Given) -> None:
        found = self._rows(files, files.found, GENERATED)
        wanted = None
        if files.wanted is not None:
            side = GENERATED if files.kind == "similarity" else TRUE
            wanted = self._rows(files, files.wanted, side)
        if files.kind == "offsets":
            self.collector.offsets(files.name, found)
        else:
            getattr(self.collector, files.kind)(files.name, found, wanted)

    def _rows(self, files: Given, path: Path, side: str) -> Rows:
        rows = read_rows(path, self._ids(side))
        self._missing(f"{files.kind} {files.name}", path, rows, side)
        return rows

    def toy(self, world: Listener) -> None:
        judged = [id for id in self._ids(GENERATED) if id in world.scenes]
        self._missing(TOY, world.path, world.scenes, GENERATED)
        for side, name in ((GENERATED, TOY), (TRUE, f"{TOY}.true")):
            heard = self.measured(side, TOY)
            ids = [id for id in judged if id in heard]
            scenes = [world.scenes[id] for id in ids]
            counts = [
                match(heard[id][0], scene["times"]) for id, scene in zip(ids, scenes, strict=True)
            ]
            self.collector.onsets(name, counts)
            kinds = world.classifier.predict_features([heard[id][1] for id in ids])
            right = (said == scene["kind"] for said, scene in zip(kinds, scenes, strict=True))
            values = dict(zip(ids, map(float, right), strict=True))
            self.collector.mean(f"{name}.class_accuracy", values, "higher")

    def result(self, settings: dict[str, Any], versions: dict[str, str]) -> Evaluation:
        counts: dict[str, Any] = {}
        for side in SIDES:
            checks = [heard.checks[side] for heard in self._heard if side in heard.checks]
            counts[side] = {
                "files": len(self._sounds[side]),
                "read": len(checks),
                "silent": sum(c.silent for c in checks),
                "clipped": sum(c.clipped > 0 for c in checks),
                "seconds": sum(c.seconds for c in checks),
            }
        generated, true = (set(self._sounds[side]) for side in SIDES)
        counts["pairs"] = len(set(self._ids(GENERATED)) & set(self._ids(TRUE)))
        counts["missing"], counts["extra"] = len(true - generated), len(generated - true)
        sounds = {}
        for heard in self._heard:
            checked = {side: dataclasses.asdict(c) for side, c in heard.checks.items()}
            sounds[heard.id] = checked | self.collector.values.get(heard.id, {})
        return Evaluation(
            self.collector.figures, counts, self._problems, sounds, settings, versions
        )


def _bar(progress: Progress | None, what: str) -> AbstractContextManager[Any]:
    return nullcontext() if progress is None else progress(what)


def _versions(models: bool, toy: bool) -> dict[str, str]:
    packages = [*_PACKAGES, *["transformers"] * models, *["scikit-learn"] * toy]
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "wavflow": __version__} | found
