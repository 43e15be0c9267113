"""Records of published datasets: JSON, JSON lines, Parquet and CSV read alike, with errors that name file, row and key.

Sound inside Parquet files stays there until it is asked for: a benchmark of gigabytes opens in the time of its texts.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from audio_llm.errors import DataError, describe, nearest, require
from audio_llm.files import RepeatedKey, parse_json, within

SUFFIXES = (".json", ".jsonl", ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}  # of tables of text
ENDINGS = (".wav", ".flac", ".mp3", ".ogg")  # of sounds whose name is given without one
MAX_TABLE_BYTES = 2**30


@dataclass(frozen=True)
class Cell:
    """A value of a Parquet file that holds bytes, not read yet."""

    path: Path
    column: str
    row: int

    def load(self) -> Any:
        """The value. Raises :class:`DataError` where the file cannot be read any more."""
        group, offset = _group_of(self.path, self.row)
        return _group(_opened(self.path), self.path, self.column, group)[offset].as_py()

    def data(self) -> bytes:
        """The bytes themselves, also where they stand under ``bytes`` as Hugging Face's audio columns have them."""
        value = self.load()
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            where = f"{self.path}: row {self.row}, '{self.column}'"
            raise DataError(describe(where, "the bytes of a file", type(data).__name__))
        return data


@dataclass(frozen=True)
class Record:
    """One row and where it stands (``file: data[3]``); getters check what they return."""

    values: Mapping[str, Any]
    where: str

    def text(self, *keys: str, default: str | None = None) -> str:
        """The text under the first of `keys` there is. Without a `default`, it must be there and not be empty."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, str) and (value.strip() or default is not None):
                return value
            if value is not None:
                raise DataError(describe(f"{self.where}: '{key}'", "a text", f"{value!r:.60}"))
        if default is None:
            raise self.lacks(*keys)
        return default

    def identity(self, key: str, default: str | None = None) -> str:
        """The text under `key`, or the whole number there as a text: some count their rows. As :meth:`text` else."""
        value = self.values.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if whole else self.text(key, default=default)

    def texts(self, *keys: str) -> list[str]:
        """The list of texts under the first of `keys` there is."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value and all(isinstance(part, str) and part.strip() for part in value):
                return list(value)
            if value is not None:
                raise DataError(describe(f"{self.where}: '{key}'", "a list of texts", f"{value!r:.60}"))
        raise self.lacks(*keys)

    def lacks(self, *keys: str) -> DataError:
        """What to raise where none of `keys` holds anything of use."""
        expected = " or ".join(f"'{key}'" for key in keys)
        if held := [f"'{key}': {self.values[key]!r:.60}" for key in keys if key in self.values]:
            return DataError(describe(self.where, f"a value of {expected}", ", ".join(held)))
        there = [str(key) for key in self.values]
        found = ", ".join(there[:12]) or "no keys"
        close = next((text for key in keys if (text := nearest(key, there))), "")
        return DataError(describe(self.where, expected, f"{found}{close}"))


class NoRecord(DataError):
    """A row that is none, and where it stands."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


def read_records(path: str | Path) -> list[Record]:
    """The rows of a ``.json`` (an array, an object with the array under ``data``, or one object), ``.jsonl`` or
    ``.parquet`` file. Raises :class:`DataError` naming the file and the row."""
    records = []
    for row in each_record(path):
        if isinstance(row, NoRecord):
            raise row
        records.append(row)
    return records


def each_record(path: str | Path) -> Iterator[Record | NoRecord]:
    """As :func:`read_records`, but a row that is none comes as its error, so that the others can be read. What is wrong
    with the whole file is raised."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(describe(str(path), f"a file {', '.join(SUFFIXES)}", f"'{path.suffix.lower()}'"))
    if not path.is_file():
        there = sorted(item.name for item in path.parent.glob("*") if item.suffix.lower() in SUFFIXES)
        found = f"no such file{nearest(path.name, there)}"
        raise DataError(describe(str(path), "a data file", found))
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    return _lines(path) if path.suffix.lower() == ".jsonl" else _json(path)


def each_line(path: str | Path, separator: str = ",") -> Iterator[Record | NoRecord]:
    """The rows of a table of text with a heading, as :func:`each_record` gives them. Fields may be quoted, and then
    hold line breaks."""
    path = Path(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    try:
        heading = next(reader, [])
        if len(set(heading)) < len(heading) or not any(heading):
            found = ", ".join(heading) or "an empty line"
            raise DataError(describe(f"{path}: line 1", "a name for each column, once", found))
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if not row:
                continue
            if len(row) == len(heading):
                yield Record(dict(zip(heading, row, strict=True)), where)
            else:
                yield NoRecord(describe(where, f"{len(heading)} fields", str(len(row))), where)
    except csv.Error as error:
        where = f"{path}: line {reader.line_num}"
        long = "limit" in str(error)
        expected = f"fields of at most {csv.field_size_limit()} characters" if long else "a table with quoted fields"
        found = "a longer one, or a quotation mark that none follows" if long else str(error)
        raise DataError(describe(where, expected, found)) from error


def each_row(path: str | Path) -> Iterator[Record]:
    """The rows of a table of text, by its ending, or of what :func:`each_record` reads. Raises :class:`DataError`
    naming the file and the row."""
    separator = SEPARATORS.get(Path(path).suffix.lower())
    for row in each_line(path, separator) if separator else each_record(path):
        if isinstance(row, NoRecord):
            raise row
        yield row


def _json(path: Path) -> Iterator[Record | NoRecord]:
    tree = _parse(read_text(path), str(path))
    if isinstance(tree, dict) and not isinstance(tree.get("data"), list):
        yield Record(tree, str(path))
        return
    rows, name = (tree["data"], "data") if isinstance(tree, dict) else (tree, "")
    if not isinstance(rows, list):
        raise DataError(describe(str(path), "an array of objects", type(tree).__name__))
    for number, row in enumerate(rows):
        yield _checked(row, f"{path}: {name}[{number}]")


def _lines(path: Path) -> Iterator[Record | NoRecord]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                yield _checked(_parse(line, where), where)
            except DataError as error:
                yield NoRecord(str(error), where)


def read_text(path: Path) -> str:
    """The whole of a text file. Raises :class:`DataError` for one that is not UTF-8 or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(describe(str(path), "a readable file", error.strerror or str(error))) from error
    return as_text(data, str(path))


def as_text(data: bytes, where: str) -> str:
    """UTF-8 without its mark. Raises :class:`DataError` for anything else."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(describe(where, "UTF-8 text", f"other bytes at {error.start}")) from error
    if "\0" in text:  # as UTF-16 without its mark reads, for one
        raise DataError(describe(where, "UTF-8 text", f"a byte of zero at character {text.index(chr(0))}"))
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, once=True)
    except RepeatedKey as error:
        raise DataError(describe(where, "each key once", str(error))) from error
    except json.JSONDecodeError as error:
        found = f"{error.msg} at line {error.lineno}, column {error.colno}"
        cure = "JSON lines are read from a file that ends in .jsonl." if error.msg == "Extra data" else None
        raise DataError(describe(where, "valid JSON", found, cure)) from error


def _checked(row: Any, where: str) -> Record | NoRecord:
    if not isinstance(row, dict):
        return NoRecord(describe(where, "an object", f"{type(row).__name__} {row!r:.40}"), where)
    return Record(row, where)


# ------------------------------------------------------------------------------------------------ Parquet


def _parquet(path: Path) -> Iterator[Record | NoRecord]:
    import pyarrow as arrow

    file = _opened(path)
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise DataError(describe(str(path), "a name for each column, once", ", ".join(schema.names)))
    heavy = [field.name for field in schema if holds_bytes(field.type)]
    light = [field.name for field in schema if field.name not in heavy]
    size = sum(
        group.column(column).total_uncompressed_size
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups))
        for column in range(group.num_columns)
        if group.column(column).path_in_schema.partition(".")[0] in light
    )
    if max(size, file.metadata.num_rows) > MAX_TABLE_BYTES:
        found = f"{size} bytes in {file.metadata.num_rows} rows"
        raise DataError(describe(str(path), f"at most {MAX_TABLE_BYTES} bytes of texts and numbers, unpacked", found))
    try:
        rows = file.read(columns=light).to_pylist() if light else [{} for _ in range(file.metadata.num_rows)]
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also dates beyond Python's
        raise _unreadable(path, error) from error
    names = class_names(schema.metadata)
    for number, row in enumerate(rows):
        yield Record(named(row, names) | {name: Cell(path, name, number) for name in heavy}, f"{path}: row {number}")


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names behind the numbers of columns of classes, as Hugging Face ``datasets`` states them in a schema."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


def named(row: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """`row` with the `names` of :func:`class_names` in the place of its numbers of classes."""
    return row | {name: _class(row[name], words) for name, words in names.items() if name in row}


def _class(value: Any, words: list[str]) -> Any:
    """The name of a class, None for a number that is none: -1 is what ``datasets`` writes where no class is known."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return words[value] if 0 <= value < len(words) else None


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this Arrow type has bytes in it: a sound, which is read when it is asked for."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _opened(path: Path) -> Any:
    try:
        about = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _opened_once(path, about.st_ino, about.st_mtime_ns)  # another file under the same name is opened anew


@lru_cache(maxsize=8)
def _opened_once(path: Path, inode: int, changed: int) -> Any:
    require("pyarrow", f"Reading {path}", "train")
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _group_of(path: Path, row: int) -> tuple[int, int]:
    """The row group that holds `row`, and its place in it."""
    metadata = _opened(path).metadata
    for group in range(metadata.num_row_groups):
        if row < metadata.row_group(group).num_rows:
            return group, row
        row -= metadata.row_group(group).num_rows
    raise DataError(describe(str(path), f"row {row} more", "the end of the file"))


@lru_cache(maxsize=2)  # neighbours share a group, and a group may hold hundreds of megabytes
def _group(file: Any, path: Path, column: str, group: int) -> Any:
    import pyarrow as arrow

    try:
        return file.read_row_group(group, columns=[column]).column(0)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(describe(str(path), "a Parquet file", f"one that cannot be read ({str(error).splitlines()[0]})"))


def located(named: Sequence[str | Cell], folder: Path) -> list[Path | Cell | None]:
    """Where each sound lies: under its path, else under its last name, where no other sound has that; else None."""
    last = {Path(one).name: set[str]() for one in named if isinstance(one, str)}
    for one in named:
        if isinstance(one, str):
            last[Path(one).name].add(one)
    return [one if isinstance(one, Cell) else _sound(folder, one, len(last[Path(one).name]) == 1) for one in named]


def _sound(folder: Path, name: str, by_last_name: bool) -> Path | None:
    places = [name.lstrip("/"), *([Path(name).name] if by_last_name else [])]  # MMSU's begin with a slash
    for place in places:
        try:
            path = within(folder, place)
        except DataError:
            continue  # it leads out of the folder
        for file in (path, *(path.with_name(path.name + ending) for ending in ENDINGS)):
            if os.path.isfile(file):  # False as well for a name that no disk can have
                return file
    return None
