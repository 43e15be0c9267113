"""One training example as JSON: versioned, validated, and absent where there is nothing to say.

Angles are degrees: azimuth counter-clockwise with 0 in front, 90 left, −90 right and 180 behind, elevation up positive
(the convention of DCASE's STARSS23). Times are seconds, distances metres.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from audio_llm.audio import LAYOUT_CHANNELS, Waveform
from audio_llm.audio import sha256 as audio_sha256
from audio_llm.errors import ShardError, describe, nearest
from audio_llm.files import not_finite, parse_json

VERSION = 1
MAX_KEY_BYTES = 90  # ustar holds 100 bytes of name; ".flac" and ".json" take five, the rest is margin


@dataclass(frozen=True)
class Event:
    """A sound in the scene: its class, when it sounds (seconds) and where (degrees, metres)."""

    label: str
    onset: float | None = None
    offset: float | None = None
    azimuth: float | None = None
    elevation: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class AudioInfo:
    """What one audio member of a sample holds; `sha256` is :func:`audio_llm.audio.sha256` of the stored samples."""

    sample_rate: int
    channels: int
    layout: str
    seconds: float
    sha256: str | None = None

    @classmethod
    def of(cls, waveform: Waveform, digest: str | None = None) -> AudioInfo:
        """Of samples as they are stored; `digest` is their SHA-256 where it is known."""
        seconds = round(waveform.seconds, 6)
        digest = digest or audio_sha256(waveform)
        return cls(waveform.sample_rate, waveform.num_channels, waveform.layout, seconds, digest)


@dataclass(frozen=True)
class Source:
    """Where the sample comes from: corpus, its split, the recording (`clip`) and its licence."""

    dataset: str
    split: str | None = None
    clip: str | None = None
    licence: str | None = None


@dataclass
class Sample:
    """One example. `id` is the key in the shard. Text that is not there is None, a list or mapping that is not there is
    empty; neither is written. `meta` is free (``question_type``, ``difficulty``, ``room``, ``recordings`` ...).

    `audio` describes its sounds in their order; as JSON, one is an object and several are a list of them. `places` says
    before which character of the question each sound stands; where it is empty, all stand before the question.
    """

    id: str
    task: str
    question: str | None = None
    choices: list[str] = field(default_factory=list)
    answer: str | None = None
    thinking: str | None = None
    semantic_elements: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    audio: list[AudioInfo] = field(default_factory=list)
    source: Source | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    version: int = VERSION

    def validate(self, where: str | None = None) -> None:
        """Raise :class:`ShardError` (item, expected, found) for the first field that breaks the schema."""
        _validate_sample(self, where or f"sample '{self.id}'")

    def to_json(self) -> str:
        """One line of JSON with the fields that are there, in the order of the dataclass."""
        self.validate()
        tree = _present(self)
        if len(self.audio) == 1:
            (tree["audio"],) = tree["audio"]
        return json.dumps(tree, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "sample") -> Sample:
        """Parse and validate. `where` names the item in errors, for instance ``shard-000003.tar: key``."""
        try:
            tree = parse_json(text)
        except ValueError as error:
            raise ShardError(describe(where, "JSON", f"text that is not ({error})")) from error
        if not isinstance(tree, dict):
            raise ShardError(describe(where, "a JSON object", type(tree).__name__))
        version = tree.get("version")
        if version != VERSION:
            found = "none" if version is None else repr(version)
            raise ShardError(describe(where, f"schema version {VERSION}", found, "Convert it with audio-llm prep."))
        tree["events"] = [_build(Event, item, f"{where}: events") for item in _list(tree, "events", where)]
        tree["audio"] = [_build(AudioInfo, item, f"{where}: audio") for item in _list(tree, "audio", where, one=True)]
        if "source" in tree:
            tree["source"] = _build(Source, tree["source"], f"{where}: source")
        sample = _build(cls, tree, where)
        sample.validate(where)
        return sample

    @classmethod
    def from_trusted_json(cls, text: str | bytes, where: str = "sample") -> Sample:
        """:meth:`from_json` without validation, for text that an index has validated: it is read again every epoch."""
        try:
            tree = json.loads(text)
            if "events" in tree:
                tree["events"] = [Event(**event) for event in tree["events"]]
            if "audio" in tree:
                tree["audio"] = [AudioInfo(**item) for item in _list(tree, "audio", where, one=True)]
            if "source" in tree:
                tree["source"] = Source(**tree["source"])
            return cls(**tree)
        except (ValueError, TypeError):  # changed behind the index's back: say properly what is wrong with it
            return cls.from_json(text, where)

    @property
    def recordings(self) -> list[str]:
        """The source recordings in this sample, as ``dataset/clip``: ``meta["recordings"]`` if given, else the clip."""
        dataset = self.source.dataset if self.source else "unknown"
        clips = self.meta.get("recordings") or ([self.source.clip] if self.source and self.source.clip else [])
        return [f"{dataset}/{clip}" for clip in clips]


def check_key(key: Any, where: str) -> None:
    """Raise :class:`ShardError` unless `key` can name tar members: WebDataset splits names at the first dot."""
    if not isinstance(key, str) or not key:
        raise ShardError(describe(where, "an id that is a text", repr(key)))
    bad = [c for c in key if c in "./\\" or c.isspace() or not c.isprintable()]
    if bad:
        raise ShardError(
            describe(where, "an id without dots, slashes, spaces or control characters", repr(key))
            + " Replace them, for instance by '_'."
        )
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise ShardError(describe(where, "an id of valid Unicode", repr(key))) from error
    if size > MAX_KEY_BYTES:
        raise ShardError(describe(where, f"an id of at most {MAX_KEY_BYTES} bytes", f"{size} bytes"))


def _present(value: Any) -> Any:
    """Plain JSON types of a dataclass; fields that are None, empty lists or empty mappings are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: _present(entry) for name, entry in pairs if entry is not None and entry != [] and entry != {}}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return value


def _list(tree: dict[str, Any], name: str, where: str, one: bool = False) -> list[Any]:
    """The list called `name`, empty where there is none; with `one`, an object alone is a list of it."""
    value = tree.get(name, [])
    if one and isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise ShardError(describe(f"{where}: {name}", "a list", type(value).__name__))
    return value


_FIELDS = {
    kind: (
        {item.name for item in dataclasses.fields(kind)},
        [
            item.name
            for item in dataclasses.fields(kind)
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        ],
    )
    for kind in (Event, AudioInfo, Source, Sample)
}


def _build(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ShardError(describe(where, "a JSON object", type(tree).__name__))
    known, required = _FIELDS[kind]
    unknown = tree.keys() - known
    if unknown:
        word = min(unknown)
        raise ShardError(describe(where, "fields of the schema", f"unknown field '{word}'{nearest(word, known)}"))
    missing = [name for name in required if tree.get(name) is None]
    if missing:
        raise ShardError(describe(where, f"field '{missing[0]}'", "none"))
    return kind(**tree)


def _text(value: Any, where: str) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        found = "an empty text" if isinstance(value, str) else type(value).__name__
        raise ShardError(describe(where, "a text, or no field at all", found))


def _number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        bounds = "" if math.isinf(low) and math.isinf(high) else f" in [{low:g}, {high:g}]"
        raise ShardError(describe(where, f"a finite number{bounds}", repr(value)))


def _validate_sample(sample: Sample, where: str) -> None:
    check_key(sample.id, where)
    if sample.version != VERSION:
        raise ShardError(describe(f"{where}: version", str(VERSION), repr(sample.version)))
    if sample.task is None:
        raise ShardError(describe(where, "field 'task'", "none"))
    for name in ("task", "question", "answer", "thinking"):
        _text(getattr(sample, name), f"{where}: {name}")
    if not isinstance(sample.choices, list) or not all(isinstance(c, str) and c.strip() for c in sample.choices):
        raise ShardError(describe(f"{where}: choices", "a list of texts", repr(sample.choices)))
    if len(sample.choices) > MOST_CHOICES:
        raise ShardError(
            describe(f"{where}: choices", f"at most {MOST_CHOICES}, a letter each", f"{len(sample.choices)}")
        )
    for name in ("semantic_elements", "meta"):
        if not isinstance(getattr(sample, name), dict):
            raise ShardError(describe(f"{where}: {name}", "a mapping", type(getattr(sample, name)).__name__))
    for group, words in sample.semantic_elements.items():
        listed = words if isinstance(words, list) else [words]
        if not isinstance(group, str) or not all(isinstance(word, str) and word.strip() for word in listed):
            raise ShardError(describe(f"{where}: semantic_elements.{group}", "a text or a list of texts", repr(words)))
    if (found := not_finite(sample.meta)) is not None:
        raise ShardError(describe(f"{where}: meta{found[0]}", "a finite number, or no field at all", repr(found[1])))
    if not isinstance(sample.events, list):
        raise ShardError(describe(f"{where}: events", "a list", type(sample.events).__name__))
    for index, event in enumerate(sample.events):
        _validate_event(event, f"{where}: events[{index}]")
    if not isinstance(sample.audio, list):
        raise ShardError(describe(f"{where}: audio", "a list", type(sample.audio).__name__))
    for number, info in enumerate(sample.audio):
        _validate_audio(info, f"{where}: audio" + (f"[{number}]" if len(sample.audio) > 1 else ""))
    _validate_places(sample, f"{where}: places")
    if sample.source is not None:
        for name in ("dataset", "split", "clip", "licence"):
            _text(getattr(sample.source, name), f"{where}: source.{name}")


def _validate_event(event: Event, where: str) -> None:
    _text(event.label, f"{where}.label")
    _number(event.onset, f"{where}.onset", low=0)
    _number(event.offset, f"{where}.offset", low=0)
    _number(event.azimuth, f"{where}.azimuth", -180, 180)
    _number(event.elevation, f"{where}.elevation", -90, 90)
    _number(event.distance, f"{where}.distance", low=0)
    if event.onset is not None and event.offset is not None and event.offset < event.onset:
        raise ShardError(describe(where, f"an offset after the onset at {event.onset} s", f"{event.offset} s"))


def _validate_audio(audio: AudioInfo, where: str) -> None:
    for name in ("sample_rate", "channels"):
        value = getattr(audio, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShardError(describe(f"{where}.{name}", "a positive whole number", repr(value)))
    if not isinstance(audio.layout, str) or LAYOUT_CHANNELS.get(audio.layout) != audio.channels:
        expected = ", ".join(f"{layout} with {count}" for layout, count in LAYOUT_CHANNELS.items())
        raise ShardError(describe(where, expected, f"{audio.layout!r} with {audio.channels} channels"))
    _number(audio.seconds, f"{where}.seconds", low=0)
    _text(audio.sha256, f"{where}.sha256")


def _validate_places(sample: Sample, where: str) -> None:
    places, end = sample.places, len(sample.question or "")
    if not isinstance(places, list) or not all(isinstance(p, int) and not isinstance(p, bool) for p in places):
        raise ShardError(describe(where, "a list of whole numbers", repr(places)))
    if places and (places != sorted(places) or places[0] < 0 or places[-1] > end):
        raise ShardError(describe(where, f"characters of the question from 0 to {end}, ascending", f"{places}"))
    if places and sample.audio and len(places) != len(sample.audio):
        raise ShardError(describe(where, f"one for each of {len(sample.audio)} audios", f"{len(places)}"))


MOST_CHOICES = len(ascii_uppercase)  # each has a letter
