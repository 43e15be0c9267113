"""Open answers in the words of SpatialSoundQA (Zheng et al. 2024, BAT): label lists as exact sets, direction words per
axis, distances within half a metre, yes/no."""

from __future__ import annotations

import re
from collections.abc import Callable

from audio_llm.language.denials import denied, lowered, mask
from audio_llm.language.replies import normalise, read_reply
from eval.predictions import Prediction
from eval.scorers.base import Score

DISTANCE_TOLERANCE = 0.5  # metres: one class of Spatial-AST's distance head, the convention behind BAT's DER
AXES = (("left", "right"), ("front", "behind"), ("above", "below"))
SYNONYMS = {"back": "behind", "rear": "behind", "ahead": "front", "up": "above", "down": "below"}
DIRECTIONS = [*(word for axis in AXES for word in axis), *SYNONYMS]

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


def score_open(row: Prediction) -> Score:
    """The score of an answer in words, by the kind of question; an unreadable reply is wrong."""
    reply = read_reply(row.raw)
    if not reply.answer or reply.problem in ("thinking not closed", "several different answers"):
        return Score(row.id, row.question_type, 0.0, None, f"no answer to read: {reply.problem}", False)
    return OPEN_SCORERS[answer_kind(row)](row, reply.answer)


def answer_kind(row: Prediction) -> str:
    """``choice`` or the kind of open answer, by SpatialSoundQA's question type, else by the form of the gold answer."""
    if row.choices:
        return "choice"
    if row.question_type.upper() in SPATIAL_SOUND_QA:
        return SPATIAL_SOUND_QA[row.question_type.upper()]
    gold = normalise(row.gold)
    if gold in ("yes", "no"):
        return "yes_no"
    if read_distance(gold) is not None:
        return "place" if read_directions(gold) else "distance"
    return "direction" if _is_directions_only(gold) else "labels"


def read_distance(text: str) -> float | None:
    """The one distance in metres that `text` names and does not deny ("2m", "1.5 m", "3 metres"), else None."""
    found = _said(r"(?<![\w.\-−])(\d+(?:\.\d+)?)\s*(?:m|metres?|meters?)\b", text)
    return float(found[0]) if len(found) == 1 else None


def read_directions(text: str) -> dict[str, str]:
    """Direction words by axis, ``{"left/right": "left", …}``, without those that `text` denies; an axis named both ways
    is left out."""
    words = {SYNONYMS.get(word, word) for word in _said(rf"\b({'|'.join(DIRECTIONS)})\b", text)}
    return {"/".join(axis): word for axis in AXES for word in axis if word in words and len(words & set(axis)) == 1}


def _said(pattern: str, text: str) -> list[str]:
    """What the group of `pattern` holds wherever `text` says it and does not deny it."""
    text = lowered(text)
    places = [(*match.span(), match[1]) for match in re.finditer(pattern, text)]
    masked = mask(text, [(start, end) for start, end, _ in places])
    return [said for start, end, said in places if not denied(masked, start, end)]


def read_labels(text: str) -> frozenset[str]:
    """The set of labels of a ``"; "`` list; a comma inside a label is part of it."""
    return frozenset(label for label in (normalise(part) for part in text.split(";")) if label)


def _is_directions_only(text: str) -> bool:
    words = re.findall(r"[a-z]+", text)
    return bool(words) and all(word in DIRECTIONS for word in words)


def _score_labels(row: Prediction, answer: str) -> Score:
    said, gold = read_labels(answer), read_labels(row.gold)
    missing, extra = sorted(gold - said), sorted(said - gold)
    notes = [f"missing {', '.join(missing)}"] if missing else []
    notes += [f"wrong {', '.join(extra)}"] if extra else []
    text = "; ".join(notes) or "exactly the gold labels"
    return Score(row.id, row.question_type, float(said == gold), "; ".join(sorted(said)), text, bool(said))


def _score_yes_no(row: Prediction, answer: str) -> Score:
    words = set(_said(r"\b(yes|no)\b", answer))
    if len(words) != 1:
        return Score(row.id, row.question_type, 0.0, None, f"neither yes nor no in {answer!r}", False)
    said = words.pop()
    return Score(
        row.id, row.question_type, float(said == normalise(row.gold)), said, f"said {said}, gold {row.gold}", True
    )


def _score_distance(row: Prediction, answer: str) -> Score:
    said, gold = read_distance(answer), read_distance(row.gold)
    if said is None or gold is None:
        return Score(row.id, row.question_type, 0.0, None, f"not one distance in {answer!r}, gold {row.gold}", False)
    error = abs(said - gold)
    right = error <= DISTANCE_TOLERANCE + 1e-9
    return Score(row.id, row.question_type, float(right), f"{said:g}m", f"off by {error:g} m from {gold:g} m", True)


def _score_direction(row: Prediction, answer: str) -> Score:
    said, gold = read_directions(answer), read_directions(row.gold)
    parts = {axis: float(said.get(axis) == word) for axis, word in gold.items()}
    if not said:
        return Score(
            row.id, row.question_type, 0.0, None, f"no direction word in {answer!r}, gold {row.gold}", False, parts
        )
    text = ", ".join(said.values())
    wrong = [axis for axis, right in parts.items() if not right] + sorted(set(said) - set(gold))
    note = f"wrong on {', '.join(wrong)}; gold {', '.join(gold.values())}" if wrong else "every direction word right"
    return Score(row.id, row.question_type, float(not wrong), text, note, True, parts)


def _score_place(row: Prediction, answer: str) -> Score:
    """Direction words, then a distance: the value is that of the words (BAT's DoA accuracy), the rest parts."""
    direction, distance = _score_direction(row, answer), _score_distance(row, answer)
    parts = {**direction.parts, "distance": distance.value}
    said = "; ".join(part for part in (direction.answer, distance.answer) if part) or None
    note = f"{direction.explanation}; distance {distance.explanation}"
    return Score(row.id, row.question_type, direction.value, said, note, direction.parsed, parts)


OPEN_SCORERS: dict[str, Callable[[Prediction, str], Score]] = {
    "labels": _score_labels,
    "yes_no": _score_yes_no,
    "distance": _score_distance,
    "direction": _score_direction,
    "place": _score_place,
}
