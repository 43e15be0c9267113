"""Open answers in the words of SpatialSoundQA (Zheng et al. 2024, BAT): label lists as exact sets, direction words per
axis, distances within half a metre, yes/no."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from audio_llm.language.directions import is_direction, read_directions
from audio_llm.language.polarity import YES_NO, read_yes_no
from audio_llm.language.quantities import read_distance
from audio_llm.language.replies import normalise, read_labels
from eval.predictions import Prediction
from eval.scorers.base import Score

DISTANCE_TOLERANCE = 0.5  # metres: one class of Spatial-AST's distance head, the convention behind BAT's DER

# Answer kind of SpatialSoundQA's question types where no choices are given.
SPATIAL_SOUND_QA = {
    "CLASSIFICATION": "labels",
    "DOA": "place",
    "MIXUP_SINGLE_CLASSIFICATION": "labels",
    "MIXUP_SINGLE_DOA": "place",
    "MIXUP_DIRECTION": "yes_no",
    "MIXUP_DISTANCE_BOTH": "yes_no",
    "MIXUP_NONBINARY_DISTANCE": "distance",
    "MIXUP_NONBINARY_SOURCE": "labels",
    "MIXUP_NONBINARY_DIRECTION": "direction",
}


class Found(NamedTuple):
    """What an answer is worth, as :class:`Score` has it."""

    value: float
    answer: str | None
    explanation: str
    parsed: bool
    parts: dict[str, float] = {}


def score_open(row: Prediction) -> Score:
    """The score of an answer in words, by the kind of question; an unreadable reply is wrong."""
    reply = row.reply()
    if not reply.said:
        return Score(row.id, row.question_type, 0.0, None, f"no answer to read: {reply.problem}", False)
    return Score(row.id, row.question_type, *compared(answer_kind(row), row.gold, reply.said))


def answer_kind(row: Prediction) -> str:
    """``choice`` or the kind of open answer, by SpatialSoundQA's question type, else by the form of the gold answer."""
    return "choice" if row.choices else _kind(row.question_type.upper(), row.gold)


@lru_cache(maxsize=10_000)
def _kind(question_type: str, gold: str) -> str:
    if question_type in SPATIAL_SOUND_QA:
        return SPATIAL_SOUND_QA[question_type]
    gold = normalise(gold)
    if gold in YES_NO:
        return "yes_no"
    if read_distance(gold) is not None:
        return "place" if read_directions(gold) else "distance"
    return "direction" if is_direction(gold) else "labels"


@lru_cache(maxsize=50_000)
def compared(kind: str, gold: str, answer: str) -> Found:
    """What `answer` is worth where `gold` is right: the same few answers are given to thousands of questions."""
    return KINDS[kind](gold, answer)


def _labels(gold: str, answer: str) -> Found:
    wanted = read_labels(gold)
    said = read_labels(answer, sorted(wanted))
    missing, extra = sorted(wanted - said), sorted(said - wanted)
    notes = [f"missing {', '.join(missing)}"] if missing else []
    notes += [f"wrong {', '.join(extra)}"] if extra else []
    text = "; ".join(notes) or "exactly the gold labels"
    return Found(float(said == wanted), "; ".join(sorted(said)), text, bool(said))


def _yes_no(gold: str, answer: str) -> Found:
    said = read_yes_no(answer)
    if said is None:
        return Found(0.0, None, f"neither yes nor no in {answer!r}", False)
    return Found(float(said == normalise(gold)), said, f"said {said}, gold {gold}", True)


def _distance(gold: str, answer: str) -> Found:
    said, wanted = read_distance(answer), read_distance(gold)
    if said is None or wanted is None:
        return Found(0.0, None, f"not one distance in {answer!r}, gold {gold}", False)
    error = abs(said - wanted)
    right = error <= DISTANCE_TOLERANCE + 1e-9
    return Found(float(right), f"{said:g}m", f"off by {error:g} m from {wanted:g} m", True)


def _direction(gold: str, answer: str) -> Found:
    said, wanted = read_directions(answer), read_directions(gold)
    parts = {axis: float(said.get(axis) == word) for axis, word in wanted.items()}
    if not said:
        return Found(0.0, None, f"no direction word in {answer!r}, gold {gold}", False, parts)
    text = ", ".join(said.values())
    wrong = [axis for axis, right in parts.items() if not right] + sorted(set(said) - set(wanted))
    note = f"wrong on {', '.join(wrong)}; gold {', '.join(wanted.values())}" if wrong else "every direction word right"
    return Found(float(not wrong), text, note, True, parts)


def _place(gold: str, answer: str) -> Found:
    """Direction words, then a distance: the value is that of the words (BAT's DoA accuracy), the rest parts."""
    direction, distance = _direction(gold, answer), _distance(gold, answer)
    parts = {**direction.parts, "distance": distance.value}
    said = "; ".join(part for part in (direction.answer, distance.answer) if part) or None
    note = f"{direction.explanation}; distance {distance.explanation}"
    return Found(direction.value, said, note, direction.parsed, parts)


KINDS: dict[str, Callable[[str, str], Found]] = {
    "labels": _labels,
    "yes_no": _yes_no,
    "distance": _distance,
    "direction": _direction,
    "place": _place,
}
