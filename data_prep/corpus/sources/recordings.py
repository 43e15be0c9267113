"""Recordings of a folder, or rows about them in any format that ``kind: manifest`` reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm.datasets import folders
from audio_llm.datasets.records import Cell, Record
from audio_llm.errors import AudioError, ConfigError, DataError, describe, nearest
from data_prep.corpus.sounds import reference
from data_prep.corpus.stage import Item, Reject
from data_prep.manifest.checks import identity, seconds_of, text_of
from data_prep.manifest.formats import FORMATS
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.rows import Reason, RowError
from data_prep.manifest.rows import Reject as RowReject
from data_prep.manifest.sounds import File, Sound, TableCell, file_under, is_sound

FILES = "files"  # the format without rows: every file of a folder is a recording
FIELDS = ("audio", "id", "text", "label", "start", "end", "group")
_USUAL = {"classes": {"label": "answer"}}  # what a format calls our fields
_OWN = ("audio", "name", "mark", "source")  # fields that no column gives as it is


@dataclass
class Recordings:
    """An item for each sound or film file below `path`, or for each row there in a `format` of ``kind: manifest``.

    Items have ``audio`` (where it lies), ``name`` (below the root), ``mark`` (tells a changed file), ``source`` (the
    recording: the column `group`, else the name), and ``text``, ``label``, ``start`` and ``end`` (seconds) where rows
    say them.
    """

    name: ClassVar[str] = "recordings"
    reasons: ClassVar[tuple[str, ...]] = tuple(reason.name.lower() for reason in Reason)

    path: Path  # a folder, or a file of rows
    corpus: str = ""  # begins every id; the recipe's own
    format: str = FILES  # "files", or a format of kind: manifest, such as csv, jsonl, classes, tars
    root: Path | None = None  # the folder that sounds are named under; by default the one that `path` is or is in
    columns: dict[str, str] = field(default_factory=dict)  # what rows call our fields
    keep: list[str] = field(default_factory=list)  # columns that become fields as they are
    options: dict[str, Any] = field(default_factory=dict)  # of the format
    seed: int = 0  # of a format that draws

    @property
    def gives(self) -> tuple[str, ...]:
        return (*_OWN, "text", "label", "start", "end", *self.keep)

    @property
    def reader(self) -> Format:
        found: Format = FORMATS.find(self.format)
        return found

    @property
    def folder(self) -> Path:
        return self.root or (self.path if self.path.is_dir() else self.path.parent)

    def check(self) -> None:
        for name, column in self.columns.items():
            if name not in FIELDS:
                found = f"'{name}'{nearest(str(name), FIELDS)}"
                raise ConfigError(describe("source.columns", f"keys among {', '.join(FIELDS)}", found))
            if not isinstance(column, str) or not column:
                raise ConfigError(describe(f"source.columns.{name}", "the name of a column", f"{column!r}"))
        if taken := set(self.keep) & {*_OWN, *FIELDS}:
            cure = "Name it under 'columns'."
            raise ConfigError(describe("source.keep", "columns that are no field yet", f"'{min(taken)}'", cure))
        if self.format != FILES:
            self.reader.check_options(self.options)

    def items(self) -> Iterator[Item | Reject]:
        rows = self._files() if self.format == FILES else self.reader.rows(self._place())
        there: dict[str, None] = {}
        for number, row in enumerate(rows):
            if isinstance(row, RowReject):
                yield self._reject(row.item, row.reason, row.detail)
                continue
            there |= dict.fromkeys(map(str, row.values))
            try:
                yield self._item(row, number)
            except RowError as error:
                yield self._reject(row.where, error.reason, error.detail)
            except (AudioError, DataError) as error:
                yield self._reject(row.where, Reason.BROKEN_ROW, str(error))

        self._check_columns(there)

    def _check_columns(self, there: Collection[str]) -> None:
        """Raise :class:`ConfigError` for a column that the recipe names and no row has."""
        named = [(f"source.columns.{name}", column) for name, column in self.columns.items()]
        for key, column in [*named, *(("source.keep", column) for column in self.keep)]:
            if there and column not in there:
                expected = f"a column of {self.path.name}: {', '.join(list(there)[:20])}"
                raise ConfigError(describe(key, expected, f"'{column}'{nearest(column, there)}"))

    def _reject(self, where: str, reason: Reason, detail: str) -> Reject:
        return Reject(where, reason.name.lower(), detail or reason.value)

    def _place(self) -> Place:
        return Place(self.path, self.folder, self.options, self.seed)

    def _files(self) -> Iterator[Record]:
        if not self.path.is_dir():
            found = "a file" if self.path.exists() else "no such folder"
            raise DataError(describe(f"source.path {self.path}", "a folder of recordings", found))
        listed = folders.listing(self.path, folders.SUFFIXES | folders.OTHERS)
        folders.tell(self.path, listed.left_out)
        for file in listed.files:
            where = folders.readable(file)
            yield Record({"audio": File(self.path / file, where), "id": where}, where)

    def _item(self, row: Record, number: int) -> Item:
        value = {name: row.values.get(self._column(name)) for name in FIELDS}
        sound = self._sound(value["audio"])
        audio, mark = reference(sound)
        source = text_of(value["group"], "group") or sound.name
        fields = {"audio": audio, "name": sound.name, "mark": mark, "source": source}
        fields |= {name: text for name in ("text", "label") if (text := text_of(value[name], name))}
        fields |= {name: time for name in ("start", "end") if (time := seconds_of(value[name], name)) is not None}
        kept = {name: row.values[name] for name in self.keep if _plain(row.values.get(name))}
        return Item(identity(self.corpus, value["id"], number), fields | kept)

    def _column(self, name: str) -> str:
        usual: Mapping[str, Any] = {} if self.format == FILES else self.reader.columns
        column = self.columns.get(name) or _USUAL.get(self.format, {}).get(name) or usual.get(name, name)
        return str(column)

    def _sound(self, value: Any) -> Sound:
        if isinstance(value, Cell):
            return TableCell(value, self.folder)
        if value is not None and is_sound(value):
            sound: Sound = value
            return sound
        value = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(value, str) or not value.strip():
            raise RowError(Reason.NO_SOUND_NAMED, f"expected the name of a file, found {value!r:.60}.")
        try:
            return file_under(self.folder, value.strip())
        except DataError as error:
            raise RowError(Reason.OUTSIDE_ROOT, str(error)) from error


def _plain(value: Any) -> bool:
    """Whether a value of a table is one of JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, (str, int, bool)) or (isinstance(value, float) and math.isfinite(value))


SOURCE = Recordings
