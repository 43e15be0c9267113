"""SpatialSoundQA's records (Zheng et al. 2024, BAT): a question about one or two dry clips, each in a measured room.

What is heard is rendered as the published code renders it (:mod:`audio_llm.shards.rendering`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from audio_llm.audio import Waveform
from audio_llm.datasets.folders import files_below
from audio_llm.datasets.records import SUFFIXES, Record
from audio_llm.errors import DataError, describe, nearest
from audio_llm.shards.rendering import Rendering, render_files

TYPES = (
    *("CLASSIFICATION", "DOA", "MIXUP_SINGLE_CLASSIFICATION", "MIXUP_SINGLE_DOA"),
    *("MIXUP_DIRECTION", "MIXUP_DISTANCE_BOTH"),
    *("MIXUP_NONBINARY_DISTANCE", "MIXUP_NONBINARY_SOURCE", "MIXUP_NONBINARY_DIRECTION"),
)
RATES = range(4_000, 192_001)  # in Hz, as of simulated rooms
_PLACES = ("audio_id", "reverb_id", "audio_id2", "reverb_id2")


@dataclass(frozen=True)
class Heard:
    """The dry clips of an item and the response each is heard through."""

    clips: tuple[Path, ...]
    responses: tuple[Path, ...]

    def missing(self) -> str:
        """Which file is not there; "" where all are."""
        for what, paths in (("dry clip", self.clips), ("room response", self.responses)):
            for path in paths:
                if not path.is_file():
                    return describe(f"{what} {path}", "a file", "none")
        return ""

    def render(self, rendering: Rendering) -> Waveform:
        """The scene. Raises :class:`AudioError` naming the file that cannot be used."""
        return render_files(self.clips, self.responses, rendering)


@dataclass(frozen=True)
class Question:
    """A record: its words, the names of its clips and of the responses they are heard through."""

    question: str
    answer: str
    question_type: str
    clips: tuple[str, ...]
    rooms: tuple[str, ...]

    @property
    def recordings(self) -> str:
        """What it is known by for sides and intervals: its clips, in whatever order."""
        return "+".join(sorted(self.clips))

    def heard(self, audio: Path, responses: Path) -> Heard:
        """Its files, under the folder of dry clips and that of the responses of one layout."""
        return Heard(tuple(_sound(audio / clip) for clip in self.clips), tuple(responses / room for room in self.rooms))


def question_files(data: Path) -> list[Path]:
    """The file, or the files of a folder that may hold questions, sorted. Raises :class:`DataError`."""
    if data.is_file():
        return [data]
    files = files_below(data, endings=SUFFIXES)
    if not files:
        found = "none" if data.is_dir() else "no such path"
        raise DataError(describe(str(data), f"a file or a folder of files {', '.join(SUFFIXES)}", found))
    return files


def without_training(files: list[Path], data: Path) -> tuple[list[Path], int]:
    """`files` of `data` but those of training questions, and how many these are: published folders hold ``train.json``
    beside the others. Where one is named itself, or there are no others, they stay."""
    kept = [path for path in files if path == data or path.stem.lower() != "train"]
    return (kept, len(files) - len(kept)) if kept else (files, 0)


def read_question(record: Record) -> Question:
    """Raises :class:`DataError` for a type that there is not, half a second source, and paths that lead elsewhere."""
    kind = record.text("question_type")
    if kind.upper() not in TYPES:
        found = f"'{kind}'{nearest(kind.upper(), TYPES)}"
        raise DataError(describe(f"{record.where}: 'question_type'", "one of the nine types", found))
    clips, rooms = [record.text("audio_id")], [record.text("reverb_id")]
    second = [record.text(key, default="") for key in ("audio_id2", "reverb_id2")]
    if all(second):
        clips.append(second[0])
        rooms.append(second[1])
    elif any(second):
        found = "one of them"
        raise DataError(describe(record.where, "both 'audio_id2' and 'reverb_id2', or neither", found))
    for key, name in zip(_PLACES, [clips[0], rooms[0], *second], strict=True):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(describe(f"{record.where}: '{key}'", "a path inside its folder", f"'{name}'"))
    return Question(record.text("question"), record.text("answer"), kind.upper(), tuple(clips), tuple(rooms))


def _sound(path: Path) -> Path:
    """Published clips are named without ``.wav``; other corpora name them with their ending."""
    return path if path.is_file() else path.with_name(f"{path.name}.wav")
