"""Folders of sound files: words in files beside them, in the names of files, or in the names of folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audio_llm.datasets import folders, sounds
from audio_llm.datasets.records import Record, read_text
from audio_llm.errors import AudioError, ConfigError, DataError, describe
from audio_llm.files import parse_json
from data_prep.manifest.formats.base import Format, Place, check_once
from data_prep.manifest.rows import Reason, Reject, RowError
from data_prep.manifest.sounds import File

WORDS = (".json", ".txt")


def _sidecars(place: Place) -> Iterator[Record | Reject]:
    """``x.wav`` with ``x.json`` (an object, or a list of them) and ``x.txt``, which is the column ``txt``."""
    root = _folder(place.path)
    stems: dict[Path, list[Path]] = {}
    for file in _files(root):
        stems.setdefault(file.with_suffix(""), []).append(file)
    seen = {path.relative_to(root) for path in folders.files_below(root, endings=WORDS)}
    for stem in sorted({*stems, *(path.with_suffix("") for path in seen)}):
        file, *others = stems.get(stem, [stem.with_suffix(".wav")])
        where, sound = folders.readable(file), File(root / file, folders.readable(file))
        words = [stem.with_suffix(kind) for kind in WORDS if stem.with_suffix(kind) in seen]
        if not words:
            yield Reject(
                where, Reason.NO_SIDECAR, f"expected {stem.name}.json or {stem.name}.txt beside it, found none."
            )
            continue
        if others:
            found = ", ".join(map(folders.readable, (file, *others)))
            yield Reject(where, Reason.SEVERAL_SOUNDS, f"expected one sound for {words[0].name}, found {found}.")
            continue
        try:
            rows = _words(root, words)
        except RowError as error:
            yield Reject.of(where, error)
            continue
        except DataError as error:
            yield Reject(where, Reason.NOT_TEXT, str(error))
            continue
        if not rows:
            yield Reject(where, Reason.BROKEN_ROW, f"expected objects in {words[0].name}, found an empty list.")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                yield Reject(where, Reason.BROKEN_ROW, f"expected an object, found {row!r:.60}.")
                continue
            name = folders.readable(stem) + (f"_{number}" if len(rows) > 1 else "")
            yield Record({"id": name} | row | {"audio": sound}, where)


def _words(root: Path, files: list[Path]) -> list[Any]:
    """The rows that the files beside a sound hold. Raises :class:`DataError` for what is not UTF-8 or not JSON."""
    text: dict[str, Any] = {}
    rows: list[Any] = [{}]
    for file in files:
        content = read_text(root / file)
        if file.suffix == ".txt":
            text = {"txt": content.strip()}
            continue
        try:
            tree = parse_json(content, once=True)
        except ValueError as error:
            raise DataError(describe(folders.readable(file), "JSON", str(error))) from error
        rows = tree if isinstance(tree, list) else [tree]
    for row in rows:
        if isinstance(row, dict):
            check_once(row, text, "the JSON and the text")
    return [row | text if isinstance(row, dict) else row for row in rows]


def _names(place: Place) -> Iterator[Record | Reject]:
    """Files whose names hold the words: the named groups of the option `pattern` are columns."""
    root, pattern = _folder(place.path), _pattern(place.options.get("pattern"))
    for file in _files(root):
        where, stem = folders.readable(file), folders.readable(file.with_suffix("").as_posix())
        match = pattern.fullmatch(stem)
        if match is None:
            yield Reject(where, Reason.BROKEN_ROW, f"expected a name that fits {pattern.pattern}, found '{stem}'.")
            continue
        yield Record({"id": stem} | match.groupdict() | {"audio": File(root / file, where)}, where)


def _pattern(text: Any) -> re.Pattern[str]:
    expected = "a regular expression with named groups, such as (?P<answer>[a-z]+)_(?P<group>[0-9]+)"
    try:
        pattern = re.compile(text)
    except (re.error, TypeError) as error:
        raise ConfigError(describe("options.pattern", expected, f"{text!r} ({error})")) from error
    if not pattern.groupindex:
        raise ConfigError(describe("options.pattern", expected, f"{text!r}, which names none"))
    return pattern


def _classes(place: Place) -> Iterator[Record | Reject]:
    """``class/file``, ESC-50's or UrbanSound8K's layout: the class is the answer, the recording the group."""
    try:
        library = sounds.find(place.path)
    except AudioError as error:
        raise DataError(str(error)) from error
    folders.tell(place.path, library.left_out)
    for clip in library.clips:
        sound = File(Path(str(clip.path)), clip.name)
        values = {"audio": sound, "id": clip.name, "answer": clip.label, "group": clip.recording, "split": clip.fold}
        yield Record(values, clip.name)


def _files(root: Path) -> list[Path]:
    found = folders.listing(root)
    folders.tell(root, found.left_out)
    return found.files


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(describe(f"path {path}", "a folder of sounds", "a file" if path.exists() else "no such folder"))
    return path


FORMAT = (
    Format("sidecars", _sidecars),
    Format("names", _names, options=("pattern",)),
    Format("classes", _classes, {"split": "split"}),
)
