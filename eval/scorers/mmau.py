"""The official string match of MMAU (Sakshi et al. 2024), reimplemented, on three readings of a reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from audio_llm.datasets.mmau import word_set
from audio_llm.errors import AudioLLMError, describe
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, unscored

KEY = "model_output"  # what the official script reads; other spellings it leaves out without a word
TASKS, DIFFICULTIES = ("sound", "music", "speech"), ("easy", "hard", "medium")


class MatchError(AudioLLMError):
    """Input on which the original script ends with a traceback; `reference` is the last line of that traceback."""

    def __init__(self, message: str, reference: str) -> None:
        super().__init__(message)
        self.reference = reference


_again = lru_cache(maxsize=10_000)(word_set)  # options are those of other questions as well, and of all three readings


def tokens(text: Any, words: Callable[[str], frozenset[str]] = word_set) -> frozenset[str]:
    """:func:`word_set` of a text. Raises :class:`MatchError` for anything else."""
    if not isinstance(text, str):
        reference = f"AttributeError: '{type(text).__name__}' object has no attribute 'lower'"
        raise MatchError(describe("MMAU's string match", "text", f"{text!r}"), reference)
    return words(text)


def compare_tokens(answer: Any, prediction: Any, choices: Sequence[Any]) -> tuple[bool, frozenset[str], frozenset[str]]:
    """MMAU's rule: (right, words of the answer that are missing, words that only other choices have).

    Right when every word of the answer is said and no word is said that belongs to another choice alone. Choices with
    the same words as the answer are no others; an empty prediction is wrong. Word order and negation do not matter.
    Raises :class:`MatchError` where an argument is not text.
    """
    said, wanted = tokens(prediction), tokens(answer, _again)
    foreign: frozenset[str] = frozenset()
    for choice in choices:
        words = tokens(choice, _again)
        if words != wanted:
            foreign |= words - wanted
    missing, wrong = wanted - said, said & foreign
    return bool(said) and not missing and not wrong, missing, wrong


def string_match(answer: Any, prediction: Any, choices: Sequence[Any]) -> bool:
    """The rule's verdict alone."""
    return compare_tokens(answer, prediction, choices)[0]


class OfficialRule:
    """MMAU's rule on what `read` makes of a prediction; `read` gives None where it finds no answer."""

    def __init__(self, name: str, version: str, title: str, read: Callable[[Prediction], str | None]) -> None:
        self.name, self.version, self.title, self._read = name, version, title, read

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices:
            return None
        text = self._read(row)
        if text is None or not tokens(text):
            note = "the reply is empty" if not row.raw.strip() else "no answer to read"
            return Score(row.id, row.question_type, 0.0, None, f"{note}; gold '{row.gold}'", False)
        right, missing, wrong = compare_tokens(row.gold, text, row.choices)
        notes = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        notes += [f"says {', '.join(sorted(wrong))} of another choice"] if wrong else []
        why = "; ".join(notes) or "every word of the answer and none of another choice"
        return Score(row.id, row.question_type, float(right), _short(text), why, True)


def raw_text(row: Prediction) -> str | None:
    """The whole reply, as the original takes it."""
    return row.raw


def extracted_text(row: Prediction) -> str | None:
    """The words of the answer tag, or what follows the reasoning."""
    return row.reply().answer or None


def resolved_text(row: Prediction) -> str | None:
    """The text of the option that the reply resolves to."""
    choice = row.reply().choice
    return None if choice is None else row.choices[choice]


def answer_text(row: Prediction) -> str:
    """What a submission says the answer is: the option that the reply resolves to, else the words of its answer."""
    return "" if row.error else resolved_text(row) or extracted_text(row) or ""


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ------------------------------------------------------------------------------------------- the official summary


@dataclass
class OfficialReport:
    """What the official script prints: per group right answers and items, an accuracy rounded to two decimals.

    Items without ``model_output`` are in no denominator, as in the original; `left_out` says how many there were.
    """

    groups: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in (*TASKS, *DIFFICULTIES)})
    right: int = 0
    total: int = 0
    left_out: int = 0

    def count(self, names: Sequence[str], right: bool) -> None:
        """Add one item to its groups."""
        for name in names:
            self.groups[name][0] += right
            self.groups[name][1] += 1
        self.right, self.total = self.right + right, self.total + 1

    def figures(self) -> dict[str, tuple[float, int]]:
        """Percent and number of items by group, and ``Total Accuracy`` where there are items at all."""
        figures = {name: (_percent(right, count), count) for name, (right, count) in self.groups.items()}
        return figures | ({"Total Accuracy": (_percent(self.right, self.total), self.total)} if self.total else {})


def official_report(records: Sequence[Mapping[str, Any]]) -> OfficialReport:
    """The official script's aggregation of an array of items with ``model_output``.

    Raises :class:`MatchError`, holding what the original dies of, for a task or difficulty that it does not know, for
    anything but text where it reads text, and where no item has the key.
    """
    report = OfficialReport()
    for number, record in enumerate(records):
        if KEY not in record:
            report.left_out += 1
            continue
        where = f"item {number} ({record.get('id')})"
        for name in ("answer", "task", "difficulty", "choices"):
            if name not in record:
                raise MatchError(describe(where, f"the key '{name}'", ", ".join(record)), f"KeyError: '{name}'")
        right = string_match(record["answer"], record[KEY], record["choices"])
        for name, known in (("task", TASKS), ("difficulty", DIFFICULTIES)):
            if record[name] not in known:
                message = describe(f"{where}: {name}", f"one of {', '.join(known)}", f"{record[name]!r}")
                raise MatchError(message, f"KeyError: {record[name]!r}")
        category = record.get("sub-category")
        if category is not None:
            report.groups.setdefault(category, [0, 0])
        report.count([record["task"], record["difficulty"], *([category] if category is not None else [])], right)
    return report


def refuse_nothing(report: OfficialReport, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`MatchError` where no item was scored: the original divides by zero, its group figures printed."""
    if not report.total:
        keys = sorted({name for record in records for name in record if name.startswith("model_")})
        found = f"{len(records)} items with {', '.join(keys) or 'no such key'}"
        raise MatchError(
            describe("predictions", f"items with the key '{KEY}'", found), "ZeroDivisionError: division by zero"
        )


def reference_report(path: str | Path) -> OfficialReport:
    """What MMAU's own script prints for a file. Raises :class:`MatchError` with what the original dies of."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise AudioLLMError(describe(str(path), "a file of MMAU's answers", str(error.strerror))) from error
    try:
        records = json.loads(text.decode("utf-8"))
        report = official_report(records)
    except json.JSONDecodeError as error:
        message = describe(str(path), "one JSON array", str(error))
        raise MatchError(message, f"json.decoder.JSONDecodeError: {error}") from error
    except (UnicodeDecodeError, RecursionError, TypeError, AttributeError) as error:  # no array of MMAU's items at all
        reference = f"{type(error).__name__}: {error}"
        raise MatchError(describe(str(path), "a JSON array of MMAU's items", "something else"), reference) from error
    print_reference(report)
    refuse_nothing(report, records)
    return report


def print_reference(report: OfficialReport) -> None:
    """The official figures, one group a line, and how many items the original left out without saying so."""
    for name, (percent, count) in report.figures().items():
        print(f"{name} : {percent:.2f}% over {count} samples")
    if report.left_out:
        print(f"{report.left_out} items have no model_output: the official script leaves them out of every denominator")


def _percent(right: int, count: int) -> float:
    return round(100 * right / count, 2) if count else 0.0


SCORERS: tuple[Scorer, ...] = (
    OfficialRule("mmau-official", "1", "MMAU's rule, whole reply", raw_text),
    OfficialRule("mmau-official-extracted", "2", "MMAU's rule, extracted answer", extracted_text),
    OfficialRule("mmau-official-resolved", "2", "MMAU's rule, resolved option", resolved_text),
)
