"""DCASE 2025 task 5 (Yang et al. 2025): top-1 accuracy by part; the ranking goes by the mean of the three parts.

A lone letter, an option's text, or both in agreement are an answer; anything else is none, and wrong. Nothing like an
option counts as that option.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from audio_llm.datasets.dcase_aqa import PARTS
from eval.figures.estimates import Estimate, mean_of, proportion
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, choice_score, unscored


def chosen(row: Prediction) -> tuple[int | None, str]:
    """Index of the option that a reply answers with, and how it was read or why there is none."""
    reply = row.reply()
    if reply.choice is None:
        return None, reply.problem or "no answer"
    if reply.how == "mention":  # an option inside other words: more than the published protocol grants
        return None, f"'{row.choices[reply.choice]}' only mentioned"
    return reply.choice, f"by {reply.how}"


class DcaseAqa:
    """Value of a row: 1 where the chosen option is the right one. ``meta["part"]`` is 1, 2 or 3."""

    name = "dcase-aqa"
    version = "2"
    title = "DCASE 2025 task 5"
    ranked_by = "domain average (mean of parts)"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices or row.gold not in row.choices:
            return None
        return choice_score(row, *chosen(row))

    def aggregate(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, float]:
        """Accuracy by part with counts, their unweighted mean (``domain average``), the mean over all questions, and
        accuracy by question type."""
        parts: dict[int, list[float]] = defaultdict(list)
        types: dict[str, list[float]] = defaultdict(list)
        for row, score in zip(rows, scores, strict=True):
            parts[int(row.meta.get("part") or 0)].append(score.value)
            types[row.question_type].append(score.value)
        figures: dict[str, float] = {}
        if parts:
            figures[self.ranked_by] = float(np.mean([np.mean(parts[part]) for part in parts]))
            figures["weighted by questions"] = float(np.mean([value for values in parts.values() for value in values]))
        for part in sorted(parts):
            name = f"part {part} ({PARTS[part]})" if part in PARTS else "part not stated"
            figures |= {name: float(np.mean(parts[part])), f"{name}: questions": len(parts[part])}
        for name in sorted(types):
            figures |= {f"type {name}": float(np.mean(types[name])), f"type {name}: questions": len(types[name])}
        return figures

    def intervals(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, Estimate]:
        """Of the domain average: the parts' own intervals, over clusters, put together."""
        parts: dict[int, list[tuple[float, str]]] = defaultdict(list)
        for row, score in zip(rows, scores, strict=True):
            parts[int(row.meta.get("part") or 0)].append((score.value, row.cluster))
        found = [
            proportion(np.array([value for value, _ in pairs]), np.array([cluster for _, cluster in pairs]))
            for _, pairs in sorted(parts.items())
        ]
        return {self.ranked_by: mean_of(found)} if found else {}


SCORERS: tuple[Scorer, ...] = (DcaseAqa(),)
