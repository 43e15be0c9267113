"""Cues of subtitles that describe a sound, each with the recording that it belongs to."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from audio_llm.datasets import folders
from audio_llm.errors import ConfigError, DataError, describe, nearest
from data_prep.corpus import cues
from data_prep.corpus.cues import Broken, Cue, Rule
from data_prep.corpus.sounds import reference
from data_prep.corpus.stage import Item, Reject
from data_prep.manifest.checks import identity
from data_prep.manifest.rows import RowError
from data_prep.manifest.sounds import File

SUFFIXES = (".srt", ".vtt", ".json3", ".json")
NO_RECORDING, OVERLAPS = "no_recording", "overlaps"


@dataclass
class Subtitles:
    """An item for each cue that is kept: its recording (``audio``, ``name``, ``mark``, ``source``), ``start`` and
    ``end`` in it (seconds), ``text`` (the words between the marks), ``marks`` (each with its kind and its words),
    ``said`` (the whole cue) and ``overlaps`` (whether it begins before an earlier one ended).

    A recording is found under `media` by the name of its video, whatever its ending.
    """

    name: ClassVar[str] = "subtitles"
    reasons: ClassVar[tuple[str, ...]] = (*cues.REASONS, NO_RECORDING, OVERLAPS)
    gives: ClassVar[tuple[str, ...]] = (
        *("audio", "name", "mark", "source", "start", "end", "text", "marks", "said", "overlaps"),
    )

    path: Path  # a folder of subtitle files, one of them, or the dump
    media: Path  # the folder of the recordings, each named after its video
    corpus: str = ""  # begins every id; the recipe's own
    format: Literal["files", "dump"] = "files"  # files by their ending, or concatenated JSON of many videos
    language: str = "en"  # of the dump's tracks that are read
    encoding: str = cues.ENCODING  # of files that are no UTF-8 and have no byte order mark
    min_seconds: float = 1.0  # a shorter cue is a reject
    max_seconds: float = 10.0  # a longer cue is a reject
    # Which marks describe a sound; every kind is recorded.
    kinds: list[str] = field(default_factory=lambda: list(Rule().kinds))
    alone: bool = True  # whether nothing else may be said in the cue
    keep_overlaps: bool = True  # whether cues that overlap are kept; they are told apart by their field anyway

    def check(self) -> None:
        if not 0 <= self.min_seconds <= self.max_seconds:
            found = f"{self.min_seconds:g} and {self.max_seconds:g}"
            raise ConfigError(describe("source", "0 ≤ min_seconds ≤ max_seconds", found))
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            expected = "an encoding that Python knows, such as cp1251"
            raise ConfigError(describe("source.encoding", expected, f"'{self.encoding}'")) from error
        for kind in self.kinds:
            if kind not in cues.KINDS:
                found = f"'{kind}'{nearest(str(kind), cues.KINDS)}"
                raise ConfigError(describe("source.kinds", f"kinds among {', '.join(cues.KINDS)}", found))

    def items(self) -> Iterator[Item | Reject]:
        rule = Rule(self.min_seconds, self.max_seconds, tuple(self.kinds), self.alone)  # type: ignore[arg-type]
        recordings = self._recordings()
        marks: dict[str, tuple[object, str]] = {}  # of the recordings so far; a video's cues come together
        for cue, overlaps in self._cues():
            where = f"{cue.video}-{cue.number:05d}"
            if isinstance(cue, Broken):
                yield Reject(where, cue.reason, cue.detail)
                continue
            reason, found = cues.judge(cue, rule)
            if not reason and overlaps and not self.keep_overlaps:
                reason = OVERLAPS
            if reason:
                yield Reject(where, reason, f"{cue.start:g} to {cue.end:g} s: {cue.text[:120]!r}")
                continue
            path = recordings.get(cue.video)
            if path is None:
                yield Reject(where, NO_RECORDING, f"no file called '{cue.video}' under {self.media}")
                continue
            if cue.video not in marks:
                marks = {cue.video: reference(File(path, path.relative_to(self.media).as_posix()))}
            audio, mark = marks[cue.video]
            try:
                key = identity(self.corpus, where, cue.number)
            except RowError as error:
                yield Reject(where, "broken", error.detail)
                continue
            yield Item(
                key,
                {
                    "audio": audio,
                    "name": path.name,
                    "mark": mark,
                    "source": cue.video,
                    "start": cue.start,
                    "end": cue.end,
                    "text": cues.caption(found, rule.kinds),
                    "marks": [{"kind": one.kind, "words": one.words} for one in found],
                    "said": cue.text,
                    "overlaps": overlaps,
                },
            )

    def _cues(self) -> Iterator[tuple[Cue | Broken, bool]]:
        """Each cue, and whether it overlaps an earlier one of its file."""
        if self.format == "dump":
            try:
                with open(self.path, encoding="utf-8", errors="replace") as stream:
                    yield from cues.overlapping(cues.read_dump(stream, self.language))
            except OSError as error:
                raise DataError(describe(f"source.path {self.path}", "a file", error.strerror or str(error))) from error
            return
        if not self.path.exists():
            raise DataError(describe(f"source.path {self.path}", "a folder of subtitles, or a file", "nothing there"))
        files = folders.files_below(self.path, endings=SUFFIXES) if self.path.is_dir() else [self.path]
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                yield from cues.overlapping(self._read(file))

    def _read(self, file: Path) -> Iterator[Cue | Broken]:
        """One file that cannot be read costs no other."""
        try:
            yield from cues.read_file(file, encoding=self.encoding)
        except DataError as error:
            yield Broken(cues.video_of(file), 0, "broken", str(error))

    def _recordings(self) -> dict[str, Path]:
        """The files under `media` by their names without ending; of several of one name, the first by its path."""
        if not self.media.is_dir():
            found = "a file" if self.media.exists() else "no such folder"
            raise DataError(describe(f"source.media {self.media}", "a folder of recordings", found))
        found_files: dict[str, Path] = {}
        listed = folders.listing(self.media, folders.SUFFIXES | folders.OTHERS)
        folders.tell(self.media, listed.left_out)
        for file in listed.files:
            path = self.media / file
            found_files.setdefault(path.stem, path)
        return found_files


SOURCE = Subtitles
