"""Can a question be answered without listening? Simple text-only predictors, fitted on train, measured on test.

For choice questions three predictors pick a choice: the most frequent position; the choice text that was most often
right for the same question; a multinomial naive Bayes over the words of the choice and their pairs with the words of
the question. Open questions have the last two over whole answers. A predictor beats chance when the interval of its
accuracy lies above chance.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from audio_llm.shards.schema import Sample

# Some forty comparisons are made at once, and at 95 % two of them would cry wolf. The interval is the exact one: open
# questions expect a hit or two by chance, where Wilson's would flag one fair set in a hundred.
CONFIDENCE = 0.9973
MOST_ANSWERS = 200  # that naive Bayes chooses among, the commonest: of captions there are as many as sounds


@dataclass(frozen=True)
class Row:
    """One predictor on one type of question; `low` and `high` bound its accuracy (Clopper and Pearson's interval)."""

    question_type: str
    predictor: str
    items: int
    chance: float
    accuracy: float
    low: float
    high: float
    biased: bool

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


Predictor = Callable[[Sample], str]


def check(train: Iterable[Sample], test: Iterable[Sample], *, smallest: int = 50) -> list[Row]:
    """Rows for every type with at least `smallest` test items, in order of type and predictor. A type that is asked
    with choices and without them is two: what guessing reaches differs."""
    fitted, measured = _by_type(train), _by_type(test)
    rows = []
    for kind, choice in sorted(measured):
        items, examples = measured[kind, choice], fitted.get((kind, choice), [])
        if len(items) < smallest or not examples:
            continue
        name = f"{kind}, {'choices' if choice else 'open'}" if (kind, not choice) in measured else kind
        predictors = {"majority": _majority, "naive Bayes": _naive_bayes_choice if choice else _naive_bayes_open}
        if choice:
            predictors = {"position": _position, **predictors}
        chance = _chance(examples, items)
        for label, fit in predictors.items():
            predict = fit(examples)
            right = sum(predict(sample) == sample.answer for sample in items)
            low, high = _interval(right, len(items))
            rows.append(Row(name, label, len(items), chance, right / len(items), low, high, biased=low > chance))
    return rows


def _interval(right: int, items: int) -> tuple[float, float]:
    """Of Clopper and Pearson (1934), for a share. SciPy's ``binomtest`` gives it too, a second later."""
    from scipy.special import betaincinv

    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(right, items - right + 1, tail)) if right else 0.0
    return low, float(betaincinv(right + 1, items - right, 1 - tail)) if right < items else 1.0


def table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal."""
    if not rows:
        return "answered by words alone: not measured, fewer than 50 of a kind"
    lines = [f"{'type':<28} {'text only':<12} {'items':>6} {'chance':>7} {'accuracy':>9}  interval"]
    for row in rows:
        flag = "  ABOVE CHANCE" if row.biased else ""
        lines.append(
            f"{row.question_type:<28} {row.predictor:<12} {row.items:>6} {row.chance:>7.3f} {row.accuracy:>9.3f}"
            f"  {row.low:.3f}-{row.high:.3f}{flag}"
        )
    return "\n".join(lines)


def _by_type(samples: Iterable[Sample]) -> dict[tuple[str, bool], list[Sample]]:
    """By type of question, and by whether there are choices."""
    groups: dict[tuple[str, bool], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.meta["question_type"], bool(sample.choices)].append(sample)
    return groups


def _chance(examples: Sequence[Sample], items: Sequence[Sample]) -> float:
    """Mean of 1 / choices; for open questions one over the answers possible to the question's own template."""
    if items[0].choices:
        return sum(1 / len(sample.choices) for sample in items) / len(items)
    return 1 / len({sample.answer for sample in [*examples, *items]})


def _words(text: str | None) -> list[str]:
    return re.findall(r"[\w.]+", (text or "").lower())


def _position(examples: Sequence[Sample]) -> Predictor:
    places = Counter(sample.choices.index(sample.answer or "") for sample in examples)
    order = [place for place, _ in places.most_common()]
    return lambda sample: sample.choices[next((place for place in order if place < len(sample.choices)), 0)]


def _majority(examples: Sequence[Sample]) -> Predictor:
    """The answer most often right for this very question; unseen questions fall back on the whole type."""
    right: dict[str, Counter[str]] = defaultdict(Counter)
    offered: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in examples:
        for key in (sample.question or "", ""):
            right[key][sample.answer or ""] += 1
            offered[key].update(sample.choices or [sample.answer or ""])

    def predict(sample: Sample) -> str:
        key = sample.question if sample.question in right else ""
        assert key is not None
        if not sample.choices:
            return right[key].most_common(1)[0][0]
        return max(sample.choices, key=lambda choice: (right[key][choice] + 0.5) / (offered[key][choice] + 2))

    return predict


def _naive_bayes_choice(examples: Sequence[Sample]) -> Predictor:
    """Multinomial naive Bayes between right and wrong choices; the choice with the highest log odds wins."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for sample in examples:
        for choice in sample.choices:
            counts[choice == sample.answer].update(_features(sample, choice))
    totals = {side: sum(counter.values()) for side, counter in counts.items()}
    size = len(counts[True] | counts[False]) or 1

    def odds(sample: Sample, choice: str) -> float:
        return sum(
            math.log((counts[True][f] + 1) / (totals[True] + size))
            - math.log((counts[False][f] + 1) / (totals[False] + size))
            for f in _features(sample, choice)
        )

    return lambda sample: max(sample.choices, key=lambda choice: odds(sample, choice))


def _features(sample: Sample, choice: str) -> list[str]:
    mine = _words(choice)
    return [*mine, *(f"{asked}|{word}" for asked in _words(sample.question) for word in mine)]


def _naive_bayes_open(examples: Sequence[Sample]) -> Predictor:
    """Multinomial naive Bayes from the words of the question to the whole answer."""
    prior = Counter(sample.answer or "" for sample in examples)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in examples:
        counts[sample.answer or ""].update(_words(sample.question))
    size = len(set().union(*counts.values())) or 1
    totals = {answer: sum(counter.values()) for answer, counter in counts.items()}
    likely = [answer for answer, _ in prior.most_common(MOST_ANSWERS)]

    def score(answer: str, words: Sequence[str]) -> float:
        likelihood = sum(math.log((counts[answer][word] + 1) / (totals[answer] + size)) for word in words)
        return math.log(prior[answer]) + likelihood

    def predict(sample: Sample) -> str:
        words = _words(sample.question)
        return max(likely, key=lambda answer: score(answer, words))

    return predict
