"""Strict reading and writing of the CSV files that list clips.

Columns that are known: id, audio_path, video_path, features_path, caption, video_exist,
text_exist; others are kept as they are. Everything is text: "001" stays "001".
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write, check_id, check_output

log = logging.getLogger("wavflow")

PATH_COLUMNS = ("audio_path", "video_path", "features_path")
FLAG_COLUMNS = ("video_exist", "text_exist")
STATUSES = ("ok", "skipped", "failed")
REPORT_COLUMNS = ("id", "status", "reason")


@dataclass(frozen=True)
class Row:
    """One good row. Paths are resolved; a path that is absent or empty is None.

    `number` counts as a spreadsheet does: the header is row 1. `fields` holds the cells as read.
    """

    number: int
    id: str
    audio_path: Path | None
    video_path: Path | None
    features_path: Path | None
    caption: str
    video_exist: bool
    text_exist: bool
    fields: dict[str, str] = field(repr=False)

    def has(self, flag: str) -> bool:
        """What the column `<flag>_exist` says; `flag` is "video" or "text"."""
        return {"video": self.video_exist, "text": self.text_exist}[flag]


@dataclass(frozen=True)
class RowError:
    """One row that cannot be used: its number, the cell, what that holds and what is wrong."""

    row_number: int
    id: str
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        shown = self.value if len(self.value) <= 80 else self.value[:77] + "..."
        return f"row {self.row_number}, {self.field} {shown!r}: {self.reason}"


class Manifest(list[Row]):
    """The good rows of a CSV, in order, and beside them the rows that cannot be used."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self.columns = tuple(columns)
        self.errors: list[RowError] = []


class ReportRow(NamedTuple):
    """What became of one row: status is "ok", "skipped" or "failed"."""

    id: str
    status: str
    reason: str = ""


class _BadCell(Exception):
    def __init__(self, field: str, value: str, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason


#: What separates the columns where it is not a comma, and its name.
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
#: How the flags are written: by hand, and by programs that make floats or truths of them.
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _read_lines(path: Path) -> list[str]:
    """The lines of a table, with their ends. Bytes that are not UTF-8 stay as surrogates."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, wanted a CSV") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: UTF-16 text; wanted UTF-8 (in Excel: CSV UTF-8)")
    text = content.decode("utf-8-sig", "surrogateescape")
    return list(io.StringIO(text, newline=""))


def _is_text(cell: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in cell)


def _shown(cell: str) -> str:
    """A cell with what is not UTF-8 as escapes."""
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _records(lines: list[str]) -> Iterator[tuple[list[str], str]]:
    """The cells of each record, and why they are none; a broken record is its first line alone."""
    at = 0

    def feed() -> Iterator[str]:
        nonlocal at
        while at < len(lines):
            at += 1
            yield lines[at - 1]

    reader = csv.reader(feed(), strict=True)
    while at < len(lines):
        begun = at
        try:
            yield next(reader), ""
        except csv.Error as error:
            at = begun + 1
            reader = csv.reader(feed(), strict=True)
            yield [lines[begun].rstrip("\r\n")], f"not valid CSV ({error})"


def _header(path: Path, cells: list[str], problem: str) -> list[str]:
    """The names of the columns, empty where one has none."""
    if problem:
        raise InputError(f"{path}, row 1: {problem}")
    if not all(map(_is_text, cells)):
        raise InputError(f"{path}, row 1: not UTF-8 text ({_shown(','.join(cells))!r:.80})")
    header = [name.strip() for name in cells]
    for separator, name in SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise InputError(f"{path}: its columns are separated by {name}; wanted commas")
    return header


def needed(path: Path | None) -> Path:
    """Returns a row's path, which is there: its table was read with that column required."""
    assert path is not None
    return path


def read_manifest(
    path: str | os.PathLike[str],
    required: Iterable[str] = (),
    *,
    data_root: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read a CSV (UTF-8, with or without BOM; commas).

    Columns named in `required` must be there (else InputError naming file and column) and their
    ids and paths filled in; a video_path may be empty where video_exist is 0. Relative paths are
    taken from `data_root`, by default the CSV's folder, or the working folder where a column's
    first one leads to a file from there alone, as in the public system's tables: the log says so.
    Without an id column, or where its cell
    is empty and id is not required, the id is the video's stem, else row_%05d of the 0-based row.
    Without a flag column, video_exist says whether there is a video_path or features_path, and
    text_exist whether there is a caption. An empty caption makes text_exist false.

    Rows that cannot be used (bad flag, duplicate or hostile id, empty path, wrong number of
    cells, a quote out of place, text that is not UTF-8) are left out and listed in `.errors`.
    Columns without a name are left out, and cells beyond the header that are empty.
    """
    path = Path(path)
    required = tuple(required)
    records = _records(_read_lines(path))
    header = _header(path, *next(records, ([], "")))
    if not any(header):
        raise InputError(f"{path}: empty, wanted a header with {', '.join(required) or 'columns'}")
    for name in filter(None, header):
        if header.count(name) > 1:
            raise InputError(f"{path}: column {name!r} is there {header.count(name)} times")
    for name in required:
        if name not in header:
            found = ", ".join(filter(None, header))
            raise InputError(f"{path}: no column {name!r}, found {found}")
    rows = list(records)
    roots = dict.fromkeys(PATH_COLUMNS, Path(path.parent if data_root is None else data_root))
    if data_root is None:
        roots |= _from_working_folder(path, header, [cells for cells, _ in rows])

    manifest = Manifest(path, list(filter(None, header)))
    seen: dict[str, int] = {}
    index = -1
    for number, (cells, problem) in enumerate(rows, 2):
        if not cells:
            continue
        index += 1
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()  # a spreadsheet's empty columns
        named = {name: _shown(cell) for name, cell in zip(header, cells, strict=False) if name}
        try:
            if problem:
                named = {}
                raise _BadCell("row", _shown(cells[0]), problem)
            for name, cell in zip(header, cells, strict=False):
                if not _is_text(cell):
                    raise _BadCell(name or "row", _shown(cell), "not UTF-8 text")
            if len(cells) != len(header):
                raise _BadCell(
                    "row", _shown(",".join(cells)), f"{len(cells)} cells, header {len(header)}"
                )
            row = _parse_row(named, required, roots, number, index)
            if row.id in seen:
                raise _BadCell("id", row.id, f"already the id of row {seen[row.id]}")
        except _BadCell as bad:
            id = named.get("id", "") or f"row_{index:05d}"
            manifest.errors.append(RowError(number, id, bad.field, bad.value, bad.reason))
            continue
        seen[row.id] = number
        manifest.append(row)
    if index < 0:
        raise InputError(f"{path}: a header and no rows")
    return manifest


def _from_working_folder(
    path: Path, header: Sequence[str], table: Sequence[Sequence[str]]
) -> dict[str, Path]:
    """The columns whose first relative path is a file from the working folder alone."""
    found = {}
    for name in PATH_COLUMNS:
        if name not in header or path.parent.resolve() == Path.cwd():
            continue
        at = header.index(name)
        cells = (row[at].strip() for row in table if len(row) > at and "\0" not in row[at])
        first = next((cell for cell in cells if cell and not os.path.isabs(cell)), None)
        if first is not None and not (path.parent / first).exists() and Path(first).exists():
            found[name] = Path()
            log.info("%s: relative paths of %s start at the working folder", path, name)
    return found


def _parse_row(
    named: dict[str, str],
    required: Sequence[str],
    roots: Mapping[str, Path],
    number: int,
    index: int,
) -> Row:
    flags: dict[str, bool | None] = {}
    for name in FLAG_COLUMNS:
        cell = named.get(name)
        if cell is not None and cell.strip().lower() not in FLAGS:
            raise _BadCell(name, cell, "wanted 0 or 1")
        flags[name] = None if cell is None else FLAGS[cell.strip().lower()]

    paths: dict[str, Path | None] = {}
    for name in PATH_COLUMNS:
        cell = named.get(name, "").strip()
        if "\0" in cell:
            raise _BadCell(name, cell, "holds a NUL character")
        paths[name] = roots[name] / cell if cell else None
    has_video = paths["video_path"] is not None or paths["features_path"] is not None
    video_exist = has_video if flags["video_exist"] is None else flags["video_exist"]
    for name in required:
        if name in PATH_COLUMNS and paths[name] is None:
            if name != "video_path" or video_exist:
                raise _BadCell(name, "", "empty path")
    if video_exist and not has_video and ({"video_path", "features_path"} & named.keys()):
        raise _BadCell("video_exist", "1", "there is no video_path or features_path in the row")

    caption = named.get("caption", "").strip()
    text_exist = bool(caption) if flags["text_exist"] is None else flags["text_exist"]
    if "caption" in named and not caption:
        text_exist = False

    id = named.get("id", "").strip()
    if not id and "id" in required:
        raise _BadCell("id", "", "empty id")
    if not id:
        video = paths["video_path"]
        id = f"row_{index:05d}" if video is None else video.stem
    try:
        check_id(id)
    except InputError as error:
        raise _BadCell("id", id, str(error)) from None
    return Row(
        number=number,
        id=id,
        caption=caption,
        video_exist=video_exist,
        text_exist=text_exist,
        fields=named,
        **paths,
    )


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """Write `rows` atomically. Booleans become 0/1, None and absent cells become empty.

    Raises:
        ValueError: a key that is not in `columns`.
    """

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return str(int(value)) if isinstance(value, bool) else str(value)

    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell(value) for name, value in row.items()})


def check_report(
    path: str | os.PathLike[str],
    *inputs: str | os.PathLike[str] | None,
    overwrite: bool = False,
) -> None:
    """Refuses a path for a report where something else than a report is; as `check_table`."""
    check_table(path, REPORT_COLUMNS, *inputs, overwrite=overwrite)


def check_table(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    *inputs: str | os.PathLike[str] | None,
    overwrite: bool = False,
) -> None:
    """Refuses a path for a table where something else than such a table is; before any work.

    Args:
        path: the table to write.
        columns: its columns, or the first of them.
        inputs: files that are read; none of them may be replaced.
        overwrite: whether another file that is there may be replaced.

    Raises:
        InputError: it would replace what begins with other columns, or cannot be written.
    """
    path, begins = Path(path), ",".join(columns).encode()
    is_such = False
    if path.is_file():
        with open(path, "rb") as file:
            found = file.read(len(begins) + 1)
        is_such = found[:-1] == begins and found[-1:] in (b"\n", b"\r", b",")
    check_output(path, *inputs, overwrite=overwrite or is_such)


def write_report(
    path: str | os.PathLike[str], rows: Iterable[ReportRow | tuple[str, str, str]]
) -> None:
    """Write id, status and reason of every row of a job, atomically; a reason takes one line."""
    table = []
    for id, status, reason in rows:
        if status not in STATUSES:
            raise ValueError(f"report: status of {id!r} is {status!r}, wanted one of {STATUSES}")
        table.append({"id": id, "status": status, "reason": " ".join(reason.split())})
    write_csv(path, table, REPORT_COLUMNS)
