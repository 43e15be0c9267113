"""The official string match of MMAU (Sakshi et al. 2024), reimplemented, on three readings of a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from audio_llm.errors import AudioLLMError, describe
from audio_llm.prompts import read_reply
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, unscored

_TOKEN = re.compile(r"\b\w+\b")


class MatchError(AudioLLMError):
    """Something other than text where the rule reads text; the original ends there with an AttributeError."""


def tokens(text: Any) -> frozenset[str]:
    """The maximal runs of word characters (letters, digits, underscore) of the lowercased text, as a set."""
    if not isinstance(text, str):
        raise MatchError(describe("MMAU's string match", "text", f"{text!r}"))
    return frozenset(_TOKEN.findall(text.lower()))


def compare_tokens(answer: Any, prediction: Any, choices: Sequence[Any]) -> tuple[bool, frozenset[str], frozenset[str]]:
    """MMAU's rule: (right, words of the answer that are missing, words that only other choices have).

    Right when every word of the answer is said and no word is said that belongs to another choice alone. Choices with
    the same words as the answer are no others; an empty prediction is wrong. Word order and negation do not matter.
    Raises :class:`MatchError` where an argument is not text.
    """
    said, wanted = tokens(prediction), tokens(answer)
    foreign: frozenset[str] = frozenset()
    for choice in choices:
        words = tokens(choice)
        if words != wanted:
            foreign |= words - wanted
    missing, wrong = wanted - said, said & foreign
    return bool(said) and not missing and not wrong, missing, wrong


def string_match(answer: Any, prediction: Any, choices: Sequence[Any]) -> bool:
    """The rule's verdict alone."""
    return compare_tokens(answer, prediction, choices)[0]


class OfficialRule:
    """MMAU's rule on what `read` makes of a prediction; `read` gives None where it finds no answer."""

    version = "1"

    def __init__(self, name: str, title: str, read: Callable[[Prediction], str | None]) -> None:
        self.name, self.title, self._read = name, title, read

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
    return read_reply(row.raw, row.choices).answer or None


def resolved_text(row: Prediction) -> str | None:
    """The text of the option that the reply resolves to."""
    choice = read_reply(row.raw, row.choices).choice
    return None if choice is None else row.choices[choice]


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


SCORERS: tuple[Scorer, ...] = (
    OfficialRule("mmau-official", "MMAU's rule, whole reply", raw_text),
    OfficialRule("mmau-official-extracted", "MMAU's rule, extracted answer", extracted_text),
    OfficialRule("mmau-official-resolved", "MMAU's rule, resolved option", resolved_text),
)
