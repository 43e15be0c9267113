"""Labelled sound folders (ESC-50 layout, UrbanSound8K layout, ``class/file``), their folds, their clips as samples.

A *recording* is what was once recorded in one go (a Freesound upload); several clips may be cut from it. It is the
unit of splitting, so that no recording is on both sides.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audio_llm import audio
from audio_llm.errors import AudioError, ConfigError, describe
from audio_llm.files import glance
from audio_llm.shards.schema import AudioInfo, Event, Sample, Source

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus"}
# Clips in folds 1 to 10 as the corpus was published: a metadata file with other counts was made by somebody else.
URBANSOUND8K_FOLDS = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)


@dataclass(frozen=True)
class Clip:
    """One clip: `start` and `seconds` frame its audible part; a built-in sound has no `path` but a `seed`."""

    label: str
    recording: str
    name: str
    start: float = 0.0
    seconds: float = 0.0
    fold: str | None = None
    path: str | None = None
    seed: int = 0
    foreground: bool | None = None  # UrbanSound8K's salience: is the sound in the foreground of its recording?


@dataclass
class Library:
    """Clips with what was left out and why. ``fingerprint`` changes when files are added, removed or rewritten."""

    dataset: str
    clips: list[Clip]
    fingerprint: str
    licence: str | None = None
    rejects: list[dict[str, str]] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return sorted({clip.label for clip in self.clips})


# ------------------------------------------------------------------------------------------------ finding clips


def recognises(folder: str | Path) -> bool:
    """Whether there is anything :func:`find` would list."""
    root = Path(folder)
    metadata = (root / "meta" / "esc50.csv", root / "metadata" / "UrbanSound8K.csv")
    return any(path.is_file() for path in metadata) or any(path.suffix.lower() in SUFFIXES for path in root.glob("*/*"))


def find(folder: str | Path) -> Library:
    """List the clips of a sound folder without opening any audio. Raises :class:`AudioError` when there are none."""
    root = Path(folder)
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise AudioError(describe(f"sound folder '{folder}'", "a folder", found))
    if (root / "meta" / "esc50.csv").is_file():
        dataset, clips = "esc50", _esc50(root)
    elif (root / "metadata" / "UrbanSound8K.csv").is_file():
        dataset, clips = "urbansound8k", _urbansound8k(root)
    else:
        dataset, clips = root.resolve().name, _class_folders(root)
    if not clips:
        layouts = "meta/esc50.csv + audio/, metadata/UrbanSound8K.csv + audio/fold*/, or class/file"
        raise AudioError(describe(f"sound folder '{folder}'", f"sounds in one of the layouts {layouts}", "none"))
    return Library(dataset, clips, fingerprint(clips))


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
    """A label as people write it: lower case, words apart."""
    return " ".join(label.replace("_", " ").split()).lower()


def _esc50(root: Path) -> list[Clip]:
    rows = _rows(root / "meta" / "esc50.csv", ("filename", "fold", "category", "src_file"))
    return [
        Clip(
            tidy(row["category"]),
            row["src_file"],
            row["filename"],
            fold=row["fold"],
            path=str(root / "audio" / row["filename"]),
        )
        for row in rows
    ]


def _urbansound8k(root: Path) -> list[Clip]:
    rows = _rows(root / "metadata" / "UrbanSound8K.csv", ("slice_file_name", "fsID", "fold", "class"))
    return [
        Clip(
            tidy(row["class"]),
            row["fsID"],
            row["slice_file_name"],
            fold=row["fold"],
            path=str(root / "audio" / f"fold{row['fold']}" / row["slice_file_name"]),
            foreground={"1": True, "2": False}.get(row.get("salience") or ""),
        )
        for row in rows
    ]


def _class_folders(root: Path) -> list[Clip]:
    files = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
    return [
        Clip(tidy(path.parent.name), f"{path.parent.name}/{path.stem}", str(path.relative_to(root)), path=str(path))
        for path in files
    ]


def fingerprint(clips: list[Clip]) -> str:
    """Of labels, recordings, names, folds and file sizes."""
    digest = hashlib.sha256()
    for clip in clips:
        size = os.path.getsize(clip.path) if clip.path and os.path.exists(clip.path) else -1
        digest.update(
            f"{clip.label}\0{clip.recording}\0{clip.name}\0{clip.fold}\0{clip.seed}\0{clip.seconds:.6f}\0{size}\n".encode()
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
        return SoundFolder(library.clips, library.dataset)
    official = official_folds(library)
    for fold in folds:
        if fold not in official:
            raise ConfigError(describe(f"folds of {folder}", ", ".join(official), f"'{fold}'"))
    return SoundFolder([clip for fold in folds if fold not in without for clip in official[fold]], library.dataset)


class SoundFolder:
    """Clips of a sound folder as samples whose one event is the clip's class; what training reads beside shards."""

    def __init__(self, clips: Sequence[Clip], dataset: str) -> None:
        self.clips, self.dataset = list(clips), dataset

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
            raise AudioError(describe(str(clip.path), "1, 2 or 4 channels", f"{info.channels} channels"))
        layout = audio.LAYOUT_OF_COUNT[info.channels]
        return Sample(
            clip.name,
            "classification",
            events=[Event(clip.label)],
            audio=AudioInfo(info.samplerate, info.channels, layout, info.duration),
            source=Source(self.dataset, clip.fold, clip.recording),
        )

    def load_waveform(self, number: int) -> audio.Waveform:
        """The decoded clip, all of its channels."""
        return audio.decode(str(self.clips[number].path))
