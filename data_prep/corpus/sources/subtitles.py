"""Cues of subtitles that describe a sound, each with the recording that it belongs to."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
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

    A recording is found under `media` by the name of its video, whatever its ending: first in the folder there that
    the subtitles lie in below `path`, else anywhere, where one file alone has that name.
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
        for named, cue, overlaps in self._cues(recordings):
            where = f"{named}-{cue.number:05d}"
            if isinstance(cue, Broken):
                yield Reject(where, cue.reason, cue.detail)
                continue
            reason, found = cues.judge(cue, rule)
            if not reason and overlaps and not self.keep_overlaps:
                reason = OVERLAPS
            if reason:
                yield Reject(where, reason, f"{cue.start:g} to {cue.end:g} s: {cue.text[:120]!r}")
                continue
            paths = recordings.get(cue.video) or recordings.get(f"/{Path(cue.video).name}") or []
            if len(paths) != 1:
                several = f"several files ({paths[0]}, {paths[1]}) are" if paths else "no file is"
                yield Reject(where, NO_RECORDING, f"{several} called '{cue.video}' under {self.media}")
                continue
            path = self.media / paths[0]
            if cue.video not in marks:
                marks = {cue.video: reference(File(path, paths[0].as_posix()))}
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

    def _cues(self, recordings: Mapping[str, list[Path]]) -> Iterator[tuple[str, Cue | Broken, bool]]:
        """Each cue with what begins its id, and whether it overlaps an earlier one of its file."""
        if self.format == "dump":
            try:
                with open(self.path, encoding="utf-8", errors="replace") as stream:
                    for cue, overlaps in cues.overlapping(cues.read_dump(stream, self.language)):
                        yield cue.video, cue, overlaps
            except OSError as error:
                raise DataError(describe(f"source.path {self.path}", "a file", error.strerror or str(error))) from error
            return
        if not self.path.exists():
            raise DataError(describe(f"source.path {self.path}", "a folder of subtitles, or a file", "nothing there"))
        root = self.path if self.path.is_dir() else self.path.parent
        files = folders.files_below(self.path, endings=SUFFIXES) if self.path.is_dir() else [self.path]
        read: set[str] = set()
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                below = file.relative_to(root)
                whole = below.with_suffix("")  # "one.two.srt" may be of "one.two", or of "one" in the language "two"
                known = whole.as_posix() in recordings or f"/{whole.name}" in recordings
                video = (whole if known else whole.with_name(cues.video_of(file))).as_posix()
                named = below.as_posix() if video in read else video  # of several files of a recording, all but one
                read.add(video)
                for cue, overlaps in cues.overlapping(self._read(file, video)):
                    yield named, cue, overlaps

    def _read(self, file: Path, video: str) -> Iterator[Cue | Broken]:
        """One file that cannot be read costs no other."""
        try:
            yield from cues.read_file(file, self.encoding, video)
        except DataError as error:
            yield Broken(video, 0, "broken", str(error))

    def _recordings(self) -> dict[str, list[Path]]:
        """The files under `media`, by their paths there without ending, and by "/" and their names alone: of several
        endings in a folder the first, of several folders all of them."""
        if not self.media.is_dir():
            found = "a file" if self.media.exists() else "no such folder"
            raise DataError(describe(f"source.media {self.media}", "a folder of recordings", found))
        listed = folders.listing(self.media, folders.SUFFIXES | folders.OTHERS)
        folders.tell(self.media, listed.left_out)
        found_files: dict[str, list[Path]] = {}
        for file in listed.files:
            if [file] == found_files.setdefault(file.with_suffix("").as_posix(), [file]):
                found_files.setdefault(f"/{file.stem}", []).append(file)
        return found_files


SOURCE = Subtitles
