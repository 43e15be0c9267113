"""What a benchmark is: items with their audio, the scorers that apply to them, and the files its organisers want.

A benchmark is one file in this folder that ends with ``BENCHMARK = <instance>``; docs/extending/benchmark.md shows one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from audio_llm.audio import Waveform
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, describe, nearest
from audio_llm.language.prompts import ANSWERS_AS
from audio_llm.language.replies import read_key
from audio_llm.shards.schema import MOST_CHOICES
from eval.predictions import Prediction

Word = TypeVar("Word", bound=str)
NO_OPTION = "answer is none of the options"
# The cure where a file of questions is there and none of its sounds.
NAME_SOUNDS = (
    "Name the folder of the audio: --option audio=FOLDER. What audio-llm prep wrote beside shards has its sounds in "
    "the shards alone: evaluate their folder itself, without --benchmark."
)
DECODED = 8  # clips kept decoded: all passes of an item ask for the same one


class BenchmarkError(AudioLLMError):
    """Data of a benchmark that is missing, malformed or not what its organisers published."""


@dataclass(frozen=True)
class Item:
    """One question as the engine gets it. `gold` is one of `choices` where there are choices, "" on a hidden test.

    `instruction` is put after the question, and `answer_as` tells how a lone letter is read (``prompts.ANSWERS_AS``).
    `clip` names the recording: items with the same clip are one unit in paired intervals, and never lend each other
    their audio. `audios` is how many sounds it is about, `places` where they stand in the question, as in
    ``audio_llm.shards.schema.Sample``. `meta` is what tables are broken down by; `events` are those of
    ``audio_llm.shards.schema.Event``.
    """

    id: str
    question: str
    choices: list[str]
    gold: str
    question_type: str
    format: str
    clip: str
    meta: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    instruction: str = ""
    answer_as: str = ""
    audios: int = 1
    places: list[int] = field(default_factory=list)


def as_asked(item: Item) -> dict[str, Any]:
    """What a :class:`Prediction` takes over from its item."""
    names = {entry.name for entry in fields(Prediction)} & {entry.name for entry in fields(Item)}
    return {name: getattr(item, name) for name in names}


@dataclass
class Collection:
    """The items of a benchmark, opened. Audio is read when it is asked for, by `load` (one sound or a list of them) or
    by a child's `waveforms`.

    `errors` holds, by item id, why an item cannot be asked, as far as that is known before its audio is decoded;
    `counts` what was skipped or repaired, by reason; `fingerprint` the SHA-256 of the data files. `left_out` has, by
    reason, how many of the `total` questions of the data are no item here (0: the benchmark does not count them).
    """

    items: list[Item]
    errors: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: list[str] = field(default_factory=list)
    load: Callable[[int], Waveform | list[Waveform]] | None = field(default=None, repr=False)
    left_out: dict[str, int] = field(default_factory=dict)
    total: int = 0
    _decoded: OrderedDict[int, list[Waveform]] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def waveform(self, index: int) -> Waveform:
        """:meth:`waveforms` for whoever hears one sound: several are an :class:`AudioError`."""
        first, *others = self.waveforms(index)
        if others:
            raise AudioError(describe(f"item '{self.items[index].id}'", "one sound", f"{1 + len(others)}"))
        return first

    def waveforms(self, index: int) -> list[Waveform]:
        """The sounds of item `index`; the last few items stay decoded. Raises :class:`AudioError` where one cannot be
        heard."""
        if index not in self._decoded:
            if self.load is None:
                raise AudioError(describe(f"item '{self.items[index].id}'", "audio", "a collection of text alone"))
            found = self.load(index)
            self._decoded[index] = [found] if isinstance(found, Waveform) else list(found)
            if len(self._decoded) > DECODED:
                self._decoded.popitem(last=False)
        return self._decoded[index]

    def asked(self, instruction: str | None, answer_as: str | None) -> Collection:
        """The same items with an instruction after every question. `answer_as` is for those with choices; without an
        instruction its own sentence asks for it."""

        def change(item: Item) -> Item:
            wanted = answer_as if item.choices else None
            words = instruction or (ANSWERS_AS[wanted] if wanted else "")
            return replace(item, instruction=words, answer_as=wanted or "")

        return replace(self, items=[change(item) for item in self.items])

    def part(self, rows: Sequence[int]) -> Collection:
        """The items `rows` of this collection, in that order."""
        items = [self.items[row] for row in rows]
        kept = {item.id for item in items}
        errors = {name: why for name, why in self.errors.items() if name in kept}
        load, whole = (lambda index: self.waveforms(rows[index])), (self.left_out, self.total)
        return Collection(items, errors, self.counts, self.fingerprint, load, *whole)


def join(collections: Sequence[Collection], names: Sequence[str]) -> Collection:
    """Several collections as one, in order; `names` are what they were opened from. Raises :class:`BenchmarkError` for
    an id that occurs twice."""
    if len(collections) == 1:
        refuse_doubles(collections[0].items)
        return collections[0]
    first: dict[str, str] = {}
    for name, part in zip(names, collections, strict=True):
        refuse_doubles(part.items, name)
        for item in part.items:
            if item.id in first:
                cure = "Ask for them in runs of their own."
                raise BenchmarkError(
                    describe(f"item '{item.id}'", "one id", f"it in {first[item.id]} and {name}", cure)
                )
        first |= {item.id: name for item in part.items}
    places = [(part, index) for part in collections for index in range(len(part.items))]
    counts, left_out = Counter[str](), Counter[str]()
    for part in collections:
        counts.update(part.counts)
        left_out.update(part.left_out)
    return Collection(
        items=[item for part in collections for item in part.items],
        errors={name: why for part in collections for name, why in part.errors.items()},
        counts=dict(counts),
        fingerprint=[digest for part in collections for digest in part.fingerprint],
        load=lambda row: places[row][0].waveforms(places[row][1]),
        left_out=dict(left_out),
        total=sum(part.total for part in collections),
    )


def settle_answers(collection: Collection, where: str) -> None:
    """Make every item's answer one of its choices, to the letter, where it names one (:func:`read_key`); give the
    items that nobody could answer right their error, for no benchmark scores such a one. Both are counted.
    Raises :class:`BenchmarkError` for a collection of nothing, opened from `where`."""
    if not collection.items:
        raise BenchmarkError(describe(where, "questions", "none"))
    counts = Counter(collection.counts)
    for place, item in enumerate(collection.items):
        if item.id in collection.errors:
            continue
        if found := _unanswerable(item):
            reason, collection.errors[item.id] = found
            counts[reason] += 1
            continue
        collection.items[place], note = with_answer(item)
        counts.update([note] if note else [])
        if note == NO_OPTION:
            why = describe(f"item '{item.id}', answer", "one of its choices", f"'{item.gold}'")
            collection.errors[item.id] = why
    collection.counts = dict(counts)


def with_answer(item: Item) -> tuple[Item, str]:
    """`item` with the choice that its answer names as its answer, and what had to be repaired: "" for nothing,
    ``NO_OPTION`` where it names none and stays as it is."""
    if not item.choices or not item.gold or item.gold in item.choices:
        return item, ""
    index, note = read_key(item.gold, item.choices)
    return (item, NO_OPTION) if index is None else (replace(item, gold=item.choices[index]), note)


def _unanswerable(item: Item) -> tuple[str, str] | None:
    """In a few words and in a sentence why `item` is no question to be asked; None where it is one."""
    name = f"item '{item.id}'"
    if not item.question.strip():
        return "question without words", describe(name, "a question", "an empty one")
    if len(item.choices) > MOST_CHOICES:
        sentence = describe(name, f"at most {MOST_CHOICES} choices, a letter each", str(len(item.choices)))
        return "more choices than letters", sentence
    return None


class Benchmark(Protocol):
    """One benchmark: where its data lies, how a row becomes an item, which scorers apply.

    `scorers` names scorers of ``eval.scorers``, the headline first; `groups` the keys of `meta` (or ``question_type``)
    that its tables are broken down by. `published_rule`, optional: the scorer that the benchmark's own figures come
    from, to stand beside the headline on the first line of every table.
    """

    name: str
    title: str
    scorers: tuple[str, ...]
    groups: tuple[str, ...]

    def open(self, data: Path, **options: str) -> Collection:
        """Items of the folder or file `data`. Raises children of ``AudioLLMError`` naming file, key and cure."""
        ...

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """Write the files that the organisers' scripts read into `out`; their paths. `rows`: one a question, with the
        true audio. A row with an error is there only where the user asked for an incomplete submission. Optional."""
        ...


# --------------------------------------------------------------------------------------------- what readers share


def refuse_doubles(items: Iterable[Item | Prediction], where: str = "") -> None:
    """Raise :class:`BenchmarkError` for the first id that occurs twice."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            name = f"{where}: item '{item.id}'" if where else f"item '{item.id}'"
            raise BenchmarkError(describe(name, "an id that occurs once", "a second one"))
        seen.add(item.id)


def without_sound(
    missing: Mapping[str, str], folder: Path, data: Path, total: int, counts: Counter[str]
) -> dict[str, str]:
    """The errors of the items whose sound is not there, counted in `counts`: `missing` has the sound's name by the
    item's id. Raises :class:`BenchmarkError` where that is all of the `total` items of `data`."""
    if missing:
        counts["audio missing"] = len(missing)
    if len(missing) == total:
        raise BenchmarkError(describe(f"{data}", f"audio of its items under {folder}", "none of it", NAME_SOUNDS))
    return {
        name: describe(f"item '{name}'", f"its audio {sound} under {folder}", "no such file")
        for name, sound in missing.items()
    }


def check_options(benchmark: str, options: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for an option that `benchmark` does not take, with the nearest one that it does."""
    for name in options:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise ConfigError(f"benchmark '{benchmark}', option '{name}': expected {known}{nearest(name, allowed)}.")


def one_of(options: Mapping[str, str], name: str, allowed: Sequence[Word]) -> Word:
    """Option `name`, the first of `allowed` where it is not given. Raises :class:`ConfigError` with the nearest."""
    value = options.get(name, allowed[0])
    for word in allowed:
        if word == value:
            return word
    raise ConfigError(describe(f"option {name}", ", ".join(allowed), f"'{value}'{nearest(value, allowed)}"))


def whole_number(options: Mapping[str, str], name: str, default: int) -> int:
    """Option `name` as a number of at least 0. Raises :class:`ConfigError`."""
    text = options.get(name, str(default))
    if not text.isdecimal() or len(text) > 18:  # what an int64 holds in any case
        raise ConfigError(describe(f"option {name}", "a whole number", f"'{text}'"))
    return int(text)
