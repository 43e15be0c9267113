"""Stages that look at the questions of an item one by one: some fall out, and an item without any is a reject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from data_prep.corpus.stage import Item, Reject, Step

NO_QUESTIONS = "no_questions"


class Dropped(NamedTuple):
    """A question that goes no further."""

    reason: str
    detail: str


class Sifting(Step):
    """Gives ``questions``, those that are left, and ``NAME_dropped``, how many fell out for which reason.

    A child says what becomes of each question, with more or other fields in it; an item of which nothing is left is a
    reject for the reason of its first question.
    """

    name: ClassVar[str]
    needs: tuple[str, ...] = ("questions",)

    @property
    def gives(self) -> tuple[str, ...]:
        return "questions", f"{self.name}_dropped"

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        asked = [list(item.fields.get("questions") or ()) for item in items]
        pairs = [(item, question) for item, questions in zip(items, asked, strict=True) for question in questions]
        results = iter(self.sift(pairs))
        return [
            self._left(item, [next(results) for _ in questions]) for item, questions in zip(items, asked, strict=True)
        ]

    def sift(self, pairs: Sequence[tuple[Item, Mapping[str, Any]]]) -> list[Mapping[str, Any] | Dropped]:
        """One result a question, in order: the question, or why it goes no further."""
        raise NotImplementedError

    def _left(self, item: Item, results: Sequence[Mapping[str, Any] | Dropped]) -> Item | Reject:
        kept = [dict(one) for one in results if not isinstance(one, Dropped)]
        dropped = [one for one in results if isinstance(one, Dropped)]
        if not kept:
            return Reject(item.id, *(dropped[0] if dropped else Dropped(NO_QUESTIONS, "it carries none")))
        counts = Counter(one.reason for one in dropped)
        return item.adding(**{"questions": kept, f"{self.name}_dropped": dict(sorted(counts.items()))})
