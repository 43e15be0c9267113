"""The words of a row, checked: what is left is a draft of a sample, whose sound is looked at later."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from audio_llm.datasets.records import Cell, Record
from audio_llm.errors import AudioLLMError, ConfigError, DataError, ShardError, describe, nearest
from audio_llm.files import parse_json
from audio_llm.language.mentions import misplaced
from audio_llm.language.replies import normalise, read_key
from audio_llm.shards.schema import MAX_KEY_BYTES, MOST_CHOICES, Event, Sample, Source
from data_prep.manifest.formats.base import FIELDS
from data_prep.manifest.recipe import LISTED, ManifestConfig
from data_prep.manifest.rows import Draft, Reason, Reject, RowError
from data_prep.manifest.sounds import Sound, TableCell, file_under, is_sound
from data_prep.scenes.rooms import seeded

# Marks of sound and of turns as language models have them, and the tags of a reply, which are read in any case.
MARKS = re.compile(
    r"<\|[^|<>\s]+\|>|</?(?:audio|s|(?i:think|answer|semantic_elements))>|</?(?:start|end)_of_turn>|\[/?INST\]"
)


def drafts(rows: Iterable[Record | Reject], config: ManifestConfig) -> tuple[list[Draft], list[Reject]]:
    """What the rows become, in their order. Raises :class:`ConfigError` for a column that no row has."""
    found: list[Draft] = []
    rejects: list[Reject] = []
    seen: dict[str, None] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        seen |= dict.fromkeys(map(str, row.values))
        try:
            found.append(_draft(row, number, config))
        except AudioLLMError as error:
            rejects.append(Reject.of(row.where, error))
    _check_columns(config, list(seen))
    found = _refuse_doubles(found, rejects)
    return _refuse_doubles(_with_choices(found, config), rejects), rejects


def _check_columns(config: ManifestConfig, there: Sequence[str]) -> None:
    named = [(f"columns.{name}", column) for name in config.columns for column in config.columns_of(name)]
    named += [("keep", column) for column in config.keep]
    for key, column in named:
        if there and column not in there:
            found = f"'{column}'{nearest(column, there)}"
            raise ConfigError(describe(key, f"a column of {config.path.name}: {', '.join(there[:20])}", found))
    for name in ("audio", "question", "answer"):
        (column, *_) = config.columns_of(name)
        if there and column not in there and not (name == "question" and config.question):
            cure = "Name it: columns: {" + name + ": …}" + (", or question: …" if name == "question" else "")
            raise ConfigError(
                describe(f"{config.path.name}, {name}", f"a column '{column}'", ", ".join(there[:20]), cure)
            )


def _draft(row: Record, number: int, config: ManifestConfig) -> Draft:
    value = {name: row.values.get(config.columns_of(name)[0]) for name in FIELDS if name not in LISTED}
    sounds = _sounds(_listed(row, "audio", config), config)
    starts, ends = (_seconds(_listed(row, name, config), name, len(sounds)) for name in ("start", "end"))
    for start, end in zip(starts, ends, strict=True):
        if start is not None and end is not None and end <= start:
            raise RowError(Reason.END_BEFORE_START, f"expected an end after {start:g} s, found {end:g} s.")
    choices = _choices(row, config)
    question = text_of(value["question"], "question") or config.question
    answer = _answer(value["answer"], choices, config)
    if not question:
        raise RowError(Reason.NO_QUESTION)
    thinking = text_of(value["thinking"], "thinking")
    elements, events = _elements(value["semantic_elements"]), _events(value["events"])
    for text in (question, answer, thinking or "", *choices, *_texts([elements, [event.label for event in events]])):
        if mark := MARKS.search(text):
            raise RowError(Reason.MARKS, f"expected words alone, found '{mark[0]}'.")
    named = (_composed(text_of(group, "group")) for group in _listed(row, "group", config))
    groups = tuple(dict.fromkeys(filter(None, named)))
    if not groups and "group" in config.columns:
        raise RowError(Reason.NO_GROUP, f"expected a value in column '{config.columns_of('group')[0]}', found none.")
    groups = groups or tuple(dict.fromkeys(sound.name for sound in sounds))
    recordings = {"recordings": list(groups)} if len(groups) > 1 else {}
    kind = text_of(value["kind"], "kind")
    sample = Sample(
        id=identity(config.corpus, value["id"], number),
        task="choice" if choices else "open",
        question=question,
        choices=choices,
        answer=answer,
        thinking=thinking,
        semantic_elements=elements,
        events=events,
        source=Source(config.corpus, clip=groups[0], licence=config.licence),
        places=_places(value["places"]) if len(sounds) > 1 else [],
        meta={"question_type": kind or config.corpus, "format": config.format}
        | recordings
        | {name: _kept(row.values[name], name) for name in config.keep if not _nothing(row.values.get(name))},
    )
    try:
        sample.validate(row.where)
    except ShardError as error:
        raise RowError(Reason.BAD_EVENT if "events[" in str(error) else Reason.WRONG_TYPE, str(error)) from error
    if sample.places and len(sample.places) != len(sounds):
        raise RowError(
            Reason.WRONG_TYPE, f"places: expected one for each of {len(sounds)} sounds, found {sample.places}."
        )
    split = _composed(text_of(value["split"], "split"))
    own = "" if value["id"] is None else _composed(str(value["id"]).strip())
    stretches = tuple((start or 0.0, end) for start, end in zip(starts, ends, strict=True))
    return Draft(row.where, sample, sounds, groups, split, stretches, own)


# ------------------------------------------------------------------------------------------------ one value


def identity(corpus: str, value: Any, number: int) -> str:
    """The id of a row in shards: its corpus and its own id, or its number. Raises :class:`RowError`."""
    if value is None:
        return f"{corpus}-{number:07d}"
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise RowError(Reason.NO_ID, f"expected a text or a whole number, found {value!r:.60}.")
    raw = _composed(str(value).strip())
    key = re.sub(r"[^\w-]+", "_", raw)
    key = key if key.startswith(f"{corpus}-") else f"{corpus}-{key}"  # an id that came from shards is one already
    return key if len(key.encode()) <= MAX_KEY_BYTES else _told_apart(key, raw)


def _told_apart(key: str, raw: str) -> str:
    """`key` with a digest of the `raw` id that it stands for, of which it says too little."""
    digest = hashlib.sha256(raw.encode(errors="replace")).hexdigest()[:12]
    return f"{key.encode()[: MAX_KEY_BYTES - 13].decode(errors='ignore')}-{digest}"


def _listed(row: Record, name: str, config: ManifestConfig) -> list[Any]:
    """What a row has for each of its sounds: of a column each, of a list, or of one text with separators; a value alone
    is one. Columns that are empty, the last ones, are none."""
    columns = config.columns_of(name)
    values = [row.values.get(column) for column in columns]
    if len(columns) > 1:
        while len(values) > 1 and (values[-1] is None or values[-1] == ""):
            values.pop()
        return values
    (value,) = values
    if isinstance(value, str) and config.audio_separator is not None and name != "group":
        return value.split(config.audio_separator)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sounds(values: Sequence[Any], config: ManifestConfig) -> tuple[Sound, ...]:
    most = config.audio.max_sounds
    if len(values) > most:
        raise RowError(Reason.SEVERAL_SOUNDS, f"expected at most {most} (audio.max_sounds), found {len(values)}.")
    return tuple(_sound(value, config) for value in values or [None])


def _places(value: Any) -> list[int]:
    """Before which character of the question each sound stands; nothing where all stand in front."""
    if isinstance(value, str) and value.strip():
        value = _json(value, "places")
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(place, int) for place in value):
        raise RowError(Reason.WRONG_TYPE, f"places: expected a list of whole numbers, found {value!r:.60}.")
    return value if any(value) else []


def _sound(value: Any, config: ManifestConfig) -> Sound:
    if isinstance(value, Cell):
        return TableCell(value, config.folder)
    if value is not None and is_sound(value):
        sound: Sound = value
        return sound
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        value = value["path"]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(Reason.NO_SOUND_NAMED)
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"audio: expected the name of a file, found {value!r:.60}.")
    try:
        return file_under(config.folder, value.strip())
    except DataError as error:
        raise RowError(Reason.OUTSIDE_ROOT, str(error)) from error


def text_of(value: Any, name: str) -> str | None:
    """A text without spaces around it, or a number as a text; None for nothing."""
    if _nothing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        found = "bytes" if isinstance(value, Cell) else f"{value!r:.60}"
        raise RowError(Reason.WRONG_TYPE, f"{name}: expected a text, found {found}.")
    if "\0" in str(value):  # of 16-bit text that was read as one of bytes, or of a torn file
        raise RowError(Reason.WRONG_TYPE, f"{name}: expected a text, found a character of zero in {value!r:.60}.")
    return str(value).strip() or None


def _composed(text: str | None) -> str:
    """`text` in Unicode's composed form: an accent may be a character of its own, and the text is the same."""
    return unicodedata.normalize("NFC", text or "")


def _nothing(value: Any) -> bool:
    """None, and how Parquet says so in a column of numbers, and tables of text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _seconds(values: Sequence[Any], name: str, sounds: int) -> list[float | None]:
    """A time for each of so many `sounds`; none of them has one where the row has none."""
    times = [seconds_of(value, name) for value in values] or [None]
    if times == [None]:
        return [None] * sounds
    if len(times) != sounds:
        raise RowError(Reason.BAD_TIME, f"{name}: expected one for each of {sounds} sounds, found {len(times)}.")
    return times


def seconds_of(value: Any, name: str) -> float | None:
    """A number from 0 on, also as a text; None for nothing."""
    text = text_of(value, name) if not isinstance(value, bool) else "true"
    if text is None:
        return None
    try:
        seconds = math.nan if "_" in text else float(text)  # Python reads 1_0 as ten
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise RowError(Reason.BAD_TIME, f"{name}: expected seconds from 0 on, found {text!r:.60}.")
    return seconds


def _choices(row: Record, config: ManifestConfig) -> list[str]:
    columns = config.columns_of("choices")
    if len(columns) > 1:  # a column each; the last ones may be empty
        listed: Any = [row.values.get(column) for column in columns]
        while listed and text_of(listed[-1], columns[-1]) is None:
            listed.pop()
    else:
        listed = row.values.get(columns[0])
        if isinstance(listed, str):
            listed = listed.split(config.choices_separator) if listed.strip() else None
    if listed is None:
        return []
    if not isinstance(listed, (list, tuple)):
        raise RowError(Reason.WRONG_TYPE, f"choices: expected a list of texts, found {listed!r:.60}.")
    texts = [text_of(choice, "choices") for choice in listed]
    choices = [text for text in texts if text is not None]
    if len(choices) < len(texts):
        raise RowError(Reason.EMPTY_CHOICE, f"choice {texts.index(None) + 1} of {len(texts)} is empty.")
    if len(choices) == 1:
        raise RowError(Reason.ONE_CHOICE, f"expected two or more, found '{choices[0]}'.")
    if len(choices) > MOST_CHOICES:
        raise RowError(Reason.TOO_MANY_CHOICES, f"expected at most {MOST_CHOICES}, found {len(choices)}.")
    same: dict[str, str] = {}
    for choice in choices:
        if (plain := normalise(choice)) in same:
            found = f"'{same[plain]}' and '{choice}'"
            raise RowError(Reason.EQUAL_CHOICES, f"expected choices that differ, found {found}.")
        same[plain] = choice
    return choices


def _answer(value: Any, choices: Sequence[str], config: ManifestConfig) -> str:
    answer = text_of(value, "answer")
    if answer is None:
        raise RowError(Reason.NO_ANSWER)
    how = config.answer_as or config.reader.answer_as
    if not choices:
        if config.answer_as in ("letter", "index", "number"):
            raise RowError(Reason.ANSWER_NO_CHOICE, f"expected choices, which '{answer}' is the {how} of, found none.")
        return answer
    index: int | None = None
    if how == "text":
        same, answer = [_composed(choice) for choice in choices], _composed(answer)
        index = same.index(answer) if answer in same else None
    elif how == "key":  # as published keys are read: a text, its letter, or both
        index = read_key(answer, choices)[0]
    elif how == "letter":
        letter = answer.strip("().").upper()
        index = ascii_uppercase.find(letter) if len(letter) == 1 and not misplaced(letter, choices) else None
    elif re.fullmatch(r"\d{1,3}(?:\.0)?", answer):
        index = int(float(answer)) - (how == "number")
    if index is None or not 0 <= index < len(choices):
        raise RowError(Reason.ANSWER_NO_CHOICE, f"expected one of {', '.join(choices)} (as {how}), found '{answer}'.")
    return choices[index]


def _elements(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        value = _json(value, "semantic_elements")
    if value in (None, "", {}):
        return {}
    if not isinstance(value, Mapping):
        found = f"{value!r:.60}"
        raise RowError(Reason.WRONG_TYPE, f"semantic_elements: expected a mapping of groups, found {found}.")
    return {str(name): words for name, words in value.items() if words not in (None, "", [])}


def _events(value: Any) -> list[Event]:
    if isinstance(value, str) and value.strip():
        value = _json(value, "events")
    if value in (None, "", []):
        return []
    try:
        return [Event(**{name: part for name, part in event.items() if part is not None}) for event in value]
    except (TypeError, AttributeError) as error:
        expected = "objects of label, onset, offset, azimuth, elevation, distance"
        raise RowError(Reason.BAD_EVENT, f"events: expected {expected}, found {value!r:.80}.") from error


def _texts(value: Any) -> list[str]:
    """All texts in a tree of mappings and lists, the names too."""
    if isinstance(value, Mapping):
        return [text for name, part in value.items() for text in (str(name), *_texts(part))]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else [str(value)]


def _json(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowError(Reason.WRONG_TYPE, f"{name}: expected JSON, found {text!r:.60}.") from error


def _kept(value: Any, name: str) -> Any:
    if isinstance(value, (str, int, bool, list, dict)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RowError(Reason.WRONG_TYPE, f"{name}: expected a value of JSON, found {type(value).__name__}.")


# ------------------------------------------------------------------------------------------------ all rows


def _refuse_doubles(found: list[Draft], rejects: list[Reject]) -> list[Draft]:
    """The first of each id; the others are rejects. Ids of their own that are one id in shards, where dots and spaces
    are none, are told apart."""
    first: dict[str, Draft] = {}
    kept = []
    for draft in found:
        other = first.setdefault(draft.sample.id, draft)
        if other is not draft and other.own != draft.own:
            key = _told_apart(draft.sample.id, draft.own)
            draft = replace(draft, sample=replace(draft.sample, id=key))
            other = first.setdefault(key, draft)
        if other is draft:
            kept.append(draft)
        else:
            detail = f"'{draft.sample.id}' is the id of {other.where} as well."
            rejects.append(Reject(draft.where, Reason.DUPLICATE_ID, detail))
    return kept


def _with_choices(found: list[Draft], config: ManifestConfig) -> list[Draft]:
    """Rows without choices with so many as the recipe draws, at places drawn by the seed and the row's own id, as often
    as it asks them: openly once, and once with the same choices."""
    if not config.draw_choices:
        return found
    answers: dict[str, str] = {}  # by what they are when case and marks are left out: equal ones are no choice
    for draft in found:
        if not draft.sample.choices:
            answers.setdefault(normalise(draft.sample.answer or ""), draft.sample.answer or "")
    if answers and len(answers) < config.draw_choices:
        expected = f"at most the {len(answers)} answers there are"
        raise ConfigError(describe("draw_choices", expected, f"{config.draw_choices}"))
    asked = []
    for draft in found:
        sample, drawn = draft.sample, set[tuple[str, ...]]()
        for number in range(1, config.draws + 1 if not sample.choices else 2):
            key = sample.id if number == 1 else identity(config.corpus, f"{sample.id}-draw{number}", 0)
            choices = sample.choices or _draw(sample.answer or "", answers, config, key, open_as_well=() not in drawn)
            if tuple(sorted(choices)) in drawn:
                continue
            drawn.add(tuple(sorted(choices)))
            task = "choice" if choices else sample.task
            asked.append(replace(draft, sample=replace(copy.deepcopy(sample), id=key, choices=choices, task=task)))
    return asked


def _draw(answer: str, answers: Mapping[str, str], config: ManifestConfig, key: str, open_as_well: bool) -> list[str]:
    """Choices of which `answer` is one, or none."""
    rng = seeded("choices", config.seed, key)
    if rng.random() < config.open_share and open_as_well:
        return []
    others = [answers[name] for name in sorted(answers) if name != normalise(answer)]
    drawn = [others[int(place)] for place in rng.permutation(len(others))[: config.draw_choices - 1]]
    drawn.insert(int(rng.integers(config.draw_choices)), answer)
    return drawn
