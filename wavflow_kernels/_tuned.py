"""Measured choices per GPU: which backend and which tile sizes a call gets.

``tuned/<device>.json`` holds {op: {key: row}}. A key names what decides speed ("bfloat16 d64
n1024"), made by the op; a row has "backend", and what that backend's launcher reads of it. The
tables are written by ``python -m wavflow_kernels.tools.tune`` on the GPU itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("wavflow_kernels")
FOLDER = Path(__file__).resolve().parent / "tuned"
Row = dict[str, Any]


def slug(device_name: str) -> str:
    """The file name of a device: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@cache
def table(device_index: int) -> dict[str, dict[str, Row]]:
    """The table of a CUDA device; empty, with one log line, where it was never measured."""
    name = torch.cuda.get_device_name(device_index)
    path = FOLDER / f"{slug(name)}.json"
    if not path.exists():
        log.warning(
            "%s was never measured: attention and convolutions run as library calls there "
            "(python -m wavflow_kernels.tools.tune chooses)",
            name,
        )
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["ops"]


def tables(capability: tuple[int, int]) -> list[dict[str, dict[str, Row]]]:
    """The tables of all measured GPUs of that compute capability."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return [table["ops"] for table in found if table["capability"] == list(capability)]


_pretended: dict[str, dict[str, Row]] | None = None
_trial: dict[str, Row] = {}
_asked: dict[str, set[str]] = {}


def lookup(op: str, device: torch.device, key: str) -> Row:
    """The row for a call of `op` on `device`; {} where none was measured."""
    if op in _asked:
        _asked[op].add(key)
    if op in _trial:
        return _trial[op]
    if _pretended is not None:
        return _pretended.get(op, {}).get(key, {})
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    return table(index).get(op, {}).get(key, {})


@contextlib.contextmanager
def pretending(rows: dict[str, dict[str, Row]]) -> Iterator[None]:
    """Let calls inside the block look into `rows` in place of their device's table."""
    global _pretended
    previous, _pretended = _pretended, rows
    try:
        yield
    finally:
        _pretended = previous


@contextlib.contextmanager
def trying(op: str, row: Row) -> Iterator[None]:
    """Let calls of `op` inside the block use `row`, whatever the tables say."""
    previous = _trial.get(op)
    _trial[op] = row
    try:
        yield
    finally:
        del _trial[op]
        if previous is not None:
            _trial[op] = previous


@contextlib.contextmanager
def keys_asked(op: str) -> Iterator[set[str]]:
    """Collect the keys that calls of `op` inside the block look up."""
    _asked[op] = set()
    try:
        yield _asked[op]
    finally:
        del _asked[op]


def up_to_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: sizes of one key differ by less than 2x."""
    return 1 << max(n - 1, 0).bit_length()
