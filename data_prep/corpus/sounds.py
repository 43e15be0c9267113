"""Where the sound of an item lies, as JSON has it: a path, or a stretch of bytes or a cell of a table in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform
from audio_llm.datasets.records import Cell
from audio_llm.errors import AudioError, describe
from audio_llm.files import glance
from audio_llm.integers import floats
from data_prep.manifest.sounds import File, Part, Sound, TableCell


@dataclass(frozen=True)
class Clip(File):
    """A file that the stage ``cut`` wrote, of samples that are known by `content`."""

    content: str

    def stored(self, content: str) -> bytes | None:
        """Its bytes, where it is FLAC of 16 bits and holds the samples that it was written with: those of a shard are
        the same, by the same encoder. `content` is the hash of what was decoded."""
        data = self.path.read_bytes() if content == self.content else b""
        bits = (data[20] & 1) << 4 | data[21] >> 4 if data.startswith(_FLAC) and len(data) > 42 else 0
        return data if bits + 1 == 16 else None


_FLAC = b"fLaC\0\0\0\x22"  # STREAMINFO follows, whose bits 103 to 107 are the bits of a sample, less one


def reference(sound: Sound) -> tuple[Any, str]:
    """A sound as a field of an item, and what tells its content from another's without reading all of it."""
    if isinstance(sound, File):
        path = sound.path.absolute()
        return str(path), glance(path)
    if isinstance(sound, Part):
        part = {"path": str(sound.path.absolute()), "offset": sound.offset, "size": sound.size}
        return part, f"{_glance(part['path'])} {sound.offset} {sound.size}"
    if isinstance(sound, TableCell):
        cell = {"path": str(sound.cell.path.absolute()), "row": sound.cell.row, "column": sound.cell.column}
        root = str(sound.root.absolute())
        return cell | {"root": root}, f"{_glance(cell['path'])} {sound.cell.row} {sound.cell.column}"
    raise AudioError(describe(sound.name, "a file, a part of one or a cell of a table", type(sound).__name__))


@lru_cache(maxsize=16)  # many rows lie in one file
def _glance(path: str) -> str:
    return glance(path)


def sound_of(value: Any, folder: Path, name: str | None = None) -> Sound:
    """The sound that a field of an item stands for; a path is absolute or below `folder`. Raises AudioError."""
    try:
        if isinstance(value, str):
            return File(folder / value, name or value)
        path = Path(value["path"])
        if "column" in value:
            return TableCell(Cell(path, value["column"], value["row"]), Path(value["root"]))
        return Part(path, value["offset"], value["size"], name or f"{path.name}, byte {value['offset']}")
    except (TypeError, KeyError) as error:
        raise AudioError(describe("audio", "a path, or a place in a file", f"{value!r:.80}")) from error


def hear(fields: Mapping[str, Any], folder: Path, max_seconds: float) -> Waveform:
    """The decoded sound of an item's fields. Raises :class:`AudioError`, its `cause` where it has one."""
    return floats(sound_of(fields["audio"], folder, fields.get("name")).hear(max_seconds))
