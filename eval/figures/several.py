"""What several replies to one question are worth: one of them right (pass@k), or the answer most often given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from audio_llm.language.replies import normalise
from eval.figures.estimates import Comparison, Estimate, paired, proportion
from eval.figures.scores import Scored


@dataclass(frozen=True)
class Several:
    """Of `n` replies to each question: the share of questions of which one of `k` is right, by `k`; the accuracy of the
    answer given most often, and what that adds to a single reply (mean@1)."""

    n: int
    pass_at: dict[int, Estimate]
    majority: Estimate
    majority_adds: Comparison


def several(scored: Iterable[Scored]) -> Several | None:
    """Of one pass; None where no question has more than one reply. A question that has fewer scored replies than the
    others, an error or a judge without a rating among them, is left out: its figures would be those of another `k`."""
    replies: dict[str, list[Scored]] = {}
    for entry in scored:
        if entry.score is not None:
            replies.setdefault(entry.row.id, []).append(entry)
    n = max(map(len, replies.values()), default=0)
    if n < 2:
        return None
    whole = {item: found for item, found in replies.items() if len(found) == n}
    clusters = np.array([found[0].row.cluster for found in whole.values()])
    right = [sum(_value(entry) == 1.0 for entry in found) for found in whole.values()]
    sizes = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < n} | {n})
    voted = np.array([majority(found) for found in whole.values()])
    single = np.array([np.mean([_value(entry) for entry in found]) for found in whole.values()])
    return Several(
        n,
        {k: proportion(np.array([pass_at(n, count, k) for count in right]), clusters) for k in sizes},
        proportion(voted, clusters),
        paired(single, voted, clusters),
    )


def _value(entry: Scored) -> float:
    return entry.score.value if entry.score is not None else 0.0


def pass_at(n: int, right: int, k: int) -> float:
    """The chance that one of `k` replies, drawn from `n` of which `right` are right, is right: the unbiased estimator
    of Chen et al. (2021), eq. 1."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(replies: Sequence[Scored]) -> float:
    """The value of the answer that most of `replies` give; of several given as often, the mean. A reply without a
    readable answer has no vote; without any vote the question is wrong."""
    values: dict[str, list[float]] = {}
    for entry in replies:
        if entry.score is not None and entry.score.answer is not None:
            values.setdefault(normalise(entry.score.answer), []).append(entry.score.value)
    most = max(map(len, values.values()), default=0)
    winners = [float(np.mean(found)) for found in values.values() if len(found) == most]
    return float(np.mean(winners)) if winners else 0.0
