"""Questions that are of no use fall out here by code alone, each for one reason of a closed list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from audio_llm.errors import ConfigError, describe
from data_prep.corpus import asked as asking
from data_prep.corpus import facts as known
from data_prep.corpus.asked import Asked, Rules, fault
from data_prep.corpus.questions import NO_QUESTIONS, Dropped, Sifting
from data_prep.corpus.stage import Item


@dataclass
class Verify(Sifting):
    """Checks each question of an item (:mod:`data_prep.corpus.asked` has the reasons) and gives its options an order by
    the seed, so that over a corpus each place holds the answer as often. What passes is asked of models afterwards:
    ``answerable``, ``helps`` and ``judge``."""

    name: ClassVar[str] = "verify"
    version: ClassVar[int] = 3
    needs = ("questions", "facts")
    reasons = (*asking.REASONS, NO_QUESTIONS)

    options: int = 2  # the fewest options of a question that has some
    stands_out: float = 3.0  # how many times longer or shorter than all others the answer may not be
    question_words: int = 60  # the most words of a question
    answer_words: int = 50  # the most words of an answer
    thinking_words: tuple[int, int] = (5, 400)  # the fewest and the most words of thinking
    elements: Literal["any", "known", "nine"] = "known"  # what groups of semantic elements there have to be
    evidence: bool = True  # whether facts have to be named
    visual: bool = True  # whether words of what is seen are refused, unless they are heard
    banned: list[str] = field(default_factory=list)  # phrases that no text may have, beside the usual ones
    shuffle: bool = True  # whether the options get a new order
    seed: int = 0  # of that order

    def check(self) -> None:
        for key, least in (("options", 2), ("stands_out", 1), ("question_words", 1), ("answer_words", 1)):
            if getattr(self, key) < least:
                raise ConfigError(describe(f"verify.{key}", f"{least} or more", f"{getattr(self, key):g}"))
        if not 0 <= self.thinking_words[0] <= self.thinking_words[1]:
            raise ConfigError(describe("verify.thinking_words", "the fewest and the most", f"{self.thinking_words}"))
        if not all(phrase.strip() for phrase in self.banned):
            raise ConfigError(describe("verify.banned", "phrases", f"{self.banned}"))

    @property
    def rules(self) -> Rules:
        """What it asks of a question. A stage before it that has questions worded asks the same of each wording."""
        return Rules(
            *(self.options, self.stands_out, self.question_words, self.answer_words, self.thinking_words),
            *(self.elements, self.evidence, tuple(self.banned), self.visual),
        )

    def sift(self, pairs: Sequence[tuple[Item, Mapping[str, Any]]]) -> list[Mapping[str, Any] | Dropped]:
        return [self._one(item, question) for item, question in pairs]

    def _one(self, item: Item, question: Mapping[str, Any]) -> Mapping[str, Any] | Dropped:
        reason, detail = fault(question, self.rules, known.read(item.fields.get("facts")))
        if reason:
            return Dropped(reason, detail)
        asked = Asked.read(question)
        assert isinstance(asked, Asked)
        if self.shuffle:
            asked = asking.shuffled(asked, self.seed, item.id, asked.question)
        return {**question, "choices": asked.choices, "answer": asked.answer}


STAGE = Verify
