"""Folders of DCASE 2025 task 3 (stereo SELD): five-second clips, a table of events for each, rooms that stay apart.

    stereo_dev/<split>/fold3_room22_mix004_deg030_start0125.wav    metadata_dev/<split>/….csv    stereo_eval/eval/*.wav

A *room* (``fold3_room22``) is the unit of splitting: clips of one recording overlap, and recordings of one room share
its echoes. ``classes.json`` beside the folders names other classes than the challenge's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_llm import audio
from audio_llm.datasets import seld_tables
from audio_llm.datasets.folders import SUFFIXES, files_below, hidden
from audio_llm.errors import AudioError, ConfigError, DataError, ShardError, describe, nearest
from audio_llm.files import glance, read_json
from audio_llm.shards.schema import AudioInfo, Event, Sample, Source

AUDIO, TABLES, EVALUATION, CLASSES_FILE = "stereo_dev", "metadata_dev", "stereo_eval", "classes.json"
TEST_FOLD = "fold4"  # scores are reported on it: it neither trains nor chooses
DATASET = "dcase2025_task3"
_METRES = 20  # tables in none of which anything is further than so many centimetres were written in metres


@dataclass(frozen=True)
class Clip:
    """A clip of the corpus: ``name`` without suffix, as its table and its predictions are called."""

    name: str
    path: Path
    table: Path | None = None  # none in the evaluation set

    @property
    def room(self) -> str:
        """``fold3_room22``; the name itself where it says no room."""
        found = re.match(r"fold\d+_room\d+", self.name)
        return found[0] if found else self.name

    @property
    def fold(self) -> str:
        return self.room.partition("_")[0]


class SELDFolder:
    """Clips as samples whose events are runs of equal rows; what training reads beside shards and sound folders."""

    annotates_all = True  # a clip without events is silent

    def __init__(self, clips: Sequence[Clip], labels: Sequence[str]) -> None:
        self.clips, self.labels, self.dataset = list(clips), list(labels), DATASET
        self._centimetres = False  # whether a table was seen that cannot be in metres

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def rooms(self) -> list[str]:
        return sorted({clip.room for clip in self.clips})

    def load_sample(self, number: int) -> Sample:
        """Events and length (by the file's header). Raises :class:`AudioError` or :class:`ShardError`."""
        clip = self.clips[number]
        info = audio.read_header(clip.path)
        if info.channels != 2:
            cure = audio.other_channels(2, info.channels)
            raise AudioError(describe(str(clip.path), "2 channels", str(info.channels), cure))
        rows = self.rows(number)
        if len(rows) and (rows[:, 0].max() - 1) * seld_tables.FRAME_SECONDS > info.duration:
            expected = f"frames within {info.duration:g} s"
            raise DataError(describe(str(clip.table), expected, f"frame {int(rows[:, 0].max())}"))
        return Sample(
            clip.name,
            "seld",
            events=events_of_rows(rows, self.labels),
            audio=[AudioInfo(info.samplerate, 2, "stereo", info.duration)],
            source=Source(self.dataset, clip.fold, clip.name),
        )

    def load_waveform(self, number: int) -> audio.Waveform:
        """The decoded clip."""
        return audio.decode(str(self.clips[number].path), layout="stereo")

    def rows(self, number: int) -> np.ndarray:
        """The clip's table ``(n, 6)`` as :mod:`audio_llm.tasks.seld.tracks` has it; empty where there is none."""
        table = self.clips[number].table
        if table is None:
            return np.zeros((0, len(seld_tables.COLUMNS)))
        rows = seld_tables.read_rows(table)
        farthest = rows[:, 4].max(initial=0.0)
        self._centimetres = self._centimetres or farthest >= _METRES
        if not self._centimetres and farthest > 0:
            # A sound close by in one clip, or all tables in metres: any that goes further tells.
            self._centimetres = any(_farthest(clip.table) >= _METRES for clip in self.clips)
            if not self._centimetres:
                found = f"at most {farthest:g} in it, and no more in any other, which looks like metres"
                raise DataError(describe(str(table), "distances in centimetres", found))
        return rows

    @property
    def fingerprint(self) -> str:
        """Of classes, names, tables, and of what :func:`audio_llm.files.glance` sees of the sounds."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for clip in self.clips:
            digest.update(f"{clip.name}\0{glance(clip.path)}\0".encode())
            digest.update(clip.table.read_bytes() if clip.table else b"")
        return digest.hexdigest()

    def select(self, folds: Sequence[str], without: Sequence[str] = ()) -> SELDFolder:
        """The clips of some folds (``fold3``) or rooms (``fold3_room22``), less those of `without`.

        Raises :class:`ConfigError` for a name that no clip has.
        """
        known = {clip.room for clip in self.clips} | {clip.fold for clip in self.clips}
        for name in (*folds, *without):
            if name not in known:
                expected = f"folds or rooms of the corpus ({', '.join(sorted(known))})"
                raise ConfigError(describe("folds", expected, f"'{name}'{nearest(name, known)}"))
        kept = [
            clip
            for clip in self.clips
            if not {clip.room, clip.fold}.isdisjoint(folds) and {clip.room, clip.fold}.isdisjoint(without)
        ]
        return SELDFolder(kept, self.labels)


def check_folds(folds: Sequence[str]) -> None:
    """Raise :class:`ConfigError` where one of `folds` to train or to choose on is the test fold, or a room of it."""
    for name in folds:
        if name.partition("_")[0] == TEST_FOLD:
            cure = "For a submission, whose scores are made elsewhere: use_test_fold: true."
            expected = f"other folds than {TEST_FOLD}, which scores are reported on"
            raise ConfigError(describe("train_folds, validation_folds", expected, f"'{name}'", cure))


def recognises(folder: str | Path) -> bool:
    """Whether `folder` has the layout of the challenge."""
    return any((Path(folder) / name).is_dir() for name in (AUDIO, EVALUATION))


def open_clips(
    folder: str | Path, folds: Sequence[str] | None = None, without: Sequence[str] = (), use_test_fold: bool = False
) -> SELDFolder:
    """The development clips of some folds or rooms. Raises :class:`ConfigError` where none are named."""
    if folds is None:
        raise ConfigError(describe(f"stereo SELD {folder}", "which folds to train on", "no train_folds"))
    if not use_test_fold:
        check_folds(folds)
    return find(folder).select(folds, without)


def read_labels(folder: str | Path) -> list[str]:
    """The classes by their numbers in tables: ``classes.json`` of the folder, or else the challenge's thirteen."""
    path = Path(folder) / CLASSES_FILE
    if not path.is_file():
        from audio_llm.encoders.seld_head import CLASSES  # with torch, which recipes do without

        return list(CLASSES)
    try:
        labels = read_json(path)
    except ValueError as error:
        raise DataError(describe(str(path), "a list of names", "no JSON")) from error
    if not isinstance(labels, list) or not labels or not all(isinstance(name, str) for name in labels):
        raise DataError(describe(str(path), "a list of names", repr(labels)[:60]))
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise DataError(describe(str(path), "every class once", f"'{twice[0]}' twice"))
    return labels


def _sounds(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and not hidden(path.name))


def find(folder: str | Path) -> SELDFolder:
    """The development clips of a corpus, each with its table; nothing is opened. Raises :class:`DataError`."""
    root = Path(folder)
    paths = _sounds((root / AUDIO).glob("dev-*/*"))
    if not paths:
        raise DataError(describe(str(root), f"clips {AUDIO}/dev-*/*.wav", "none"))
    clips = []
    for path in paths:
        table = root / TABLES / path.parent.name / f"{path.stem}.csv"
        if not table.is_file():
            raise DataError(describe(str(path), f"its table {table}", "none"))
        clips.append(Clip(path.stem, path, table))
    return SELDFolder(clips, read_labels(root))


def find_evaluation(folder: str | Path) -> SELDFolder:
    """The clips of the evaluation set, which have no tables. Raises :class:`DataError` when there are none."""
    paths = _sounds(files_below(Path(folder) / EVALUATION, endings=SUFFIXES))
    if not paths:
        raise DataError(describe(str(folder), f"clips below {EVALUATION}", "none"))
    return SELDFolder([Clip(path.stem, path) for path in paths], read_labels(folder))


def _farthest(table: Path | None) -> float:
    """The largest distance of a table; 0 of one that cannot be read, which is told of where it is used."""
    with contextlib.suppress(ShardError):
        return seld_tables.read_rows(table)[:, 4].max(initial=0.0) if table else 0.0
    return 0.0


def events_of_rows(rows: np.ndarray, labels: Sequence[str]) -> list[Event]:
    """Rows as events: consecutive frames of one source at one place are one event.

    The inverse of ``event_rows`` of the task `seld` but for the numbers of sources, and onscreen, which is left out.
    """
    if len(rows) and rows[:, 1].max() >= len(labels):
        raise DataError(describe("table", f"classes 0 to {len(labels) - 1}", f"class {int(rows[:, 1].max())}"))
    events: list[Event] = []
    running: dict[tuple[float, ...], list[float]] = {}  # (class, source, azimuth, distance) -> first and last frame

    def close(key: tuple[float, ...], first: float, last: float) -> None:
        step = seld_tables.FRAME_SECONDS
        onset, offset = round(first * step, 3), round((last + 1) * step, 3)
        events.append(Event(labels[int(key[0])], onset, offset, key[2], None, key[3] / 100))

    for frame, *cells, _ in sorted({tuple(row) for row in rows.tolist()}):  # what is said twice is one
        key = tuple(cells)
        if key in running and running[key][1] == frame - 1:
            running[key][1] = frame
            continue
        if key in running:
            close(key, *running.pop(key))
        running[key] = [frame, frame]
    for key, (first, last) in running.items():
        close(key, first, last)
    return sorted(events, key=lambda event: (event.onset or 0.0, event.label, event.azimuth or 0.0))
