"""Beam search over an engine that gives the likeliest next tokens: the rule of Transformers' ``generate``.

Of all continuations of the running beams the likeliest are kept; one that ends counts if it is among the first `width`,
by its mean log-probability a token (a length penalty of 1). The search ends when `width` have ended and the best
running one, at its mean so far, is no better than the worst of them (``early_stopping=False``). vLLM's own search
divides by the prompt's length as well and never stops early, so that it gives other replies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

MAX_BEAMS = 16
Candidates = Sequence[tuple[int, float]]  # ids of next tokens and their log-probabilities, the likeliest first


@dataclass(frozen=True)
class Beam:
    """The tokens of a reply so far, and the sum of their log-probabilities."""

    ids: tuple[int, ...] = ()
    score: float = 0.0


@dataclass
class Search:
    """One prompt's search for a reply of at most `max_tokens`; `ends` are the ids that end one."""

    width: int
    ends: Collection[int]
    max_tokens: int
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[tuple[float, Beam]] = field(default_factory=list)  # by mean log-probability, the best first

    @property
    def keep(self) -> int:
        """How many candidates a running beam has to have: so many that, whatever ends, `width` go on."""
        return keep(self.width, len(self.ends))

    @property
    def done(self) -> bool:
        if not self.running:
            return True
        best = self.running[0].score / max(1, len(self.running[0].ids))
        return len(self.ended) == self.width and best <= self.ended[-1][0]

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """One token more, by the `candidates` of every running beam."""
        found = [
            Beam((*beam.ids, token), beam.score + logprob)
            for beam, following in zip(self.running, candidates, strict=True)
            for token, logprob in following
        ]
        found = sorted(found, key=lambda beam: -beam.score)[: self.keep]
        over = [beam.ids[-1] in self.ends or len(beam.ids) >= self.max_tokens for beam in found]
        self.running = [beam for beam, ends in zip(found, over, strict=True) if not ends][: self.width]
        first = zip(found[: self.width], over, strict=False)
        self.ended += [(beam.score / len(beam.ids), beam) for beam, ends in first if ends]
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[: self.width]

    @property
    def best(self) -> tuple[int, ...]:
        """The ids of the reply, the one that ends it included."""
        return self.ended[0][1].ids if self.ended else self.running[0].ids


def keep(width: int, ends: int) -> int:
    """The candidates that a search with so many beams and ids that end a reply asks for."""
    return max(2, 1 + ends) * width
