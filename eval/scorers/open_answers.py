"""Open answers in the words of SpatialSoundQA (Zheng et al. 2024, BAT): label lists as exact sets, direction words per
axis, distances within half a metre, yes/no."""

from __future__ import annotations

from collections.abc import Callable

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


def score_open(row: Prediction) -> Score:
    """The score of an answer in words, by the kind of question; an unreadable reply is wrong."""
    reply = row.reply()
    if not reply.said:
        return Score(row.id, row.question_type, 0.0, None, f"no answer to read: {reply.problem}", False)
    return OPEN_SCORERS[answer_kind(row)](row, reply.said)


def answer_kind(row: Prediction) -> str:
    """``choice`` or the kind of open answer, by SpatialSoundQA's question type, else by the form of the gold answer."""
    if row.choices:
        return "choice"
    if row.question_type.upper() in SPATIAL_SOUND_QA:
        return SPATIAL_SOUND_QA[row.question_type.upper()]
    gold = normalise(row.gold)
    if gold in YES_NO:
        return "yes_no"
    if read_distance(gold) is not None:
        return "place" if read_directions(gold) else "distance"
    return "direction" if is_direction(gold) else "labels"


def _score_labels(row: Prediction, answer: str) -> Score:
    gold = read_labels(row.gold)
    said = read_labels(answer, sorted(gold))
    missing, extra = sorted(gold - said), sorted(said - gold)
    notes = [f"missing {', '.join(missing)}"] if missing else []
    notes += [f"wrong {', '.join(extra)}"] if extra else []
    text = "; ".join(notes) or "exactly the gold labels"
    return Score(row.id, row.question_type, float(said == gold), "; ".join(sorted(said)), text, bool(said))


def _score_yes_no(row: Prediction, answer: str) -> Score:
    said = read_yes_no(answer)
    if said is None:
        return Score(row.id, row.question_type, 0.0, None, f"neither yes nor no in {answer!r}", False)
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
