"""Benchmarks of choices that a YAML file declares: where question, choices, answer and sound stand in the organisers'
rows, what is left out, what is odd, and what a submission looks like.

Ours are the ``*.yaml`` of this folder; ``--benchmark FILE.yaml`` opens anybody's. docs/extending/benchmark.md has a
walk through one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np

from audio_llm import config
from audio_llm.audio import Waveform, decode
from audio_llm.datasets.folders import files_below
from audio_llm.datasets.records import SEPARATORS, Cell, Record, each_row, located
from audio_llm.errors import DataError, describe
from audio_llm.files import content_hash, parse_json
from eval.benchmarks.base import (
    BenchmarkError,
    Collection,
    Item,
    check_options,
    one_of,
    refuse_doubles,
    whole_number,
    without_sound,
)
from eval.benchmarks.sounds import ALSO_IN, also_in, unlike_most
from eval.benchmarks.submissions import TOLD, Form, Layout, check_layout
from eval.controls import item_seed
from eval.predictions import Prediction
from eval.scorers import Scorer, get_scorers
from eval.scorers.base import Asking, Checking


class LeftOut(StrEnum):
    """Why a row of the file is no question here. Nothing is left out for another reason."""

    DEFECT = "known to be defective"
    OTHER_PART = "of a part that is not asked here"
    NO_CHOICES = "fewer than two choices"
    SEVERAL = "several recordings"


@dataclass(frozen=True)
class Declaration:
    """The keys of a benchmark's YAML file. Where several keys are named, the first that a row has counts.

    `choices` is the key of a list, or the keys of several columns, of which the empty ones are no choices.
    `audio_name` is a pattern whose groups make the name of the sound of what `audio` says. `only` and `without` tell by
    key which values belong to the part that is asked; `open`, which rows have no choices whatever they list: they are
    asked where the option ``open`` says so, and their answer is a reference text. `defects` counts rows by a pattern in
    a key's value; `left_out` has the ids of rows that cannot be answered, with the reason. `shuffled` puts the choices
    into an order drawn by id; `alike` counts sounds of other channels or another rate than most.
    """

    title: str
    files: list[str]
    audio: str | list[str]
    choices: str | list[str]
    question: str | list[str] = "question"
    answer: str | list[str] = "answer"
    answer_as: Literal["text", "letter", "index"] = "text"
    id: str = ""
    kind: str = ""
    audio_name: str = ""
    groups: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)
    open: dict[str, list[str]] = field(default_factory=dict)
    defects: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    shuffled: bool = False
    alike: bool = False
    scorers: list[str] = field(default_factory=lambda: ["option-resolution", "letter"])
    published_rule: str = ""
    submission: dict[str, Layout] = field(default_factory=dict)
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for name in ("files", "scorers", "choices", "audio", "question", "answer"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, found none.")
        if not all(name and Path(name).name == name for name in self.files):
            raise ValueError(f"files: expected names or patterns of names, without folders, found {self.files}.")
        if self.published_rule and self.published_rule not in self.scorers:
            raise ValueError(f"published_rule: expected one of its scorers, found '{self.published_rule}'.")
        for pattern in [self.audio_name, *(one for keys in self.defects.values() for one in keys.values())]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"expected a regular expression, found '{pattern}' ({error}).") from error
        for form, layout in self.submission.items():
            check_layout(layout, f"submission.{form}", (*TOLD, *self.kept))

    @property
    def kept(self) -> tuple[str, ...]:
        """The keys of a row that go into an item's `meta`."""
        return tuple(dict.fromkeys([*([self.kind] if self.kind else []), *self.groups, *self.keep]))


@dataclass
class _Asked:
    item: Item
    sounds: list[str | Cell]


class Declared:
    """A benchmark by its declaration.

    Options: ``audio``, the folder that sounds are named under (default: where the file lies); ``several=all``
    asks about several recordings too, ``several=first`` hears the first of them, and they are left out otherwise;
    ``open=ask`` asks open questions as well; ``also=FOLDER,FOLDER`` looks for each sound's bytes among those of other
    benchmarks; ``unit=KEY``, what intervals take as one recording; ``seed``, of the order
    of choices where that is drawn.
    """

    def __init__(self, name: str, declaration: Declaration) -> None:
        self.name, self.declaration, self.title = name, declaration, declaration.title
        self.scorers, self.groups = tuple(declaration.scorers), tuple(declaration.groups)
        self.published_rule = declaration.published_rule

    @classmethod
    def read(cls, path: Path) -> Declared:
        """The benchmark that a YAML file declares. Raises :class:`ConfigError` naming file and key."""
        return cls(path.stem, config.load(Declaration, path))

    def open(self, data: Path, **options: str) -> Collection:
        """The items of `data`, a file of rows or a folder with one. Raises children of ``AudioLLMError`` naming file,
        row and key."""
        asked = self.declaration
        further = [*(["open"] if asked.open else []), *(["seed"] if asked.shuffled else [])]
        check_options(self.name, options, ("audio", "several", "unit", "also", *further))
        files = self._files(data)
        folder = Path(options["audio"]) if "audio" in options else files[0].parent
        if not folder.is_dir():
            raise BenchmarkError(describe(f"option audio={folder}", f"a folder of {self.title}'s audio", "none"))
        found: list[_Asked] = []
        counts, left_out = Counter[str](), Counter[str]()
        rule = self._rule()
        for path in files:
            for number, row in enumerate(each_row(path)):
                entry = self._read(row, f"{path.stem}/{number}", options)
                if isinstance(entry, LeftOut):
                    left_out[entry.value] += 1
                    continue
                found.append(entry)
                counts.update(self._oddities(row, entry.item, rule, path.suffix.lower() in SEPARATORS))
        if not found:
            reasons = ", ".join(f"{count} left out: {why}" for why, count in left_out.items())
            raise BenchmarkError(describe(str(data), "at least one question", reasons or "no rows"))
        items = [entry.item for entry in found]
        refuse_doubles(items, str(data))
        clips = Counter(item.clip for item in items)
        if again := len(items) - len(clips):
            counts["questions about a clip that an earlier question has"] = again
        places = iter(located([sound for entry in found for sound in entry.sounds], folder))
        sounds = [[next(places) for _ in entry.sounds] for entry in found]
        counts.update(unlike_most(list(dict.fromkeys(one for there in sounds for one in there))) if asked.alike else {})
        if "also" in options:
            _tell_shared(items, sounds, [Path(one) for one in options["also"].split(",") if one], counts)
        missing = {}
        for entry, there in zip(found, sounds, strict=True):
            if absent := [f"{name:.200}" for name, sound in zip(entry.sounds, there, strict=True) if not sound]:
                missing[entry.item.id] = ", ".join(absent)
        errors = without_sound(missing, folder, data, len(items), counts)

        def load(index: int) -> list[Waveform]:
            name = f"item '{items[index].id}'"
            return [
                decode(sound.data() if isinstance(sound, Cell) else sound or folder / "", name=name)
                for sound in sounds[index]
            ]

        # The rows decide the questions, and so does the declaration: its digest is that of what they made together.
        questions = json.dumps([(item.id, item.question, item.choices, item.gold, item.clip) for item in items])
        digests = [*map(content_hash, files), hashlib.sha256(questions.encode()).hexdigest()]
        total = len(items) + left_out.total()
        return Collection(items, errors, dict(counts), digests, load, left_out=dict(left_out), total=total)

    # ------------------------------------------------------------------------------------------------- one row

    def _read(self, row: Record, place: str, options: Mapping[str, str]) -> _Asked | LeftOut:
        asked, values = self.declaration, row.values
        name = row.identity(asked.id) if asked.id else place
        if name in asked.left_out:
            return LeftOut.DEFECT
        if not all(_among(row, asked.only)) or any(_among(row, asked.without)):
            return LeftOut.OTHER_PART
        free = any(_among(row, asked.open))
        if free and one_of(options, "open", ("skip", "ask")) == "skip":
            return LeftOut.OTHER_PART
        choices, letters = ([], []) if free else self._choices(row)
        if not free and len(choices) < 2:
            return LeftOut.NO_CHOICES
        sounds = self._audio(row)
        several = one_of(options, "several", ("skip", "first", "all"))
        if len(sounds) > 1 and several == "skip":
            return LeftOut.SEVERAL
        sounds = sounds if several == "all" else sounds[:1]
        gold = row.text(*_keys(asked.answer), default="") if free else self._gold(row, choices, letters)
        meta = {
            key: _plain(_listed(values[key]) if key in asked.lists else values[key])
            for key in asked.kept
            if key in values
        }
        if letters:
            meta["letters"] = letters
            if isinstance(asked.choices, str):
                meta[asked.choices] = values[asked.choices]  # with what is empty, for submissions
        if free:
            meta["references"] = [gold] if gold else []
            if isinstance(asked.choices, str):
                meta[asked.choices] = _plain(values.get(asked.choices))
        if asked.shuffled:
            seed = item_seed(whole_number(options, "seed", 0), self.name, name)
            meta["order"] = [int(one) for one in np.random.default_rng(seed).permutation(len(choices))]
            choices = [choices[one] for one in meta["order"]]
        clip = "+".join(name if isinstance(sound, Cell) else sound.removeprefix("./") for sound in sounds)
        if "unit" in options:
            clip = row.identity(options["unit"])
        kind = row.text(asked.kind, default="") if asked.kind else ""
        question = row.text(*_keys(asked.question))
        item = Item(name, question, choices, gold, kind or self.name, self.name, clip, meta, audios=len(sounds))
        return _Asked(item, sounds)

    def _choices(self, row: Record) -> tuple[list[str], list[str]]:
        """The choices, and their letters in the file where some of it is empty or may be."""
        asked = self.declaration.choices
        if isinstance(asked, list):
            if not any(key in row.values for key in asked):
                raise row.lacks(*asked)
            values = [row.values.get(key) for key in asked]
        elif asked not in row.values:
            raise row.lacks(asked)
        else:
            values = _listed(row.values[asked])
        if not isinstance(values, list) or any(not isinstance(one, str | None) for one in values):
            where = f"{row.where}: '{', '.join(_keys(asked))}'"
            raise DataError(describe(where, "texts", f"{values!r:.60}"))
        there = [(ascii_uppercase[place % 26], one) for place, one in enumerate(values) if one and one.strip()]
        letters = [letter for letter, _ in there] if isinstance(asked, list) or len(there) < len(values) else []
        return [one for _, one in there], letters

    def _audio(self, row: Record) -> list[str | Cell]:
        asked, keys = self.declaration, _keys(self.declaration.audio)
        key = next((key for key in keys if row.values.get(key) not in (None, "", [])), None)
        if key is None:
            raise row.lacks(*keys)
        value = _listed(row.values[key])
        sounds = value if isinstance(value, list) else [value]
        if not all(isinstance(one, Cell) or isinstance(one, str) and one.strip() for one in sounds):
            raise DataError(describe(f"{row.where}: '{key}'", "the name of a sound, or several", f"{value!r:.60}"))
        return [
            one if isinstance(one, Cell) else _name(one, asked.audio_name, f"{row.where}: '{key}'") for one in sounds
        ]

    def _gold(self, row: Record, choices: Sequence[str], letters: Sequence[str]) -> str:
        """The answer as a text; that of no choice stays as it is, and is counted where all benchmarks' answers are."""
        asked, keys = self.declaration, _keys(self.declaration.answer)
        if asked.answer_as == "text":
            return row.text(*keys, default="")
        said = next((row.values[key] for key in keys if row.values.get(key) not in (None, "")), None)
        if said is None:
            return ""
        if asked.answer_as == "letter":
            named = str(said).strip().upper()
            known = letters or ascii_uppercase[: len(choices)]
            return choices[known.index(named)] if len(named) == 1 and named in known else f"letter {said}"
        number = int(str(said)) if str(said).isdecimal() else -1
        return choices[number] if 0 <= number < len(choices) else f"number {said}"

    def _oddities(self, row: Record, item: Item, rule: Scorer | None, of_texts: bool) -> Iterator[str]:
        """What is odd about a question that is asked as it is. In a table `of_texts`, lists can only be such."""
        asked = self.declaration
        if len({choice.strip().lower() for choice in item.choices}) < len(item.choices):
            yield "choices that are equal but for case and spaces"
        if any(choice.strip().lower() == "none" for choice in item.choices):
            yield "a choice that is the word None"
        if len(item.choices) < len(asked.choices) if isinstance(asked.choices, list) else "letters" in item.meta:
            yield "choices that are empty, left away"
        if "references" in item.meta and not item.gold:
            yield from self._uncheckable(item)
        elif not item.gold:
            yield "answer hidden"
        if len(self._audio(row)) > item.audios:
            yield "several recordings, of which the first is heard"
        if any(isinstance(row.values.get(key), str) for key in asked.lists) and not of_texts:
            yield "a list written as a text"
        for reason, patterns in asked.defects.items():
            if any(_matches(pattern, row.values.get(key)) for key, pattern in patterns.items()):
                yield reason
        if rule is not None and item.gold in item.choices:
            others = [choice for choice in item.choices if choice != item.gold]
            said = [Prediction(item.id, "", "", item.question, item.choices, item.gold, raw=one) for one in others]
            if any((score := rule.score(one)) is not None and score.value == 1 for one in said):
                yield f"another choice, said word for word, is right by {self.published_rule}"

    def _uncheckable(self, item: Item) -> Iterator[str]:
        """Why nothing scores an open question that has no reference, where nothing does."""
        checks = [scorer for scorer in get_scorers(self.scorers) if isinstance(scorer, Checking)]
        why = [scorer.uncheckable(item.meta) for scorer in checks]
        if all(why):
            yield why[0] if why else "answer hidden"

    def _rule(self) -> Scorer | None:
        if not self.published_rule:
            return None
        (rule,) = get_scorers([self.published_rule])
        return None if isinstance(rule, Asking) else rule

    def _files(self, data: Path) -> list[Path]:
        """The file `data`, or those of one of the declared names in the folder. Only Parquet comes in several."""
        if data.is_file():
            return [data]
        names = self.declaration.files
        found = {name: files_below(data, named=(name,)) for name in names}
        files = {path for paths in found.values() for path in paths}
        first = next((paths for paths in found.values() if paths), [])
        if not files:
            there = "none" if data.is_dir() else "nothing there"
            raise BenchmarkError(describe(str(data), f"{self.title}'s file, {' or '.join(names)}", there))
        if len(files) > len(first) or len(first) > 1 and any(path.suffix != ".parquet" for path in first):
            listed = ", ".join(sorted(path.name for path in files)[:6])
            raise BenchmarkError(describe(f"folder {data}", "one file of questions", listed, "Name the file itself."))
        return first

    # -------------------------------------------------------------------------------------------- submission

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """The file of the form that option ``form`` names (the first where there is none), written and read back."""
        form = self.form(**options)
        path = form.write(rows, out)
        if problems := form.validate(path, rows):
            raise BenchmarkError(problems[0])
        return [path]

    def form(self, **options: str) -> Form:
        """What writes and checks the files of that form."""
        check_options(self.name, options, ("form",))
        forms = self.declaration.submission
        if not forms:
            raise BenchmarkError(describe(f"benchmark '{self.name}'", "a submission in its declaration", "none"))
        return Form(forms[one_of(options, "form", tuple(forms))], self.row_of, self.declaration.id)

    def row_of(self, row: Prediction) -> dict[str, Any]:
        """The organisers' row of a question, with what was kept of it."""
        asked = self.declaration
        values: dict[str, Any] = {asked.id: row.id} if asked.id else {}
        values |= {key: row.meta[key] for key in asked.kept if key in row.meta}
        values[_keys(asked.question)[0]] = row.question
        if isinstance(asked.choices, list):
            shown = dict(zip(row.meta.get("letters", ascii_uppercase), _in_order(row), strict=False))
            values |= {key: shown.get(ascii_uppercase[place]) for place, key in enumerate(asked.choices)}
        else:
            values[asked.choices] = row.meta.get(asked.choices) or _in_order(row)
        if row.gold:
            values[_keys(asked.answer)[0]] = row.gold if "references" in row.meta else _key_of(row, asked.answer_as)
        return values


def _among(row: Record, keys: Mapping[str, Sequence[str]]) -> list[bool]:
    """Of each of `keys`, whether what `row` has there is one of its values."""
    for key in keys:
        if key not in row.values:
            raise row.lacks(key)
    return [str(row.values[key]) in values for key, values in keys.items()]


def _tell_shared(
    items: Sequence[Item], sounds: Sequence[Sequence[Path | Cell | None]], folders: Sequence[Path], counts: Counter[str]
) -> None:
    """Note in each item's `meta` which of its sounds lie in other folders as well: those folders' names under
    ``ALSO_IN``, which tables are broken down by, and the files under ``same_sound_as``. Count both."""
    found = iter(also_in([one for there in sounds for one in there], folders))
    for item, there in zip(items, sounds, strict=True):
        same = [file for _ in there for file in next(found)]
        names = sorted({file.partition("/")[0] for file in same})
        item.meta.update({ALSO_IN: ", ".join(names) or "no other", "same_sound_as": same})
        counts.update(f"sound that lies in {name} as well" for name in names)


def _in_order(row: Prediction) -> list[str]:
    """The choices in the order of the file."""
    order = row.meta.get("order")
    return [row.choices[order.index(place)] for place in range(len(order))] if order else row.choices


def _key_of(row: Prediction, answer_as: str) -> str | int:
    """The answer in the file's own way."""
    choices = _in_order(row)
    if answer_as == "text" or row.gold not in choices:
        return row.gold
    place = choices.index(row.gold)
    return place if answer_as == "index" else str(row.meta.get("letters", ascii_uppercase)[place])


def _keys(named: str | list[str]) -> list[str]:
    return [named] if isinstance(named, str) else named


def _listed(value: Any) -> Any:
    """The list that a text writes, in JSON's way or Python's; nothing is an empty one, and any other value stays."""
    if value is None or value == "":
        return []
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for read in (parse_json, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, DataError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return value


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return json.loads(json.dumps(value, default=str))


def _name(said: str, pattern: str, where: str) -> str:
    """The name of a sound, as `pattern` takes it out of what is said."""
    if not pattern:
        return said
    if (match := re.search(pattern, said)) is None:
        raise DataError(describe(where, f"a text that has {pattern}", f"'{said}'"))
    return "".join(part for part in match.groups() if part) or match[0]


def _matches(pattern: str, value: Any) -> bool:
    return any(
        isinstance(one, str) and re.search(pattern, one) for one in (value if isinstance(value, list) else [value])
    )


BENCHMARK = tuple(map(Declared.read, sorted(Path(__file__).parent.glob("*.yaml"))))
