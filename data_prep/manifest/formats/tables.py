"""Tables with a row a question: CSV, TSV, JSON, JSON lines, Parquet; and published sets of questions in these forms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from audio_llm.datasets.folders import files_below
from audio_llm.datasets.records import Record, each_line, each_record
from audio_llm.errors import DataError, describe
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.rows import Reason, Reject


def separated(place: Place, separator: str) -> Iterator[Record | Reject]:
    """The rows of a table with a heading."""
    path = _file(place.path)
    for row in each_line(path, separator):
        where = row.where.replace(str(path), path.name)
        yield Record(row.values, where) if isinstance(row, Record) else Reject(where, Reason.BROKEN_ROW, str(row))


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
    found = files_below(path, endings=(".parquet", ".jsonl", ".json"))
    if not found:
        raise DataError(describe(str(path), "files .parquet, .jsonl or .json", "none"))
    return found


def _file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(describe(f"path {path}", "a file of rows", "a folder" if path.is_dir() else "no such file"))
    return path


FORMAT = (
    Format("csv", partial(separated, separator=",")),
    Format("tsv", partial(separated, separator="\t")),
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
