"""Any labelled sound folder as a list of clips: ESC-50 layout, UrbanSound8K layout, ``class/file``, or built-in sounds.

A *recording* is what was once recorded in one go (a Freesound upload); several clips may be cut from it. It is the
unit of splitting, so that no recording is on both sides.
"""

from __future__ import annotations

import csv
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.errors import AudioError, ConfigError, describe, nearest
from data_prep import procedural

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus"}
SPLITS = ("train", "validation", "test")
SCAN_RATE = 16_000  # the audible part is looked for at one rate, so that it does not depend on the recipe
FLOOR_DB = -40.0  # frames this far below the loudest one are silence (ESC-50 pads short clips with digital zeros)


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


def find(folder: str | Path) -> Library:
    """List the clips of a sound folder without opening any audio. Raises :class:`AudioError` when there are none."""
    root = Path(folder)
    if not root.is_dir():
        raise AudioError(describe(f"sound folder '{folder}'", "a folder", "no such folder", "Check --sounds."))
    if (root / "meta" / "esc50.csv").is_file():
        dataset, clips = "esc50", _esc50(root)
    elif (root / "metadata" / "UrbanSound8K.csv").is_file():
        dataset, clips = "urbansound8k", _urbansound8k(root)
    else:
        dataset, clips = root.resolve().name, _class_folders(root)
    if not clips:
        layouts = "meta/esc50.csv + audio/, metadata/UrbanSound8K.csv + audio/fold*/, or class/file"
        raise AudioError(describe(f"sound folder '{folder}'", f"sounds in one of the layouts {layouts}", "none"))
    return Library(dataset, clips, _fingerprint(clips))


def _rows(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            found = ", ".join(reader.fieldnames or []) or "an empty file"
            raise AudioError(describe(f"metadata '{path}'", f"the columns {', '.join(columns)}", found))
        yield from reader


def _tidy(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).lower()


def _esc50(root: Path) -> list[Clip]:
    rows = _rows(root / "meta" / "esc50.csv", ("filename", "fold", "category", "src_file"))
    return [
        Clip(
            _tidy(row["category"]),
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
            _tidy(row["class"]),
            row["fsID"],
            row["slice_file_name"],
            fold=row["fold"],
            path=str(root / "audio" / f"fold{row['fold']}" / row["slice_file_name"]),
        )
        for row in rows
    ]


def _class_folders(root: Path) -> list[Clip]:
    files = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
    return [
        Clip(_tidy(path.parent.name), f"{path.parent.name}/{path.stem}", str(path.relative_to(root)), path=str(path))
        for path in files
    ]


def _fingerprint(clips: list[Clip]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for clip in clips:
        size = os.path.getsize(clip.path) if clip.path and os.path.exists(clip.path) else -1
        digest.update(
            f"{clip.label}\0{clip.recording}\0{clip.name}\0{clip.fold}\0{clip.seed}\0{clip.seconds:.6f}\0{size}\n".encode()
        )
    return digest.hexdigest()[:16]


def builtin(classes: list[str] | None, recordings: int, seconds: tuple[float, float], seed: int) -> Library:
    """`recordings` built-in recordings of each class, each `seconds` (shortest, longest) long by its seed."""
    names = classes or list(procedural.CLASSES)
    for name in names:
        if name not in procedural.CLASSES:
            known = ", ".join(procedural.CLASSES)
            raise ConfigError(
                f"sounds.classes: no built-in class '{name}'{nearest(name, procedural.CLASSES)}. Known: {known}."
            )
    rng = np.random.default_rng(seed)
    clips = []
    for label in sorted(names):
        for index in range(recordings):
            length = round(float(rng.uniform(*seconds)), 3)
            name = f"{label}-{seed}-{index:05d}"
            clips.append(Clip(label, name, name, seconds=length, seed=seed * 1_000_003 + index))
    return Library("builtin", clips, _fingerprint(clips), licence="CC0-1.0")


# ------------------------------------------------------------------------------------------------ the audible part


def audible(samples: np.ndarray, rate: int) -> tuple[float, float]:
    """(start, seconds) of the part between the first and the last 20 ms frame above ``FLOOR_DB`` re the loudest.

    `samples` is (time,). Raises :class:`AudioError` when the clip is silent.
    """
    hop = max(1, round(0.02 * rate))
    frames = len(samples) // hop or 1
    power = np.square(samples[: frames * hop].astype(np.float64)).reshape(frames, -1).mean(axis=1)
    if power.max() < 1e-10:
        raise AudioError("the clip is silent")
    loud = np.flatnonzero(power > power.max() * 10 ** (FLOOR_DB / 10))
    return float(loud[0] * hop / rate), float((loud[-1] + 1 - loud[0]) * hop / rate)


def _read(path: str) -> tuple[np.ndarray, int]:
    """First channel of a file, (time,) float32, and its rate. (SpatialSoundQA's rule: channel 0, never a mean.)"""
    from audio_llm import audio

    waveform = audio.decode(path)
    return np.ascontiguousarray(waveform.samples[0]), waveform.sample_rate


def _scan_one(path: str) -> tuple[float, float] | str:
    try:
        return audible(*_read(path))
    except (AudioError, OSError) as error:
        return str(error)


def scan(
    library: Library, executor: Executor, *, shortest: float, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> Library:
    """Open every file once and fill in its audible part; unreadable, silent and too short files become rejects."""
    files = [clip for clip in library.clips if clip.path]
    found = progress(executor.map(_scan_one, [clip.path or "" for clip in files], chunksize=8), len(files))
    clips, rejects = [clip for clip in library.clips if not clip.path], list(library.rejects)
    for clip, result in zip(files, found, strict=True):
        if isinstance(result, str):
            rejects.append({"item": clip.name, "reason": result})
        elif result[1] < shortest:
            rejects.append(
                {"item": clip.name, "reason": f"audible for {result[1]:.2f} s, needed at least {shortest} s"}
            )
        else:
            clips.append(Clip(**{**clip.__dict__, "start": round(result[0], 4), "seconds": round(result[1], 4)}))
    return Library(library.dataset, clips, library.fingerprint, library.licence, rejects)


@functools.lru_cache(maxsize=256)  # 256 five-second clips at 16 kHz are 80 MB; neighbouring scenes share recordings
def load(clip: Clip, sample_rate: int) -> np.ndarray:
    """The audible part of `clip` at `sample_rate`: (time,) float32, not level-normalised."""
    if clip.path is None:
        return procedural.synthesise(clip.label, clip.seed, clip.seconds, sample_rate)
    from audio_llm import audio

    samples, rate = _read(clip.path)
    part = samples[round(clip.start * rate) : round((clip.start + clip.seconds) * rate)]
    return audio.resample(audio.Waveform(part[None], rate, "mono"), sample_rate).samples[0]


# ------------------------------------------------------------------------------------------------ splits


def parse_folds(texts: list[str]) -> dict[str, list[str]]:
    """``["train=1,2,3", "test=4"]`` → ``{"train": ["1", "2", "3"], "test": ["4"]}``."""
    folds: dict[str, list[str]] = {}
    for text in texts:
        name, sep, values = text.partition("=")
        if not sep or name not in SPLITS or not values:
            raise ConfigError(f"--folds '{text}': expected SPLIT=FOLD,FOLD with SPLIT one of {', '.join(SPLITS)}.")
        folds[name] = [value.strip() for value in values.split(",")]
    used = Counter(fold for values in folds.values() for fold in values)
    for fold, count in used.items():
        if count > 1:
            raise ConfigError(f"--folds: fold {fold} is given to {count} splits; a fold belongs to one.")
    return folds


def split(
    library: Library, fractions: dict[str, float], seed: int, folds: dict[str, list[str]] | None = None
) -> tuple[dict[str, list[Clip]], list[dict[str, str]]]:
    """Clips by split (seeded hash of the recording, or the corpus's own folds) and the classes that had to be left out.

    With `folds`, a split without folds of its own (validation) takes its fraction of the train folds' recordings.
    A class without a recording to train on or to test on is left out everywhere: both ask about the same classes.
    """
    from audio_llm.shards import schema

    wanted = {name: share for name, share in fractions.items() if share > 0}
    groups: dict[str, list[Clip]] = {name: [] for name in wanted}
    owners = {fold: name for name, values in (folds or {}).items() for fold in values}
    if folds:
        _check_folds(library, folds)
    inner = {name: share for name, share in wanted.items() if not folds or name == "train" or name not in folds}
    inner = {name: share for name, share in inner.items() if not folds or name != "test"}
    inner = {name: share / sum(inner.values()) for name, share in inner.items()}
    for clip in library.clips:
        side = owners.get(clip.fold or "") if folds else "train"
        if side is None:
            continue
        if side == "train":
            side = schema.split_of(clip.recording, inner, seed)
        groups[side].append(clip)
    _keep_disjoint(groups)
    return _complete_classes(groups)


def _check_folds(library: Library, folds: dict[str, list[str]]) -> None:
    known = sorted({clip.fold for clip in library.clips if clip.fold})
    unknown = [fold for values in folds.values() for fold in values if fold not in known]
    if unknown:
        found = ", ".join(known) or "none (this layout has no folds)"
        raise ConfigError(describe("--folds", f"folds of the corpus ({found})", ", ".join(unknown)))
    if not {"train", "test"} <= set(folds):
        raise ConfigError("--folds: name at least train=… and test=….")


def _keep_disjoint(groups: dict[str, list[Clip]]) -> None:
    """A corpus's folds may still share a recording; the later split gives it up."""
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        if name in groups:
            groups[name] = [clip for clip in groups[name] if clip.recording not in seen]
            seen |= {clip.recording for clip in groups[name]}


def _complete_classes(groups: dict[str, list[Clip]]) -> tuple[dict[str, list[Clip]], list[dict[str, str]]]:
    recordings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, clips in groups.items():
        for clip in clips:
            recordings[clip.label][name].add(clip.recording)
    rejects = []
    for label, sides in sorted(recordings.items()):
        empty = [name for name in groups if not sides[name] and name != "validation"]
        if empty:
            total = sum(len(found) for found in sides.values())
            reason = f"{total} recording{'s' if total > 1 else ''}, none of them in {', '.join(empty)}"
            rejects.append({"item": f"class {label}", "reason": reason})
    left_out = {reject["item"].removeprefix("class ") for reject in rejects}
    return {name: [clip for clip in clips if clip.label not in left_out] for name, clips in groups.items()}, rejects
