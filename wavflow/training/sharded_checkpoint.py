"""Checkpoints of many processes: folders of safetensors, each process's shards in its own files.

A folder holds the files that torch.distributed.checkpoint writes through its safetensors storage,
`meta.pth` (plain values) and `whole.json`, written last: size and CRC-32 of every other file. A
folder without it is not whole. Any number of processes reads what any other number wrote, and
nothing in it can run code.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from wavflow.base import state_dict
from wavflow.base.errors import InputError
from wavflow.base.files import write_json
from wavflow.base.processes import World
from wavflow.training import checkpoint
from wavflow.training.checkpoint import END_MARK

META = "meta.pth"


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Any],
    world: World,
    previous: Path | None = None,
) -> None:
    """Writes a folder under a temporary name and gives it its own once it is whole.

    All processes call it.

    Args:
        folder: the checkpoint's place.
        tensors: tensors by name; DTensors by their shards, others as the first process has them.
        meta: plain values and small tensors; the first process's count.
        world: the processes.
        previous: where what is at `folder` moves to; None: it is removed.
    """
    temporary = folder.parent / f".{folder.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        checkpoint.save(temporary / META, meta)
    world.gather(None)
    dcp.save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
        no_dist=world.size == 1,
    )
    files = sorted(temporary.iterdir())
    for path in files[world.rank :: world.size]:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    sums = [(f.name, f.stat().st_size, _crc(f)) for f in files[world.rank :: world.size]]
    found = world.gather(sums)
    if world.is_main:
        write_json(
            temporary / END_MARK, {n: [size, crc] for part in found for n, size, crc in part}
        )
        old = previous or folder.parent / f".{folder.name}.old"
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(temporary, folder)
        if previous is None:
            shutil.rmtree(old, ignore_errors=True)
    world.gather(None)


def check(folder: Path, world: World) -> None:
    """Raises InputError, in every process, unless all files are as they were written and whole."""
    problems = []
    try:
        entries = sorted(json.loads((folder / END_MARK).read_text(encoding="utf-8")).items())
    except (OSError, ValueError):
        raise InputError(f"{folder}: no readable {END_MARK}; the checkpoint is not whole") from None
    for name, (size, crc) in entries[world.rank :: world.size]:
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problems.append(f"{path}: {found} bytes; wanted {size}")
        elif _crc(path) != crc:
            problems.append(f"{path}: its bytes are not those that were written")
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):  # checks the header's length, sizes and offsets
                    pass
            except SafetensorError as error:
                problems.append(f"{path}: not a readable safetensors file ({error})")
    if found := [problem for part in world.gather(problems) for problem in part]:
        raise InputError(found[0])


def read_meta(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint's folder."""
    return state_dict.load(folder / META)


def load(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Reads into `tensors`, in place; DTensors get their shards.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    found = shapes(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{folder}: {name} is {found.get(name, 'missing')}; "
                f"the run wants {wanted.get(name, 'none')}"
            )
    dcp.load(
        dict(tensors),
        storage_reader=HuggingFaceStorageReader(str(folder)),
        no_dist=world.size == 1,
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor in a folder."""
    return {name: tuple(entry.size) for name, entry in _entries(folder).items()}


def _entries(folder: Path) -> dict[str, Any]:
    """What a folder's metadata say of every tensor: its size and dtype."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def gather(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, whole, on the CPU."""
    entries = _entries(folder).items()
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
