"""Folders that Hugging Face ``datasets`` writes by ``save_to_disk``: Arrow files, a folder a split where there are
several. Sounds stand in a column as bytes or as a path; numbers of classes become their names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from audio_llm.datasets.records import Cell, Record, class_names, holds_bytes, named
from audio_llm.errors import DataError, describe, require
from audio_llm.files import read_json
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.rows import Reject


class ArrowCell(Cell):
    """A value of an Arrow file, not read yet."""

    def load(self) -> Any:
        return _table(self.path).column(self.column)[self.row].as_py()


def _saved(place: Place) -> Iterator[Record | Reject]:
    folder = place.path
    parts = (
        [folder] if (folder / "state.json").is_file() else sorted(path.parent for path in folder.glob("*/state.json"))
    )
    if not parts:
        found = "no state.json in it" if folder.is_dir() else "no such folder"
        raise DataError(describe(f"path {folder}", "a folder of save_to_disk", found))
    for part in parts:
        for path in _files(part):
            for number, values in enumerate(_rows(path)):
                yield Record({"split": part.name} | values, f"{part.name}/{path.name}: row {number}")


def _files(folder: Path) -> list[Path]:
    """The files of a split in their order, as its ``state.json`` names them."""
    try:
        names = [str(entry["filename"]) for entry in read_json(folder / "state.json")["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(describe(f"{folder / 'state.json'}", "the names of data files", f"{error!r}")) from error
    return [folder / Path(name).name for name in names]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    table = _table(path)
    heavy = [column.name for column in table.schema if holds_bytes(column.type)]
    names = class_names(table.schema.metadata)
    light = table.drop_columns(heavy)
    number = 0
    for batch in light.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield named(row, names) | {name: ArrowCell(path, name, number) for name in heavy}
            number += 1


def _table(path: Path) -> Any:
    try:
        about = path.stat()
    except OSError as error:
        raise DataError(describe(str(path), "an Arrow file", error.strerror or str(error))) from error
    return _table_once(path, about.st_ino, about.st_mtime_ns)  # another file under the same name is opened anew


@lru_cache(maxsize=4)
def _table_once(path: Path, inode: int, changed: int) -> Any:
    require("pyarrow", f"Reading {path}", "train")
    import pyarrow as arrow

    try:
        with arrow.memory_map(str(path)) as source:
            return arrow.ipc.open_stream(source).read_all()
    except (arrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise DataError(describe(str(path), "an Arrow file", found)) from error


FORMAT = Format("hf_datasets", _saved, {"split": "split"})
