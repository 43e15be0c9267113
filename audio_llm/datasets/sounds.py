"""Labelled sound folders (ESC-50 layout, UrbanSound8K layout, ``class/file``), their folds, their clips as samples.

A *recording* is what was once recorded in one go (a Freesound upload); several clips may be cut from it. It is the
unit of splitting, so that no recording is on both sides.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audio_llm import audio
from audio_llm.datasets import folders
from audio_llm.errors import AudioError, ConfigError, describe
from audio_llm.files import glance, within
from audio_llm.shards.schema import AudioInfo, Event, Sample, Source

# Clips in folds 1 to 10 as the corpus was published: a metadata file with other counts was made by somebody else.
URBANSOUND8K_FOLDS = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)


@dataclass(frozen=True)
class Clip:
    """One clip: `start` and `seconds` frame its audible part; a built-in sound has no `path` but a `seed`. `loud` says
    which frames of that part are (``data_prep.sounds``), "1" or "0" each, where it was opened."""

    label: str
    recording: str
    name: str
    start: float = 0.0
    seconds: float = 0.0
    fold: str | None = None
    path: str | None = None
    seed: int = 0
    loud: str = ""
    foreground: bool | None = None  # UrbanSound8K's salience: is the sound in the foreground of its recording?


@dataclass
class Library:
    """Clips with what was left out and why. ``fingerprint`` changes when files are added, removed or rewritten."""

    dataset: str
    clips: list[Clip]
    fingerprint: str
    licence: str | None = None
    rejects: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)  # what :func:`find` saw and did not list

    @property
    def labels(self) -> list[str]:
        return sorted({clip.label for clip in self.clips})


# ------------------------------------------------------------------------------------------------ finding clips


any_sounds = True  # :func:`recognises` holds for every folder with sounds: other data sets come first
LAYOUTS = "ESC-50 (meta/esc50.csv, audio/), UrbanSound8K (UrbanSound8K.csv, fold1/ …) or class/file"
_FOLD = re.compile(r"folds?[ _-]?\d+", re.IGNORECASE)
_SPLIT = re.compile(r"(train|test|val|valid|dev|eval)(ing|idation|uation|elopment)?([ _-]?(set|split|data))?", re.I)
_TABLES = ("meta/esc50.csv", "esc50.csv", "metadata/UrbanSound8K.csv", "UrbanSound8K.csv")


def _table(root: Path) -> tuple[Path, Path] | None:
    """(folder, table) of a corpus with metadata: `root` itself, or what `root` is the ``audio/`` of."""
    places = [root, root.resolve().parent] if root.resolve().name == "audio" else [root]
    return next(((place, place / name) for place in places for name in _TABLES if (place / name).is_file()), None)


def recognises(folder: str | Path) -> bool:
    """Whether there is anything that :func:`find` would list, or refuse with the reason."""
    root = Path(folder)
    if not root.is_dir() or next(root.glob("*.tar*"), None) is not None:
        return False
    deep = (path for depth in range(1, 5) for path in root.glob("/".join("*" * depth)))
    return _table(root) is not None or any(path.suffix.lower() in folders.SUFFIXES for path in deep)


def find(folder: str | Path) -> Library:
    """List the clips of a sound folder without opening any audio. Raises :class:`AudioError` for a folder that is laid
    out otherwise: classes are never guessed."""
    root = Path(folder)
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise AudioError(describe(f"sound folder '{folder}'", "a folder", found))
    corpus = _table(root)
    if corpus is None:
        found_files = folders.listing(root)
        dataset, clips = root.resolve().name, _class_folders(root, found_files)
    else:
        place, table = corpus
        dataset = "esc50" if table.name == "esc50.csv" else "urbansound8k"
        clips = (_esc50 if dataset == "esc50" else _urbansound8k)(place, table)
        found_files = folders.listing(place)
        names = {os.path.basename(clip.path or "") for clip in clips}
        for path in found_files.files:
            if path.name not in names:
                found_files.omit(path, f"not in {table.name}")
        if not clips:
            raise AudioError(describe(f"metadata '{table}'", "a row per sound", "none"))
        if twice := [name for name, count in Counter(clip.name for clip in clips).items() if count > 1]:
            raise AudioError(describe(f"metadata '{table}'", "each file once", f"{twice[0]} several times"))
    return Library(dataset, clips, fingerprint(clips), left_out=found_files.left_out)


def _rows(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file. Raises :class:`AudioError` where one of `columns` is missing or has no value."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                found = ", ".join(reader.fieldnames or []) or "an empty file"
                raise AudioError(describe(f"metadata '{path}'", f"the columns {', '.join(columns)}", found))
            for row in reader:
                empty = next((column for column in columns if not (row[column] or "").strip()), None)
                if empty:
                    where = f"metadata '{path}', line {reader.line_num}"
                    raise AudioError(describe(where, f"a value in column {empty}", "none"))
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise AudioError(describe(f"metadata '{path}'", "CSV in UTF-8", str(error))) from error


def tidy(label: str) -> str:
    """A label as people write it: lower case, words apart, in one Unicode form."""
    label = unicodedata.normalize("NFC", folders.readable(label))
    return " ".join(label.replace("_", " ").split()).lower()


def _whole(number: str) -> str:
    """A fold or a recording's number without the decimals that a spreadsheet gives it."""
    return number.strip().removesuffix(".0")


def _file(place: Path, name: str) -> Path:
    """The file that a table calls `name`. Raises :class:`DataError` for a name that leads out of `place`."""
    within(place, name)
    return folders.find_file(place, name)


def _esc50(root: Path, table: Path) -> list[Clip]:
    rows = [*_rows(table, ("filename", "fold", "category", "src_file"))]
    place = _where([root / "audio", root / "audio" / "audio", root], [row["filename"] for row in rows])
    return [
        Clip(
            tidy(row["category"]),
            _whole(row["src_file"]),
            row["filename"].strip(),
            fold=_whole(row["fold"]),
            path=str(_file(place, row["filename"].strip())),
        )
        for row in rows
    ]


def _urbansound8k(root: Path, table: Path) -> list[Clip]:
    rows = [*_rows(table, ("slice_file_name", "fsID", "fold", "class"))]
    names = [f"fold{_whole(row['fold'])}/{row['slice_file_name'].strip()}" for row in rows]
    place = _where([root / "audio", root], names)
    return [
        Clip(
            tidy(row["class"]),
            _whole(row["fsID"]),
            row["slice_file_name"].strip(),
            fold=_whole(row["fold"]),
            path=str(_file(place, name)),
            foreground={"1": True, "2": False}.get(_whole(row.get("salience") or "")),
        )
        for row, name in zip(rows, names, strict=True)
    ]


def _where(places: list[Path], names: list[str]) -> Path:
    """The first of `places` that has any of `names`."""
    return next((place for place in places if any((place / name).is_file() for name in names)), places[0])


def _class_folders(root: Path, found: folders.Listing) -> list[Clip]:
    classes: dict[str, list[Path]] = defaultdict(list)
    for path in found.files:
        if len(path.parts) == 1:
            found.omit(path, "beside the class folders")
        else:
            classes[path.parts[0]].append(path)
    _check_classes(root, classes, found)
    return [
        Clip(
            tidy(name),
            folders.readable(path.with_suffix("")),
            folders.readable(path),
            path=str(root / path),
        )
        for name in sorted(classes)
        for path in classes[name]
    ]


def _check_classes(root: Path, classes: dict[str, list[Path]], found: folders.Listing) -> None:
    """Raise :class:`AudioError` where the folders below `root` are no classes, or only some of them are."""
    expected = f"sounds in one of the layouts {LAYOUTS}"
    names = sorted(classes)
    told = ", ".join(folders.readable(name) + "/" for name in names[:4]) + (" …" if len(names) > 4 else "")
    inner = [folders.readable(path) for name in names for path in classes[name] if len(path.parts) > 2]
    shallow = [name for name in names if any(len(path.parts) == 2 for path in classes[name])]
    deeper = next((folder for folder in sorted(root.glob("*/")) if _table(folder)), None)
    cure = None
    if deeper is not None:
        problem, cure = f"a corpus one folder further down, in {deeper.name}/", f"Give '{deeper}'."
    elif not names:
        problem = f"no class folders, but {len(found.left_out)} item(s) left out" if found.left_out else "none"
        cure = folders.told(found.left_out)
    elif all(_FOLD.fullmatch(name) for name in names):
        problem = f"folds without a table of their classes ({told})"
        cure = "Put UrbanSound8K.csv beside them, or meta/esc50.csv beside their folder."
    elif all(_SPLIT.fullmatch(name) for name in names):
        problem = f"splits, not classes ({told})"
        cure = f"Give one of them, such as '{root / names[0]}', with a folder for every class."
    elif not shallow or (inner and len(shallow) < len(names)):
        problem = f"sounds further down, such as {inner[0]}: which folder is the class?"
        cure = "Give the folder above the class folders, or move the files up."
    elif len(names) == 1:
        problem = f"one class alone ({told})"
        cure = f"Give the folder that all class folders lie in. {folders.told(found.left_out)}".strip()
    else:
        return
    raise AudioError(describe(f"sound folder '{folders.readable(root)}'", expected, problem, cure))


def fingerprint(clips: list[Clip]) -> str:
    """Of labels, recordings, names, folds and file sizes."""
    digest = hashlib.sha256()
    for clip in clips:
        size = os.path.getsize(clip.path) if clip.path and os.path.exists(clip.path) else -1
        digest.update(
            f"{clip.label}\0{clip.recording}\0{clip.name}\0{clip.fold}\0{clip.seed}\0{clip.seconds:.6f}\0{size}\n".encode(
                errors="surrogateescape"
            )
        )
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ official folds


def official_folds(library: Library) -> dict[str, list[Clip]]:
    """The clips by the corpus's own folds, in order; :class:`ConfigError` where these are not the official ones.

    Checked: there are folds; the metadata agrees with what the file names say of fold and recording; UrbanSound8K, when
    complete, has its published counts; and no recording is in two folds. A shuffled split fails at least one of them.
    """
    names = sorted({clip.fold for clip in library.clips if clip.fold}, key=lambda fold: (len(fold), fold))
    if len(names) < 2 or any(clip.fold is None for clip in library.clips):
        cure = "Use a corpus in ESC-50's or UrbanSound8K's layout; a split made by shuffling would measure memory."
        raise ConfigError(describe(library.dataset, "a corpus with official folds", f"{len(names)} folds", cure))
    _check_names(library)
    crossing = crossing_recordings(library.clips)
    if crossing:
        found = f"recording {crossing[0]} in several folds ({len(crossing)} recordings so)"
        cure = "Restore the official folds."
        raise ConfigError(describe(library.dataset, "folds that share no recording", found, cure))
    folds = {name: [clip for clip in library.clips if clip.fold == name] for name in names}
    if library.dataset == "urbansound8k" and len(library.clips) == sum(URBANSOUND8K_FOLDS):
        counts = tuple(len(clips) for clips in folds.values())
        if counts != URBANSOUND8K_FOLDS:
            raise ConfigError(describe(library.dataset, f"folds of {URBANSOUND8K_FOLDS} clips", str(counts)))
    return folds


def crossing_recordings(clips: Iterable[Clip]) -> list[str]:
    """Recordings of which clips lie in more than one fold."""
    folds: dict[str, set[str | None]] = defaultdict(set)
    for clip in clips:
        folds[clip.recording].add(clip.fold)
    return sorted(recording for recording, found in folds.items() if len(found) > 1)


def _check_names(library: Library) -> None:
    """ESC-50 files are ``fold-recording-take-class``, UrbanSound8K's ``recording-class-occurrence-slice``."""
    twice = [name for name, count in Counter(clip.name for clip in library.clips).items() if count > 1]
    if twice:
        raise ConfigError(describe(f"{library.dataset} metadata", "each file once", f"{twice[0]} several times"))
    if library.dataset not in ("esc50", "urbansound8k"):
        return
    for clip in library.clips:
        fields = clip.name.split("-")
        said = [clip.fold or "", clip.recording] if library.dataset == "esc50" else [clip.recording]
        if len(fields) == 4 and fields[: len(said)] != said:
            what = "fold and recording" if len(said) == 2 else "recording"
            found = f"{', '.join(said)} in the metadata"
            cure = "Restore the official metadata; scores on other folds cannot be compared, and these may leak."
            raise ConfigError(describe(f"clip {clip.name}", f"the {what} its name says", found, cure))


# ------------------------------------------------------------------------------------------------ clips as samples


def open_clips(
    folder: str | Path, folds: Sequence[str] | None = None, without: Sequence[str] = (), use_test_fold: bool = False
) -> SoundFolder:
    """The clips of a sound folder; of its official `folds` those that are named. None of these is a fixed test fold."""
    library = find(folder)
    if folds is None:
        return SoundFolder(library.clips, library.dataset, library.left_out)
    official = official_folds(library)
    for fold in folds:
        if fold not in official:
            raise ConfigError(describe(f"folds of {folder}", ", ".join(official), f"'{fold}'"))
    clips = [clip for fold in folds if fold not in without for clip in official[fold]]
    return SoundFolder(clips, library.dataset, library.left_out)


class SoundFolder:
    """Clips of a sound folder as samples whose one event is the clip's class; what training reads beside shards."""

    def __init__(self, clips: Sequence[Clip], dataset: str, left_out: Sequence[dict[str, str]] = ()) -> None:
        self.clips, self.dataset, self.left_out = list(clips), dataset, list(left_out)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def fingerprint(self) -> str:
        """Of :func:`fingerprint`, and of what :func:`audio_llm.files.glance` sees of the sounds."""
        digest = hashlib.sha256(fingerprint(self.clips).encode())
        for clip in self.clips:
            digest.update(glance(str(clip.path)).encode())
        return digest.hexdigest()

    def load_sample(self, number: int) -> Sample:
        """Class, recording and length (by the file's header). Raises :class:`AudioError` for what cannot be used."""
        clip = self.clips[number]
        info = audio.read_header(str(clip.path))
        if info.channels not in audio.LAYOUT_OF_COUNT:
            cure = audio.other_channels(2, info.channels)
            raise AudioError(describe(str(clip.path), "1, 2 or 4 channels", f"{info.channels} channels", cure))
        layout = audio.LAYOUT_OF_COUNT[info.channels]
        return Sample(
            clip.name,
            "classification",
            events=[Event(clip.label)],
            audio=[AudioInfo(info.samplerate, info.channels, layout, info.duration)],
            source=Source(self.dataset, clip.fold, clip.recording),
        )

    def load_waveform(self, number: int) -> audio.Waveform:
        """The decoded clip, all of its channels."""
        return audio.decode(str(self.clips[number].path))
