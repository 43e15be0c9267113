"""From replies to figures. :func:`score_rows` scores each reply once; everything else here is a function of such scored
replies: accuracy with its interval, chance, parse failures, paired comparisons, orders of options, swapped channels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_llm.language.replies import normalise
from eval.figures.estimates import Comparison, Estimate, paired, proportion
from eval.predictions import KINDS, Prediction
from eval.scorers.base import Asking, Score, Scorer
from eval.scorers.choice import OptionResolution
from eval.scorers.mmar_rubrics import MMARRubrics
from eval.scorers.open_answers import answer_kind, compared
from eval.scorers.spatial_sound_qa import SpatialSoundQA

# Scorers that give an open question the value of `open_answers.score_open`.
OPEN_RULE = (OptionResolution.name, SpatialSoundQA.name)
# Scorers under which drawing an option reaches less than one over the choices: nobody knows how much.
UNGUESSED = (MMARRubrics.name,)


@dataclass(frozen=True, slots=True)
class Scored:
    """A reply and what the scorer of that name makes of it: None where it does not apply, or where whoever it asks had
    no rating to give (`problem`)."""

    row: Prediction
    score: Score | None
    scorer: str
    problem: str = ""


def score_rows(rows: Sequence[Prediction], scorer: Scorer) -> list[Scored]:
    """Every row with its score, in order; a scorer that asks somebody else asks about all rows together."""
    if not isinstance(scorer, Asking):
        return [Scored(row, scorer.score(row), scorer.name) for row in rows]
    scorer.prepare(rows)
    found = [(row, scorer.score(row)) for row in rows]
    return [
        Scored(row, score, scorer.name, scorer.problems.get(row.key, "") if score is None else "")
        for row, score in found
    ]


@dataclass(frozen=True)
class Cell:
    """One group of score rows. `chance` is what guessing reaches; `parse_failures` are among its `replies`, several
    samples of an item included, and `unread` is their share; `errors` are items left out of `accuracy.n`."""

    accuracy: Estimate
    chance: float
    replies: int
    parse_failures: int
    unread: Estimate
    errors: int
    parts: dict[str, Estimate]
    mean_completion_tokens: float
    truncated: int


# ---------------------------------------------------------------------------------------------------------- tables


def chance_levels(scored: Iterable[Scored]) -> dict[tuple[str, str, float, int], float]:
    """What guessing reaches, per row: the share of its choices that are the right one, so one over their number where
    none repeats; for an open question, what the best constant answer scores on the questions of its type in these
    rows, the most that is to be had without listening (NaN under a scorer outside ``OPEN_RULE``: no constant answer
    was tried there; NaN too under one of ``UNGUESSED``)."""
    scored = list(scored)
    golds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entry in scored:
        row = entry.row
        if not row.choices and entry.scorer in OPEN_RULE:
            golds[row.question_type, answer_kind(row)][normalise(row.gold)] += 1
    best = {group: _best_constant(group[1], counts) for group, counts in golds.items()}
    if scored and scored[0].scorer in UNGUESSED:
        return {entry.row.key: math.nan for entry in scored}
    return {
        row.key: max(1, row.choices.count(row.gold)) / len(row.choices)
        if row.choices
        else best.get((row.question_type, answer_kind(row)), math.nan)
        for row in (entry.row for entry in scored)
    }


def _best_constant(kind: str, golds: Counter[str], candidates: int = 40) -> float:
    """Share that one and the same answer scores on `golds`; the most frequent ones are tried."""
    tried = [answer for answer, _ in golds.most_common(candidates)]
    return max(sum(count * compared(kind, gold, answer).value for gold, count in golds.items()) for answer in tried) / (
        golds.total()
    )


def summarise(scored: Iterable[Scored]) -> Cell:
    """Accuracy with its interval, chance, parse failures and errors of one group of replies of one pass.

    Several samples of an item count as one item with the mean of their values (mean@1), so n is a count of items;
    intervals are over clusters of them (:attr:`Prediction.cluster`).
    """
    scored = list(scored)
    kept = [(entry, entry.score) for entry in scored if entry.score is not None]
    answered = [entry.row for entry, _ in kept]
    chance = chance_levels(entry for entry, _ in kept)
    clusters = _clusters(scored)
    parts: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for entry, found in kept:
        for name, value in found.parts.items():
            parts[name].append((entry.row.id, value))
    return Cell(
        accuracy=_proportion(item_values(scored), clusters),
        chance=float(np.mean(list(chance.values()))) if chance else math.nan,
        replies=len(kept),
        parse_failures=sum(not found.parsed for _, found in kept),
        unread=_proportion(_by_item((entry.row.id, float(not found.parsed)) for entry, found in kept), clusters),
        errors=sum(bool(entry.row.error) for entry in scored),
        parts={name: _proportion(_by_item(parts[name]), clusters) for name in sorted(parts)},
        mean_completion_tokens=float(np.mean([row.completion_tokens for row in answered])) if answered else math.nan,
        truncated=sum(row.finish_reason == "length" for row in answered),
    )


def _clusters(scored: Iterable[Scored]) -> dict[str, int]:
    """The cluster of every item, by its place among their sorted names: names are sorted once, not for each figure."""
    names = {entry.row.id: entry.row.cluster for entry in scored}
    places = {name: place for place, name in enumerate(sorted(set(names.values())))}
    return {item: places[name] for item, name in names.items()}


def _proportion(values: Mapping[str, float], clusters: Mapping[str, int]) -> Estimate:
    """The mean of values by item."""
    return proportion(np.array(list(values.values())), np.array([clusters[item] for item in values]))


def _by_item(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each item's values, in first-seen order."""
    pairs = [*values]
    found = dict(pairs)
    if len(found) == len(pairs):  # one reply an item
        return found
    several: dict[str, list[float]] = {item: [] for item in found}
    for item, value in pairs:
        several[item].append(value)
    return {item: float(np.mean(entries)) for item, entries in several.items()}


def item_values(scored: Iterable[Scored]) -> dict[str, float]:
    """Mean score per item id, in first-seen order, rows that the scorer does not apply to left out."""
    return _by_item((entry.row.id, entry.score.value) for entry in scored if entry.score is not None)


def grouped(scored: Iterable[Scored], attribute: str) -> dict[str, list[Scored]]:
    """Replies per value of ``question_type``, ``format``, a key of `meta` or another field, most frequent first."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for entry in scored:
        name = group_of(entry.row, attribute)
        groups["not stated" if name in (None, "") else str(name)].append(entry)
    return dict(sorted(groups.items(), key=lambda pair: -len(pair[1])))


def group_of(row: Prediction, attribute: str) -> Any:
    """What `row` has under a name: benchmarks' own keys (`meta`) come before our fields, but for the two that all rows
    are filed under. None where there is nothing."""
    if attribute in ("question_type", "format") or attribute not in row.meta:
        return getattr(row, attribute) if attribute in KINDS else None
    return row.meta[attribute]


def by(scored: Iterable[Scored], attribute: str) -> dict[str, Cell]:
    """:func:`summarise` of every one of the :func:`grouped` replies."""
    return {name: summarise(group) for name, group in grouped(scored, attribute).items()}


def compare(first: Iterable[Scored], second: Iterable[Scored]) -> Comparison:
    """Paired comparison of two passes on the items that both answered, over clusters of them."""
    first, second = list(first), list(second)
    clusters, left, right = _clusters(first), item_values(first), item_values(second)
    common = [item for item in left if item in right]
    return paired(
        np.array([left[item] for item in common]),
        np.array([right[item] for item in common]),
        np.array([clusters[item] for item in common]),
    )


@dataclass(frozen=True)
class Permutations:
    """Answers with the options in `k` other orders: the mean over orders and the standard deviation of the orders'
    accuracies, the worst order, the share of questions answered right in every one of these orders (`all_k`), and of
    those answered with one and the same option in all of them and in their own (`consistency`, right or wrong; an
    answer that cannot be read is no option)."""

    k: int
    mean: Estimate
    std: float
    worst: Estimate
    all_k: Estimate
    consistency: Estimate


def permutations(shuffled: Iterable[Scored], *, own: Iterable[Scored] = ()) -> Permutations | None:
    """Of the control ``shuffled_options`` and the `own` answers to the same questions; None where none is scored."""
    scores: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, set[str | None]] = defaultdict(set)
    shuffled = list(shuffled)
    for entry in shuffled:
        if entry.score is not None:
            scores[entry.row.id].append(entry.score.value)
            answers[entry.row.id].add(entry.score.answer)
    for entry in own:
        if entry.row.id in scores and entry.row.sample == 0 and entry.score is not None:
            answers[entry.row.id].add(entry.score.answer)
    if not scores:
        return None
    k = max(map(len, scores.values()))
    # Two options have one other order, three have five: a question with fewer than k goes round those it has, so that
    # every order is a mean over the same questions.
    orders = [np.array([values[order % len(values)] for values in scores.values()]) for order in range(k)]
    worst: np.ndarray = min(orders, key=np.mean)

    clusters = _clusters(shuffled)

    def over_questions(values: Iterable[float]) -> Estimate:
        return _proportion(dict(zip(scores, values, strict=True)), clusters)

    return Permutations(
        k=k,
        mean=over_questions(float(np.mean(values)) for values in scores.values()),
        std=float(np.std([order.mean() for order in orders])),
        worst=over_questions(worst),
        all_k=over_questions(min(values) for values in scores.values()),
        consistency=over_questions(float(len(said) == 1 and None not in said) for said in answers.values()),
    )


@dataclass(frozen=True)
class Flips:
    """Of the items answered right with the true audio, how many followed the sound when the channels were swapped.

    `flipped`: the mirrored answer was given. `stuck`: the old answer was given again. The rest went elsewhere.
    """

    share: Estimate
    flipped: int
    stuck: int


def flips(greedy: Iterable[Scored], swapped: Iterable[Scored]) -> Flips:
    """The channel-swap control; the gold answer of a swapped row is already mirrored."""
    greedy = list(greedy)
    right_before = {item for item, value in item_values(greedy).items() if value == 1.0}
    old_gold = {entry.row.id: normalise(entry.row.gold) for entry in greedy}
    scores = [entry.score for entry in swapped if entry.row.id in right_before and entry.score is not None]
    followed = {found.id: float(found.value == 1.0) for found in scores}
    stuck = sum(found.answer is not None and normalise(found.answer) == old_gold[found.id] for found in scores)
    return Flips(_proportion(followed, _clusters(greedy)), int(sum(followed.values())), stuck)
