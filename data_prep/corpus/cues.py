"""Subtitles as cues, and what a cue marks as a sound: SubRip, WebVTT, YouTube's JSON3, and the published dump.

A description of a sound stands between marks: brackets of any kind, music notes, stars; a name before a colon says who
speaks. Every mark is recorded with its kind. Brackets are matched, not just found: "[door (slams)]" is one mark, "[door
slams)" is none. Times are seconds.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from audio_llm.errors import DataError, describe
from audio_llm.files import halved, parse_json

Kind = Literal["square", "round", "curly", "notes", "stars", "speaker"]
KINDS: tuple[Kind, ...] = ("square", "round", "curly", "notes", "stars", "speaker")
_OPEN: dict[str, Kind] = {"[": "square", "(": "round", "{": "curly", "［": "square", "（": "round", "【": "square"}
_CLOSE: dict[str, Kind] = {"]": "square", ")": "round", "}": "curly", "］": "square", "）": "round", "】": "square"}
_NOTES = "♩♪♫♬♭♮♯🎵🎶"
_INNER = re.compile(r"[][(){}［］（）【】*♩♪♫♬🎵🎶]")  # marks within marks
_STARS = re.compile(r"(?<![*\w])\*(?![\s*])([^*\n]+?)(?<!\s)\*(?![*\w])")
# Who speaks: capitals, digits and a few marks before a colon, at the beginning of a line.
_SPEAKER = re.compile(r"(?:^|\n)[ \t]*(?:>>+[ \t]*|-[ \t]*)?((?=[^:]*[A-Z])[A-Z0-9][A-Z0-9 .'#&/-]{0,30}):(?=\s|$)")
MAX_OBJECT = 2**26  # characters of one object of the dump
CHUNK = 2**20
MAX_FILE = 2**28  # bytes of a file of subtitles of one recording
ENCODING = "cp1252"  # of old files: Windows' Western code page


@dataclass(frozen=True)
class Cue:
    """Words on the screen from `start` to `end`. `number` counts the cues of `video` from 0, broken ones too."""

    video: str
    number: int
    start: float
    end: float
    text: str

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Broken:
    """A cue, or an object of the dump, that is none: `reason` is ``broken``, ``bad_time`` or ``language``."""

    video: str
    number: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Mark:
    """One marked stretch of a text: its kind, the words in it, and where it stands."""

    kind: Kind
    words: str
    start: int
    end: int


# ------------------------------------------------------------------------------------------------ marks


def marks(text: str) -> list[Mark]:
    """The outermost marks of `text` in order; none overlaps another."""
    found = [*_brackets(text), *_notes(text)]
    found += [Mark("stars", one[1].strip(), one.start(), one.end()) for one in _STARS.finditer(text)]
    found += [Mark("speaker", one[1].strip(), one.start(1), one.end()) for one in _SPEAKER.finditer(text)]
    kept: list[Mark] = []
    for mark in sorted(found, key=lambda one: (one.start, -one.end)):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def unbalanced(text: str) -> bool:
    """Whether a bracket lacks its other half, or meets one of another kind."""
    inside = {place for mark in _brackets(text) for place in range(mark.start, mark.end)}
    return any(place not in inside for place, character in enumerate(text) if character in _OPEN or character in _CLOSE)


def _brackets(text: str) -> list[Mark]:
    """Balanced stretches, outermost only. A half without its other one is skipped, what follows it is looked at."""
    stack: list[tuple[Kind, int]] = []
    pairs: list[Mark] = []
    for place, character in enumerate(text):
        if (kind := _OPEN.get(character)) is not None:
            stack.append((kind, place))
        elif (kind := _CLOSE.get(character)) is not None and stack:
            if stack[-1][0] != kind:
                stack.clear()  # "[door slams)": neither half closes anything any more
                continue
            start = stack.pop()[1]
            pairs.append(Mark(kind, text[start + 1 : place].strip(), start, place + 1))
    outer: list[Mark] = []
    for mark in sorted(pairs, key=lambda one: one.start):
        if not outer or mark.start >= outer[-1].end:
            outer.append(mark)
    return outer


def _notes(text: str) -> list[Mark]:
    """From one run of notes to the next; a run alone reaches to the end of its text."""
    runs = [run.span() for run in re.finditer(rf"[{_NOTES}](?:[\s{_NOTES}]*[{_NOTES}])?", text)]
    found = []
    for first, second in zip(runs[::2], [*runs[1::2], None] if len(runs) % 2 else runs[1::2], strict=True):
        end, words = (second[1], text[first[1] : second[0]]) if second else (len(text), text[first[1] :])
        found.append(Mark("notes", words.strip(), first[0], end))
    return found


def outside(text: str, found: Iterable[Mark]) -> str:
    """What of `text` stands in no mark, without dashes and punctuation around it."""
    parts, last = [], 0
    for mark in found:
        parts.append(text[last : mark.start])
        last = mark.end
    return re.sub(r"\s+", " ", "".join([*parts, text[last:]])).strip(" -–—.,;:!?>\"'|~")


# ------------------------------------------------------------------------------------------------ files

_CLOCK = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMES = re.compile(rf"^\s*(-?){_CLOCK}\s*-->\s*(-?){_CLOCK}(?=\s|$)")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>|<\d[\d:.,]*>|\{\\[^{}]*\}")
_READING = re.compile(r"<rt\b[^>]*>.*?(?:</rt>|(?=</ruby>)|$)", re.DOTALL)  # how the characters before it are spoken
_VOICE = re.compile(r"<v(?:\.[^\s<>]*)?\s+([^<>]+)>")


def read_file(path: Path, encoding: str = ENCODING, video: str = "") -> Iterator[Cue | Broken]:
    """The cues of a file by its ending: ``.srt``, ``.vtt``, ``.json3`` or ``.json`` of one recording, `video` or the
    one it is named after. It is UTF-8, or UTF-16, or else in `encoding`; in none of them it is one :class:`Broken`.

    Raises :class:`DataError` for a file that cannot be read, or of another kind.
    """
    readers = {".srt": read_srt, ".vtt": read_vtt, ".json3": read_json3, ".json": read_json3}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(describe(f"subtitles {path.name}", f"one of {', '.join(readers)}", f"'{path.suffix}'"))
    try:
        if path.stat().st_size > MAX_FILE:
            raise DataError(describe(f"subtitles {path.name}", f"at most {MAX_FILE} bytes", f"{path.stat().st_size}"))
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(describe(f"subtitles {path}", "a file", error.strerror or str(error))) from error
    video = video or video_of(path)
    try:
        text = _decoded(raw, encoding)
    except UnicodeDecodeError as error:
        detail = f"expected text in UTF-8 or {encoding} (source.encoding), found {raw[error.start : error.start + 8]!r}"
        yield Broken(video, 0, "broken", f"{detail} at byte {error.start}")
        return
    yield from reader(text, video)


def _decoded(raw: bytes, encoding: str) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16")
    if half := halved(raw):
        return raw.decode(half)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode(encoding)


def video_of(path: Path) -> str:
    """The recording of a file: its name without endings, of which one may be the language (``ID.en.vtt``)."""
    stem = path.stem.removesuffix(".srv3")
    return re.sub(r"\.[a-z]{2,3}(?:-[A-Za-z0-9]+)*$", "", stem) or stem


def read_srt(text: str, video: str) -> Iterator[Cue | Broken]:
    """SubRip: blocks of a number, a line of times and words. A missing number is no fault, a missing time is."""
    yield from _blocks(re.split(r"\n[ \t]*\n+", _lines(text).strip("\n")), video)


def read_vtt(text: str, video: str) -> Iterator[Cue | Broken]:
    """WebVTT: as SubRip, with a head, notes and styles between the cues; ``<v NAME>`` says who speaks."""
    text = _lines(text)
    if not text.startswith("WEBVTT"):
        yield Broken(video, 0, "broken", "expected 'WEBVTT' at the beginning of the file")
        return
    # A line of spaces divides nothing here: rolling captions have them above and below their words.
    blocks = re.split(r"\n{2,}", text)[1 if "-->" not in text.split("\n\n")[0] else 0 :]
    kept = [block for block in blocks if not re.match(r"\s*(?:NOTE|STYLE|REGION)\b", block)]
    yield from _blocks(kept, video, html.unescape)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _blocks(blocks: Iterable[str], video: str, decode: Any = None) -> Iterator[Cue | Broken]:
    number = -1
    for lines in (lines for block in blocks if block.strip() for lines in _divided(block.strip("\n").split("\n"))):
        number += 1
        place = next((n for n, line in enumerate(lines[:3]) if "-->" in line), None)
        times = _TIMES.match(lines[place]) if place is not None else None
        if place is None or times is None:
            yield Broken(video, number, "broken", f"expected a line of times, found {lines[0]!r:.60}")
            continue
        start, end = (_clock(times.group(*groups)) for groups in ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10)))
        words = "\n".join(lines[place + 1 :])
        words = _VOICE.sub(lambda voice: f"{voice[1].upper()}: ", words)
        words = _TAG.sub("", _READING.sub("", words))
        yield _cue(video, number, start, end, decode(words) if decode else words)


def _divided(lines: list[str]) -> Iterator[list[str]]:
    """The cues of a block, with their numbers: more than one where no empty line stands between them."""
    begin, first = 0, True
    for place, line in enumerate(lines):
        if _TIMES.match(line):
            numbered = place > begin and lines[place - 1].strip().isdecimal()
            if not first:
                yield lines[begin : place - numbered]
                begin = place - numbered
            first = False
    yield lines[begin:]


def _clock(parts: tuple[str | None, ...]) -> float:
    sign, hours, minutes, seconds, fraction = parts
    whole = 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds or 0)
    return (-1 if sign else 1) * (whole + int((fraction or "0").ljust(3, "0")) / 1000)


def read_json3(text: str, video: str) -> Iterator[Cue | Broken]:
    """YouTube's ``json3``: events with a start and a duration in milliseconds, and words in segments. Events without
    segments set up windows and are no cues, nor are those that only break a line of the one before."""
    try:
        tree = parse_json(text)
        events = tree["events"]
        if not isinstance(events, list):
            raise TypeError(type(events).__name__)
    except (ValueError, KeyError, TypeError) as error:
        yield Broken(video, 0, "broken", f"expected an object with 'events', found {error!r:.60}")
        return
    number = -1
    for event in events:
        if not isinstance(event, dict) or "segs" not in event:
            continue
        segments = event["segs"]
        if event.get("aAppend") and segments == [{"utf8": "\n"}]:
            continue
        number += 1
        if not isinstance(segments, list) or not all(isinstance(one, dict) for one in segments):
            yield Broken(video, number, "broken", f"segs: expected a list of objects, found {segments!r:.60}")
            continue
        start, length = _number(event.get("tStartMs")), _number(event.get("dDurationMs"))
        if start is None or length is None:
            found = f"{event.get('tStartMs')!r:.30} and {event.get('dDurationMs')!r:.30}"
            yield Broken(video, number, "bad_time", f"expected tStartMs and dDurationMs, found {found}")
            continue
        words = "".join(str(one.get("utf8") or "") for one in segments)
        yield _cue(video, number, start / 1000, (start + length) / 1000, words)


def _cue(video: str, number: int, start: float, end: float, text: str) -> Cue | Broken:
    text = re.sub(r"[ \t\u00a0\u200b]+", " ", text.replace("\u200e", "").replace("\u200f", ""))
    text = re.sub(r" ?\n ?", "\n", text).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        return Broken(video, number, "broken", "expected valid Unicode, found half of a surrogate pair")
    if "\ufffd" in text:  # what stands for bytes that could not be read
        return Broken(video, number, "broken", f"expected words in UTF-8, found {text!r:.60}")
    return Cue(video, number, round(start, 3), round(end, 3), text)


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# ------------------------------------------------------------------------------------------------ the dump


def read_dump(stream: IO[str], language: str = "en") -> Iterator[Cue | Broken]:
    """The published dump: a JSON object a video, concatenated, each maybe over several lines. Memory holds one of them.

    An object of which no track is in `language` is one ``language`` reject, one that cannot be read a ``broken`` one.
    """
    for place, tree in enumerate(_objects(stream)):
        video, number = f"object-{place:08d}", -1
        if not isinstance(tree, dict):
            yield Broken(video, 0, "broken", str(tree))
            continue
        about = tree.get("video")
        name = about.get("videoid") if isinstance(about, dict) else None
        tracks = tree.get("captions")
        if not isinstance(name, str) or not name or not isinstance(tracks, list):
            yield Broken(video, 0, "broken", "expected video.videoid and captions")
            continue
        spoken = [track for track in tracks if isinstance(track, dict) and track.get("lang") == language]
        if not spoken:
            yield Broken(name, 0, "language", f"expected captions in '{language}'")
            continue
        for track in spoken:
            try:
                lines = track["subtitles"]["transcript"]["text"]
            except (KeyError, TypeError):
                number += 1
                yield Broken(name, number, "broken", "expected subtitles.transcript.text")
                continue
            for line in lines if isinstance(lines, list) else [lines]:
                number += 1
                if not isinstance(line, dict) or not isinstance(line.get("t"), (str, type(None))):
                    yield Broken(name, number, "broken", f"expected an object with 't', found {line!r:.60}")
                    continue
                start, length = _number(line.get("-start")), _number(line.get("-dur"))
                if start is None or length is None:
                    found = f"{line.get('-start')!r:.30} and {line.get('-dur')!r:.30}"
                    yield Broken(name, number, "bad_time", f"expected -start and -dur in seconds, found {found}")
                    continue
                words = html.unescape(_TAG.sub("", line.get("t") or ""))
                yield _cue(name, number, start, start + length, words)


def _objects(stream: IO[str]) -> Iterator[Any]:
    """The values of concatenated JSON one by one; a text, which says what is wrong, for one that cannot be read: then
    reading goes on at the next line that begins an object."""
    decoder, buffer, ended, want = json.JSONDecoder(strict=False), "", False, CHUNK
    while True:
        buffer = buffer.lstrip(" \t\r\n,\ufeff")
        if not buffer and ended:
            return
        problem = ""
        if buffer:
            try:
                tree, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                # What is wrong at the very end may only be cut: more is read, at least as much again as there is.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(buffer) - 16
                if not cut or ended or len(buffer) > MAX_OBJECT:
                    problem = f"expected JSON, found {error.msg} at character {error.pos} of the object"
            except RecursionError:
                problem = "expected JSON, found brackets nested without end"
            else:
                yield tree if isinstance(tree, dict) else f"expected an object, found {type(tree).__name__}"
                buffer, want = buffer[end:], CHUNK
                continue
        if problem:
            yield problem
            buffer = _next(buffer, stream)
            continue
        more = stream.read(want)
        want, ended = max(CHUNK, len(buffer)), not more
        buffer += more


def _next(buffer: str, stream: IO[str]) -> str:
    """`buffer` from the next line that begins an object on; read on where it holds none."""
    while True:
        place = buffer.find("\n{", 1)
        if place >= 0:
            return buffer[place + 1 :]
        more = stream.read(CHUNK)
        if not more:
            return ""
        buffer = buffer[-1:] + more


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True)
class Rule:
    """Which cues are kept. `kinds`: marks that describe a sound; `alone`: nothing else may be said in the cue."""

    min_seconds: float = 1.0
    max_seconds: float = 10.0
    kinds: tuple[Kind, ...] = ("square", "round", "curly", "notes", "stars")
    alone: bool = True


# Why a cue is not kept, first to last: the first that holds is its reason.
REASONS = {
    "broken": "it is no cue: no line of times, no words that can be read",
    "bad_time": "its times are no numbers",
    "language": "the recording has no subtitles in the language",
    "negative": "it ends before it starts, or starts before the recording",
    "empty": "it has no words",
    "too_short": "it is shorter than min_seconds",
    "too_long": "it is longer than max_seconds",
    "unbalanced": "a bracket lacks its other half",
    "no_mark": "nothing in it is marked as a sound",
    "other_words": "something else is said beside the marks",
    "no_words": "no letter stands between the marks",
}


def judge(cue: Cue, rule: Rule) -> tuple[str, list[Mark]]:
    """Why `cue` is not kept ("" where it is), and its marks."""
    found = marks(cue.text)
    if cue.end < cue.start or cue.start < 0:
        return "negative", found
    if not cue.text:
        return "empty", found
    # Milliseconds, as the formats have them: 3.1 − 2.1 is a little less than 1.
    if round(cue.seconds, 3) < rule.min_seconds:
        return "too_short", found
    if round(cue.seconds, 3) > rule.max_seconds:
        return "too_long", found
    sounds = [mark for mark in found if mark.kind in rule.kinds]
    if not sounds:
        return "unbalanced" if unbalanced(cue.text) else "no_mark", found
    if rule.alone and outside(cue.text, found):
        return "unbalanced" if unbalanced(cue.text) else "other_words", found
    if not any(re.search(r"[^\W\d_]", mark.words) for mark in sounds):
        return "no_words", found
    return "", found


def caption(found: Iterable[Mark], kinds: Iterable[Kind]) -> str:
    """The words between the marks of `kinds`, in one line."""
    words = (_INNER.sub("", mark.words) for mark in found if mark.kind in kinds)
    return ", ".join(" ".join(word.split()) for word in words if word.strip())


def overlapping(cues: Iterable[Cue | Broken]) -> Iterator[tuple[Cue | Broken, bool]]:
    """Each cue with whether it begins before one of its recording ended that came earlier."""
    video, until = "", -math.inf
    for cue in cues:
        if cue.video != video:
            video, until = cue.video, -math.inf
        if isinstance(cue, Broken) or cue.start < 0 or cue.end < cue.start:
            yield cue, False
            continue
        yield cue, cue.start < until - 1e-9
        until = max(until, cue.end)
