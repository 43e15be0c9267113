"""Tables with a row a question: CSV, TSV, JSON, JSON lines, Parquet; and published sets of questions in these forms."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from audio_llm.datasets.records import Record, each_record, read_text
from audio_llm.errors import DataError, describe
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.rows import Reason, Reject


def _separated(place: Place, separator: str) -> Iterator[Record | Reject]:
    """The rows of a table with a heading. Fields may be quoted, and hold line breaks then."""
    text = read_text(_file(place.path))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    name = place.path.name
    try:
        heading = next(reader, [])
        if len(set(heading)) < len(heading) or not any(heading):
            found = ", ".join(heading) or "an empty file"
            raise DataError(describe(f"{place.path}: line 1", "a name for each column, once", found))
        for row in reader:
            where = f"{name}: line {reader.line_num}"
            if not row:
                continue
            if len(row) == len(heading):
                yield Record(dict(zip(heading, row, strict=True)), where)
            else:
                yield Reject(where, Reason.BROKEN_ROW, f"expected {len(heading)} fields, found {len(row)}.")
    except csv.Error as error:
        where = f"{place.path}: line {reader.line_num}"
        raise DataError(describe(where, "a table with quoted fields", str(error))) from error


def records(place: Place) -> Iterator[Record | Reject]:
    """The rows of JSON, JSON lines or Parquet; of a folder, of all of its files in the order of their names."""
    top = place.path if place.path.is_dir() else place.path.parent
    for path in files(place.path):
        yield from rows_of(path, top)


def rows_of(path: Path, top: Path) -> Iterator[Record | Reject]:
    """The rows of one file below the folder `top`, which is no part of what they are called."""
    name = path.relative_to(top).as_posix()
    for row in each_record(path):
        where = row.where.replace(str(path), name)
        yield Record(row.values, where) if isinstance(row, Record) else Reject(where, Reason.BROKEN_ROW, str(row))


def files(path: Path) -> list[Path]:
    """`path`, or the files of rows below it where it is a folder. Raises :class:`DataError` where there is none."""
    if not path.is_dir():
        return [_file(path)]
    found = sorted(file for kind in ("parquet", "jsonl", "json") for file in path.rglob(f"*.{kind}"))
    if not found:
        raise DataError(describe(str(path), "files .parquet, .jsonl or .json", "none"))
    return found


def _file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(describe(f"path {path}", "a file of rows", "a folder" if path.is_dir() else "no such file"))
    return path


FORMAT = (
    Format("csv", partial(_separated, separator=",")),
    Format("tsv", partial(_separated, separator="\t")),
    Format("json", records),
    Format("jsonl", records),
    Format("parquet", records),
    # AudioMCQ's questions, as its subset with reasoning has them.
    Format(
        "audiomcq",
        records,
        {"audio": "audio_path", "kind": "question_type", "thinking": "gemini_cot", "group": "audio_path"},
    ),
    # MMAR's list.
    Format("mmar", records, {"audio": "audio_path", "kind": "category", "group": "url"}),
)
