"""Files of answers that other programs write, read as predictions: whose question, which choices, what was said.

Each reader says by the keys of a row whether it knows the file. Choices that a file has inside the prompt alone are
read from their lettered lines; a right answer that is a letter is the option of that letter. Nothing else is guessed:
a row that does not say its choices or whose answer is none of them is a row with an error, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from audio_llm.datasets.records import Record, read_records
from audio_llm.errors import describe
from audio_llm.language.mentions import bare_options
from eval.predictions import Prediction, PredictionsError

QUESTION = ("question", "query", "instruction", "prompt", "input")
CHOICES = ("choices", "options", "multi-choice", "multi_choice")
GOLD = ("answer", "answer_gt", "labels", "label", "reference", "target", "ground_truth", "gold", "solution")
SAID = ("model_output", "model_prediction", "prediction", "response", "pred", "output", "answer_prediction")
KINDS = ("task", "category", "sub-category", "sub_category", "modality", "question_type")


class Answered(NamedTuple):
    """What a file tells of one question; `choices` are empty where they stand in the `question` alone."""

    id: str
    question: str
    choices: Sequence[str]
    gold: str
    said: Any
    kind: str = ""
    clip: str = ""


class Harness(NamedTuple):
    """A reader: `knows` tells by the first rows whether a file is of this kind."""

    name: str
    knows: Callable[[Sequence[Record]], bool]
    read: Callable[[Sequence[Record]], Iterable[Answered]]


def read(path: Path) -> tuple[str, list[Prediction]]:
    """The name of the harness that wrote the file, and its answers. Raises children of ``AudioLLMError`` for a file
    that none of :data:`HARNESSES` knows, or in which no question can be scored."""
    records = read_records(path)
    harness = next((one for one in HARNESSES if records and one.knows(records)), None)
    if harness is None:
        keys = ", ".join(map(str, list(records[0].values)[:12])) or "no keys" if records else "no rows"
        expected = f"a file of answers ({'; '.join(one.name for one in HARNESSES)})"
        cure = "Give each row a question, choices, answer and model_output."
        raise PredictionsError(describe(str(path), expected, keys, cure))
    rows, seen = [], set()
    for answered in harness.read(records):
        if answered.id in seen:
            raise PredictionsError(describe(f"{path}: question '{answered.id}'", "one answer", "several"))
        seen.add(answered.id)
        rows.append(_prediction(answered))
    if rows and all(row.error for row in rows):
        raise PredictionsError(describe(str(path), "questions that can be scored", f"none; the first: {rows[0].error}"))
    return harness.name, rows


def _prediction(answered: Answered) -> Prediction:
    choices, gold, problem = list(answered.choices), answered.gold.strip(), ""
    if not choices:
        choices = lettered_lines(answered.question)
    bare = list(bare_options(choices)[0])
    if not choices:
        problem = "the file does not say its choices"
    elif (place := option_of(gold, bare, choices)) is None:
        problem = f"its right answer '{gold}' is none of its choices"
    else:
        gold = bare[place]
    if not problem and not isinstance(answered.said, str):
        problem = f"its answer is {answered.said!r:.40}, not text"
    return Prediction(
        id=answered.id,
        question_type=answered.kind,
        format="choice",
        question=answered.question,
        choices=bare,
        gold=gold,
        raw=answered.said if isinstance(answered.said, str) else "",
        error=problem,
        clip=answered.clip or answered.id,
    )


def option_of(gold: str, bare: Sequence[str], choices: Sequence[str]) -> int | None:
    """The place of the right answer: an option with or without its letter, else a letter (``B``, ``(b)``, ``B.``)."""
    for options in (bare, choices):
        if options.count(gold) == 1:
            return options.index(gold)
    whole = re.fullmatch(r"\(?([A-Za-z])[).:]?\s*(.*)", gold, re.DOTALL)
    place = ascii_uppercase.find(whole[1].upper()) if whole else -1
    if whole and 0 <= place < len(bare) and whole[2].strip() in ("", bare[place]):
        return place
    folded = [option.casefold() for option in bare]
    return folded.index(gold.casefold()) if folded.count(gold.casefold()) == 1 else None


_LETTER = re.compile(r"(?:(?<=\s)|^)\(?([A-Z])[).:]\s*", re.MULTILINE)


def lettered_lines(text: str) -> list[str]:
    """The options behind (A), (B), … or A., B., … of a prompt: the last such list in it; none where there is none."""
    marks = list(_LETTER.finditer(text))
    for first in reversed([number for number, mark in enumerate(marks) if mark[1] == "A"]):
        run: list[re.Match[str]] = []
        for mark in marks[first:]:
            if mark[1] == ascii_uppercase[len(run)]:
                run.append(mark)
        if len(run) >= 2:
            ends = [mark.start() for mark in run[1:]] + [len(text)]
            return [
                text[mark.end() : end].strip().partition("\n")[0].strip() for mark, end in zip(run, ends, strict=True)
            ]
    return []


def _first(values: Mapping[str, Any], keys: Sequence[str], default: Any = "") -> Any:
    return next((values[key] for key in keys if values.get(key) not in (None, "", [])), default)


def _choices(values: Mapping[str, Any]) -> list[str]:
    found = _first(values, CHOICES, [])
    if not found:
        lettered = [values[key] for letter in "abcd" if isinstance(values.get(key := f"choice_{letter}"), str)]
        found = [text for text in lettered if text.strip()]
    if isinstance(found, Mapping):
        found = list(found.values())
    return [str(choice) for choice in found] if isinstance(found, (list, tuple)) else []


def _kind(values: Mapping[str, Any]) -> str:
    found = _first(values, KINDS)
    return str(found[0] if isinstance(found, list) and found else found)


# ------------------------------------------------------------------------------------------------- official arrays


def _official(records: Sequence[Record]) -> Iterable[Answered]:
    for number, record in enumerate(records):
        values = record.values
        gold = _first(values, GOLD)
        yield Answered(
            str(_first(values, ("id", "question_id", "uniq_id", "audio_id"), number)),
            str(_first(values, QUESTION)),
            _choices(values),
            str(gold),
            next((values[key] for key in SAID if key in values), None),
            _kind(values),
            str(_first(values, ("audio_id", "audio_path", "audio"))),
        )


def _is_official(records: Sequence[Record]) -> bool:
    keys = {key for record in records[:20] for key in record.values}
    return bool(keys & set(SAID)) and bool(keys & set(GOLD)) and bool(keys & set(QUESTION))


# -------------------------------------------------------------------------------------------------------- lmms-eval


def _lmms(records: Sequence[Record]) -> Iterable[Answered]:
    """``samples_*.jsonl``: the row of the data set under ``doc``, the reply before its filters under ``resps``."""
    for number, record in enumerate(records):
        values = record.values
        doc: Mapping[str, Any] = values["doc"] if isinstance(values.get("doc"), Mapping) else {}
        asked = values.get("input") or _first(doc, QUESTION)
        said = values.get("resps", values.get("filtered_resps"))
        while isinstance(said, list) and said:
            said = said[0]
        gold = _first(doc, GOLD, values.get("target", ""))
        yield Answered(str(values.get("doc_id", number)), str(asked), _choices(doc), str(gold), said, _kind(doc))


def _is_lmms(records: Sequence[Record]) -> bool:
    return all("doc_id" in record.values and {"resps", "filtered_resps"} & set(record.values) for record in records[:5])


# --------------------------------------------------------------------------------------------------------- ms-swift


def _swift(records: Sequence[Record]) -> Iterable[Answered]:
    """Results of ``swift infer``: the conversation, the reply under ``response``, the right one under ``labels``."""
    for number, record in enumerate(records):
        values = record.values
        turns = values.get("messages")
        asked = [
            turn.get("content", "")
            for turn in (turns if isinstance(turns, list) else [])
            if isinstance(turn, Mapping) and turn.get("role") == "user"
        ]
        name, said = str(values.get("id", number)), values.get("response")
        yield Answered(name, _text(asked), _choices(values), str(_first(values, GOLD)), said)


def _is_swift(records: Sequence[Record]) -> bool:
    return all(
        "response" in record.values and isinstance(record.values.get("messages"), list) for record in records[:5]
    )


def _text(content: Any) -> str:
    """The words of a message's content: a text, or parts of which some are texts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return _text(next((content[key] for key in ("text", "contents", "content", "value") if content.get(key)), ""))
    return "\n".join(filter(None, map(_text, content))) if isinstance(content, (list, tuple)) else ""


# --------------------------------------------------------------------------------------------------- UltraEval-Audio


def _ultraeval(records: Sequence[Record]) -> Iterable[Answered]:
    """The record of a run: rows of ``type`` prompt, inference, post_process and eval, joined by their ``id``."""
    steps: dict[str, dict[str, Any]] = {}
    for record in records:
        data = record.values.get("data")
        steps.setdefault(str(record.values.get("id")), {})[str(record.values.get("type"))] = data
    for item, found in steps.items():
        prompt, said, judged = (
            data if isinstance(data := found.get(name), Mapping) else {} for name in ("prompt", "inference", "eval")
        )
        gold = str(_first(judged, ("ref", "label", "answer")))
        yield Answered(item, _text(prompt.get("content", "")), (), gold, said.get("content"))


def _is_ultraeval(records: Sequence[Record]) -> bool:
    return all({"type", "id", "data"} <= set(record.values) for record in records[:5])


HARNESSES = (
    Harness("lmms-eval", _is_lmms, _lmms),
    Harness("UltraEval-Audio", _is_ultraeval, _ultraeval),
    Harness("ms-swift", _is_swift, _swift),
    Harness("a benchmark's own form", _is_official, _official),
)
