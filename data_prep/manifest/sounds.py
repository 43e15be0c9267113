"""Where a sound lies: in a file, in a cell of a table, in a tar. Small, so that it travels to worker processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from audio_llm.audio import Waveform
from audio_llm.datasets.folders import find_file
from audio_llm.datasets.records import Cell
from audio_llm.errors import AudioError, DataError, describe
from audio_llm.integers import Integers, decode


class Sound(Protocol):
    """A sound that can be decoded. `name` is what it is known by: equal names, equal sound."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes, -1 where there are none or where they are not counted: a changed size is a changed sound."""

    def hear(self, max_seconds: float) -> Waveform | Integers:
        """In integers where it is stored in 16 bits and not compressed. Raises :class:`AudioError`, its `cause` where
        it has one."""


@dataclass(frozen=True)
class File:
    path: Path
    name: str

    @property
    def size(self) -> int:
        try:
            return os.path.getsize(self.path)
        except OSError:
            return -1

    def hear(self, max_seconds: float) -> Waveform | Integers:
        return decode(self.path, name=self.name, max_seconds=max_seconds)


@dataclass(frozen=True)
class Part:
    """A stretch of bytes of a file, such as a member of a tar."""

    path: Path
    offset: int
    size: int
    name: str

    def hear(self, max_seconds: float) -> Waveform | Integers:
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise AudioError(describe(self.name, "a readable file", error.strerror or str(error)), "missing") from error
        if data and len(data) < self.size:
            raise AudioError(describe(self.name, f"{self.size} bytes", f"{len(data)}"), "cut")
        return decode(data, name=self.name, max_seconds=max_seconds)


@dataclass(frozen=True)
class TableCell:
    """Bytes in a table, or under ``bytes`` beside a ``path`` as Hugging Face writes them; without bytes, that path."""

    cell: Cell
    root: Path

    @property
    def name(self) -> str:
        place = Path(os.path.relpath(self.cell.path, self.root)).as_posix()
        return f"{place}: row {self.cell.row}, '{self.cell.column}'"

    @property
    def size(self) -> int:
        return -1  # the table itself is known by its size

    def hear(self, max_seconds: float) -> Waveform | Integers:
        value = self.cell.load()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if data is None and path:
            try:
                file = file_under(self.root, str(path))
            except DataError as error:
                raise AudioError(str(error), "outside") from error
            return file.hear(max_seconds)
        if not isinstance(data, bytes):
            raise AudioError(describe(self.name, "the bytes of a sound", "none"), "none")
        return decode(data, name=self.name, max_seconds=max_seconds)


def file_under(root: Path, name: str) -> File:
    """The file that a table calls `name`. Raises :class:`DataError` for a name that leads out of `root`, by
    ``..`` or by an absolute path; a link that lies there was laid by whoever made the folder."""
    given = Path(name.replace("\\", "/"))
    if given.is_absolute() and given.is_relative_to(root.absolute()):
        name = str(given.relative_to(root.absolute()))
    elif given.is_absolute() or ".." in given.parts or "\0" in name:
        raise DataError(describe(f"sound '{name}'", f"a name under {root}", "one that leads out of it"))
    path = find_file(root, name)
    return File(path, Path(os.path.normpath(name)).as_posix() if not os.path.isfile(path) else _below(path, root))


def _below(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def is_sound(value: Any) -> bool:
    return hasattr(value, "hear")
