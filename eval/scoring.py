"""From a stored prediction to a score row (value, answer, explanation), and from rows to a table.

Choice questions are scored on the resolved option. Open questions follow the answer strings of SpatialSoundQA
(Zheng et al. 2024, BAT): label lists as exact sets, direction words per axis, distances within half a metre, yes/no.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from audio_llm.prompts import normalise, read_reply
from eval.predictions import Prediction
from eval.statistics import Estimate, McNemar, mcnemar, paired_difference, proportion

SCORER = "option-resolution"
SCORER_VERSION = "1"

DISTANCE_TOLERANCE = 0.5  # metres: one class of Spatial-AST's distance head, the convention behind BAT's DER
AXES = (("left", "right"), ("front", "behind"), ("above", "below"))
SYNONYMS = {"back": "behind", "rear": "behind", "ahead": "front", "up": "above", "down": "below"}

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


@dataclass(frozen=True)
class Score:
    """One row a person can read. `parsed` is False where no answer could be read; such a row is wrong.

    `parts` holds what a composite answer is made of (direction axes, distance), each 0 or 1.
    """

    id: str
    question_type: str
    value: float
    answer: str | None
    explanation: str
    parsed: bool
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One group of score rows. `chance` is what guessing reaches; `errors` are items left out of `accuracy.n`."""

    accuracy: Estimate
    chance: float
    parse_failures: int
    errors: int
    parts: dict[str, Estimate]
    mean_completion_tokens: float
    truncated: int


@dataclass(frozen=True)
class Comparison:
    """Two runs on their common items: mean difference (second - first) and, for 0/1 rows, McNemar's test."""

    difference: Estimate
    mcnemar: McNemar | None


# ------------------------------------------------------------------------------------------------------ one item


def score(row: Prediction) -> Score | None:
    """Score one prediction; None for a row that holds an error instead of an answer."""
    if row.error:
        return None
    if row.choices:
        return _score_choice(row)
    reply = read_reply(row.raw)
    kind = answer_kind(row)
    if not reply.answer or reply.problem in ("thinking not closed", "several different answers"):
        return Score(row.id, row.question_type, 0.0, None, f"no answer to read: {reply.problem}", False)
    return OPEN_SCORERS[kind](row, reply.answer)


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


def _score_choice(row: Prediction) -> Score:
    reply = read_reply(row.raw, row.choices)
    if row.gold not in row.choices:
        return Score(
            row.id, row.question_type, 0.0, None, f"the gold answer '{row.gold}' is not among the choices", False
        )
    gold = row.choices.index(row.gold)
    if reply.choice is None:
        return Score(row.id, row.question_type, 0.0, None, f"unresolved: {reply.problem}; gold '{row.gold}'", False)
    answer = row.choices[reply.choice]
    right = reply.choice == gold
    explanation = f"read as '{answer}' by {reply.how}; " + ("right" if right else f"gold '{row.gold}'")
    return Score(row.id, row.question_type, float(right), answer, explanation, True)


def read_distance(text: str) -> float | None:
    """The one distance in metres that `text` names ("2m", "1.5 m", "3 metres"), else None."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(?:m|metres?|meters?)\b", text.casefold())
    return float(found[0]) if len(found) == 1 else None


def read_directions(text: str) -> dict[str, str]:
    """Direction words by axis, ``{"left/right": "left", …}``; an axis named both ways is left out."""
    words = {SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", text.casefold())}
    return {"/".join(axis): word for axis in AXES for word in axis if word in words and len(words & set(axis)) == 1}


def read_labels(text: str) -> frozenset[str]:
    """The set of labels of a ``"; "`` list; a comma inside a label is part of it."""
    return frozenset(label for label in (normalise(part) for part in text.split(";")) if label)


def _is_directions_only(text: str) -> bool:
    words = re.findall(r"[a-z]+", text)
    known = {word for axis in AXES for word in axis} | set(SYNONYMS)
    return bool(words) and all(word in known for word in words)


def _score_labels(row: Prediction, answer: str) -> Score:
    said, gold = read_labels(answer), read_labels(row.gold)
    missing, extra = sorted(gold - said), sorted(said - gold)
    notes = [f"missing {', '.join(missing)}"] if missing else []
    notes += [f"wrong {', '.join(extra)}"] if extra else []
    text = "; ".join(notes) or "exactly the gold labels"
    return Score(row.id, row.question_type, float(said == gold), "; ".join(sorted(said)), text, bool(said))


def _score_yes_no(row: Prediction, answer: str) -> Score:
    words = set(re.findall(r"[a-z]+", answer.casefold())) & {"yes", "no"}
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


# ---------------------------------------------------------------------------------------------------------- tables


def chance_levels(rows: list[Prediction]) -> dict[tuple[str, str, float, int], float]:
    """What guessing reaches, per row: one over the number of choices; for an open question, what the best constant
    answer scores on the questions of its type in these rows, the most that is to be had without listening."""
    golds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if not row.choices:
            golds[row.question_type, answer_kind(row)][normalise(row.gold)] += 1
    best = {group: _best_constant(group[1], counts) for group, counts in golds.items()}
    return {row.key: 1 / len(row.choices) if row.choices else best[row.question_type, answer_kind(row)] for row in rows}


def _best_constant(kind: str, golds: Counter[str], candidates: int = 40) -> float:
    """Share that one and the same answer scores on `golds`; the most frequent ones are tried."""
    tried = [answer for answer, _ in golds.most_common(candidates)]
    return max(
        sum(count * _constant_score(kind, answer, gold) for gold, count in golds.items()) for answer in tried
    ) / (golds.total())


@lru_cache(maxsize=100_000)
def _constant_score(kind: str, answer: str, gold: str) -> float:
    return OPEN_SCORERS[kind](Prediction("", "", "", "", [], gold), answer).value


def summarise(rows: Iterable[Prediction], *, seed: int = 0) -> Cell:
    """Accuracy with its interval, chance, parse failures and errors of one group of rows of one pass.

    Several samples of an item count as one item with the mean of their values (mean@1), so n is a count of items.
    """
    rows = list(rows)
    scores = {row.key: score(row) for row in rows}
    answered = [row for row in rows if scores[row.key] is not None]
    chance = chance_levels(answered)
    kept = [found for found in scores.values() if found is not None]
    part_names = sorted({name for found in kept for name in found.parts})
    return Cell(
        accuracy=proportion(np.array(list(item_values(answered).values())), seed=seed),
        chance=float(np.mean(list(chance.values()))) if chance else math.nan,
        parse_failures=sum(not found.parsed for found in kept),
        errors=len(rows) - len(answered),
        parts={
            name: proportion(np.array([found.parts[name] for found in kept if name in found.parts]), seed=seed)
            for name in part_names
        },
        mean_completion_tokens=float(np.mean([row.completion_tokens for row in answered])) if answered else math.nan,
        truncated=sum(row.finish_reason == "length" for row in answered),
    )


def item_values(rows: Iterable[Prediction]) -> dict[str, float]:
    """Mean score per item id, in first-seen order, error rows left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found = score(row)
        if found is not None:
            values[row.id].append(found.value)
    return {item: float(np.mean(scores)) for item, scores in values.items()}


def by(rows: Iterable[Prediction], attribute: str, *, seed: int = 0) -> dict[str, Cell]:
    """:func:`summarise` per value of ``question_type``, ``format`` or a key of `meta`, most frequent first."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        name = getattr(row, attribute, None) or row.meta.get(attribute)
        groups[str(name) if name else "not stated"].append(row)
    return {name: summarise(group, seed=seed) for name, group in sorted(groups.items(), key=lambda pair: -len(pair[1]))}


def compare(first: Iterable[Prediction], second: Iterable[Prediction], *, seed: int = 0) -> Comparison:
    """Paired comparison of two passes on the items that both answered; clips are the resampled unit."""
    first, second = list(first), list(second)
    clips = {row.id: row.clip or row.id for row in first}
    left, right = item_values(first), item_values(second)
    common = [item for item in left if item in right]
    a, b = np.array([left[item] for item in common]), np.array([right[item] for item in common])
    clusters = np.array([clips[item] for item in common])
    difference = paired_difference(a, b, seed=seed, clusters=clusters if len(common) else None)
    binary = len(common) > 0 and np.isin(np.concatenate([a, b]), (0.0, 1.0)).all()
    return Comparison(difference, mcnemar(a > 0.5, b > 0.5) if binary else None)


@dataclass(frozen=True)
class Flips:
    """Of the items answered right with the true audio, how many followed the sound when the channels were swapped.

    `flipped`: the mirrored answer was given. `stuck`: the old answer was given again. The rest went elsewhere.
    """

    share: Estimate
    flipped: int
    stuck: int


def flips(greedy: Iterable[Prediction], swapped: Iterable[Prediction]) -> Flips:
    """The channel-swap control; the gold answer of a swapped row is already mirrored."""
    greedy = list(greedy)
    right_before = {item: value == 1.0 for item, value in item_values(greedy).items()}
    old_gold = {row.id: row.gold for row in greedy}
    rows = [row for row in swapped if right_before.get(row.id) and score(row) is not None]
    values = np.array([float((found := score(row)) is not None and found.value == 1.0) for row in rows])
    stuck = 0
    for row in rows:
        found = score(row)
        stuck += (
            found is not None and found.answer is not None and normalise(found.answer) == normalise(old_gold[row.id])
        )
    return Flips(proportion(values), int(values.sum()), stuck)
