"""What a scorer is: a pure function from one stored prediction to a score a person can read.

A file of this folder offers its scorers as ``SCORERS = (<instance>, …)``, where ``eval.scorers`` finds them by name;
any other is named as ``package.module:NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from eval.figures.estimates import Estimate
from eval.predictions import Prediction


@dataclass(frozen=True, slots=True)
class Score:
    """One row a person can read. `parsed` is False where no answer could be read; such a row is wrong.

    `value` is between 0 and 1. `parts` holds what a composite answer is made of (direction axes, distance).
    """

    id: str
    question_type: str
    value: float
    answer: str | None
    explanation: str
    parsed: bool
    parts: dict[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """`version` changes whenever any score can; both names are stored beside every figure."""

    name: str
    version: str
    title: str

    def score(self, row: Prediction) -> Score | None:
        """The score of `row`; None where the scorer does not apply to it (an error row, a hidden gold answer, …)."""
        ...


@runtime_checkable
class Aggregating(Protocol):
    """A scorer with figures beyond the mean of its rows (F1 over labels, macro averages, balance)."""

    def aggregate(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, float]:
        """Figures by name, of rows of one pass and their scores, side by side."""
        ...


@runtime_checkable
class Bounding(Protocol):
    """An aggregating scorer that has intervals of some of its figures, by their names. `ranked_by` is the figure that
    the benchmark ranks systems by, "" where that is the mean of the rows."""

    ranked_by: str

    def intervals(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, Estimate]: ...


@runtime_checkable
class Configurable(Protocol):
    """A scorer that needs something from outside (an endpoint, a text embedder): ``--with NAME.KEY=VALUE``."""

    def configured(self, options: Mapping[str, str]) -> Scorer:
        """A scorer with these settings. Raises :class:`ConfigError` for a setting that it does not know."""
        ...


@runtime_checkable
class Asking(Protocol):
    """A scorer that asks somebody else (a judge). `prepare` gets all rows before they are scored, so that it can ask
    many at a time; afterwards `problems` tells, by the row's key, why a row that it applies to has no score."""

    problems: dict[tuple[str, str, float, int], str]

    def prepare(self, rows: Sequence[Prediction]) -> None: ...


@runtime_checkable
class Checking(Protocol):
    """A scorer of questions that have no right answer, but something that a reply to them has to hold to."""

    def uncheckable(self, meta: Mapping[str, Any]) -> str:
        """What keeps a question with this `meta` from being checked, in a few words; "" for nothing."""
        ...


def unscored(row: Prediction) -> bool:
    """Whether there is nothing to score: an error instead of an answer, or a gold answer that is not public."""
    return bool(row.error) or not row.gold


def choice_score(row: Prediction, choice: int | None, how: str) -> Score:
    """The score of an answer with option `choice` (None: with none); `how` tells how it was read, or why it was not."""
    if choice is None:
        return Score(row.id, row.question_type, 0.0, None, f"unresolved: {how}; gold '{row.gold}'", False)
    answer = row.choices[choice]
    right = answer == row.gold
    explanation = f"read as '{answer}' {how}; " + ("right" if right else f"gold '{row.gold}'")
    return Score(row.id, row.question_type, float(right), answer, explanation, True)
