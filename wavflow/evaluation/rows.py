"""Embeddings and logits from files: rows of numbers by id."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from wavflow.base.errors import InputError


def read_rows(path: Path, ids: Iterable[str]) -> dict[str, np.ndarray]:
    """The rows of those ids that a file or folder holds, each (k, d) float32.

    A safetensors or npz file has a tensor for every id, a folder a file <id>.npy: (d,), or (k, d)
    of k windows of one sound. Other ids are not read.

    Raises:
        InputError: missing or unreadable; rows of another shape, of different widths or not
            finite. Nothing is unpickled.
    """
    found: dict[str, np.ndarray] = {}
    with _open(path) as (held, read):
        for id in ids:
            if id in held:
                found[id] = _checked(f"{path}: {id}", read(id))
                first = next(iter(found.values()))
                if found[id].shape[1] != first.shape[1]:
                    raise InputError(
                        f"{path}: {id} is {found[id].shape[1]} wide; wanted {first.shape[1]}, "
                        "as the rows before it"
                    )
    return found


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[set[str], Callable[[str], np.ndarray]]]:
    """Yields the ids and a function that reads one of them."""
    try:
        if path.is_dir():
            yield {file.stem for file in path.glob("*.npy")}, lambda id: np.load(path / f"{id}.npy")
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder, wanted embeddings")
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                yield set(arrays.files), arrays.__getitem__
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                yield set(file.keys()), lambda id: file.get_tensor(id).float().numpy()
        else:
            raise InputError(f"{path}: wanted .safetensors, .npz or a folder of .npy files")
    except InputError:
        raise
    except Exception as error:  # zip, npy and safetensors raise a dozen kinds between them
        raise InputError(f"{path}: not readable as embeddings ({error})") from None


def _checked(where: str, rows: np.ndarray) -> np.ndarray:  # (k d) float32
    if rows.dtype.kind not in "fiu" or rows.ndim not in (1, 2) or not rows.size:
        raise InputError(f"{where} is {rows.dtype} {rows.shape}; wanted numbers (d,) or (k, d)")
    rows = np.atleast_2d(rows).astype(np.float32)
    if not np.isfinite(rows).all():
        raise InputError(f"{where} holds non-finite values")
    return rows
