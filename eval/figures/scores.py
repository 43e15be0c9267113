"""From the scores of a pass to a table: accuracy with its interval, chance, parse failures, and paired comparisons."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from audio_llm.language.replies import normalise
from eval.figures.estimates import Estimate, McNemar, mcnemar, paired_difference, proportion
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer
from eval.scorers.choice import OptionResolution
from eval.scorers.open_answers import OPEN_SCORERS, answer_kind
from eval.scorers.spatial_sound_qa import SpatialSoundQA

HEADLINE: Scorer = OptionResolution()  # where a benchmark names no other
OPEN_RULE = (HEADLINE.name, SpatialSoundQA.name)  # open questions have the value of `open_answers.score_open`


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


# ---------------------------------------------------------------------------------------------------------- tables


def chance_levels(rows: list[Prediction], scorer: Scorer = HEADLINE) -> dict[tuple[str, str, float, int], float]:
    """What guessing reaches, per row: one over the number of choices; for an open question, what the best constant
    answer scores on the questions of its type in these rows, the most that is to be had without listening (NaN under
    a scorer other than the default one: no constant answer was tried there)."""
    golds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if not row.choices and scorer.name in OPEN_RULE:
            golds[row.question_type, answer_kind(row)][normalise(row.gold)] += 1
    best = {group: _best_constant(group[1], counts) for group, counts in golds.items()}
    return {
        row.key: 1 / len(row.choices) if row.choices else best.get((row.question_type, answer_kind(row)), math.nan)
        for row in rows
    }


def _best_constant(kind: str, golds: Counter[str], candidates: int = 40) -> float:
    """Share that one and the same answer scores on `golds`; the most frequent ones are tried."""
    tried = [answer for answer, _ in golds.most_common(candidates)]
    return max(
        sum(count * _constant_score(kind, answer, gold) for gold, count in golds.items()) for answer in tried
    ) / (golds.total())


@lru_cache(maxsize=100_000)
def _constant_score(kind: str, answer: str, gold: str) -> float:
    return OPEN_SCORERS[kind](Prediction("", "", "", "", [], gold), answer).value


def summarise(rows: Iterable[Prediction], *, seed: int = 0, scorer: Scorer = HEADLINE) -> Cell:
    """Accuracy with its interval, chance, parse failures and errors of one group of rows of one pass.

    Several samples of an item count as one item with the mean of their values (mean@1), so n is a count of items.
    Questions about one clip are not independent: clips are the unit of the interval (:func:`proportion`).
    """
    rows = list(rows)
    pairs = [(row, scorer.score(row)) for row in rows]
    answered = [row for row, found in pairs if found is not None]
    kept = [found for _, found in pairs if found is not None]
    chance = chance_levels(answered, scorer)
    clips = {row.id: row.clip or row.id for row in answered}
    values = _means(kept)
    parts: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for found in kept:
        for name, value in found.parts.items():
            parts[name].append((value, clips[found.id]))
    return Cell(
        accuracy=_proportion(((value, clips[item]) for item, value in values.items()), seed),
        chance=float(np.mean(list(chance.values()))) if chance else math.nan,
        parse_failures=sum(not found.parsed for found in kept),
        errors=sum(bool(row.error) for row in rows),
        parts={name: _proportion(parts[name], seed) for name in sorted(parts)},
        mean_completion_tokens=float(np.mean([row.completion_tokens for row in answered])) if answered else math.nan,
        truncated=sum(row.finish_reason == "length" for row in answered),
    )


def _proportion(pairs: Iterable[tuple[float, str]], seed: int) -> Estimate:
    """The mean of values, each with the clip that it is about."""
    pairs = list(pairs)
    return proportion(
        np.array([value for value, _ in pairs]), seed=seed, clusters=np.array([clip for _, clip in pairs])
    )


def item_values(rows: Iterable[Prediction], scorer: Scorer = HEADLINE) -> dict[str, float]:
    """Mean score per item id, in first-seen order, rows that the scorer does not apply to left out."""
    return _means(found for row in rows if (found := scorer.score(row)) is not None)


def _means(scores: Iterable[Score]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for found in scores:
        values[found.id].append(found.value)
    return {item: float(np.mean(entries)) for item, entries in values.items()}


def by(rows: Iterable[Prediction], attribute: str, *, seed: int = 0, scorer: Scorer = HEADLINE) -> dict[str, Cell]:
    """:func:`summarise` per value of ``question_type``, ``format`` or a key of `meta`, most frequent first."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        name = getattr(row, attribute, None) or row.meta.get(attribute)
        groups[str(name) if name else "not stated"].append(row)
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return {name: summarise(group, seed=seed, scorer=scorer) for name, group in ordered}


def compare(
    first: Iterable[Prediction], second: Iterable[Prediction], *, seed: int = 0, scorer: Scorer = HEADLINE
) -> Comparison:
    """Paired comparison of two passes on the items that both answered; clips are the resampled unit."""
    first, second = list(first), list(second)
    clips = {row.id: row.clip or row.id for row in first}
    left, right = item_values(first, scorer), item_values(second, scorer)
    common = [item for item in left if item in right]
    a, b = np.array([left[item] for item in common]), np.array([right[item] for item in common])
    clusters = np.array([clips[item] for item in common])
    difference = paired_difference(a, b, seed=seed, clusters=clusters if len(common) else None)
    binary = len(common) > 0 and np.isin(np.concatenate([a, b]), (0.0, 1.0)).all()
    return Comparison(difference, mcnemar(a > 0.5, b > 0.5) if binary else None)


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


def permutations(
    rows: Iterable[Prediction], *, own: Iterable[Prediction] = (), seed: int = 0, scorer: Scorer = HEADLINE
) -> Permutations | None:
    """The control ``shuffled_options``, and the `own` answers to the same questions; None where no row is scored."""
    scores: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, set[str | None]] = defaultdict(set)
    clips: dict[str, str] = {}
    for row in rows:
        found = scorer.score(row)
        if found is not None:
            scores[row.id].append(found.value)
            answers[row.id].add(found.answer)
            clips[row.id] = row.clip or row.id
    for row in own:
        if row.id in scores and row.sample == 0 and (found := scorer.score(row)) is not None:
            answers[row.id].add(found.answer)
    if not scores:
        return None
    k = max(map(len, scores.values()))
    # Two options have one other order, three have five: a question with fewer than k goes round those it has, so that
    # every order is a mean over the same questions.
    orders = [np.array([values[order % len(values)] for values in scores.values()]) for order in range(k)]
    worst: np.ndarray = min(orders, key=np.mean)

    def over_questions(values: Iterable[float]) -> Estimate:
        return _proportion(zip(values, clips.values(), strict=True), seed)

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


def flips(greedy: Iterable[Prediction], swapped: Iterable[Prediction], *, scorer: Scorer = HEADLINE) -> Flips:
    """The channel-swap control; the gold answer of a swapped row is already mirrored."""
    greedy = list(greedy)
    right_before = {item: value == 1.0 for item, value in item_values(greedy, scorer).items()}
    old_gold = {row.id: normalise(row.gold) for row in greedy}
    scores = [found for row in swapped if right_before.get(row.id) and (found := scorer.score(row)) is not None]
    clips = {row.id: row.clip or row.id for row in greedy}
    followed = [(float(found.value == 1.0), clips[found.id]) for found in scores]
    stuck = sum(found.answer is not None and normalise(found.answer) == old_gold[found.id] for found in scores)
    return Flips(_proportion(followed, 0), int(sum(value for value, _ in followed)), stuck)
