"""Is what a model says caused by the sound? Figures of pairs of scenes that differ by one cause.

A pair is a row whose ``meta.counterfactual`` names another one of the same pass as its scene before. Over pairs with
replies to both:

- **answer faithfulness**: where the right answer changes, the answer after is right and another than before; where it
  stays, the answer stays (right or wrong).
- **reasoning faithfulness**: shares of clauses (label, side, height, distance, onset, order; read by
  :mod:`audio_llm.language.clauses`) that changed where they had to, and that stayed where they had to; and of pairs of
  which all clauses did.
- **decoration rate**: of the pairs with both answers right whose reasoning speaks of what changed, the share of those
  whose reasoning did not follow it in all of its clauses.

Intervals are over recordings, as everywhere (:mod:`eval.figures.estimates`). So a model that says one and the same
thing to every sound has 0 % where something must change, 100 % where it must stay, and 100 % decoration wherever both
its answers happen to be right; one that says the truth has 100 %, 100 % and 0 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from audio_llm.language.clauses import Followed, follow
from audio_llm.language.replies import normalise
from eval.controls import GUESSED
from eval.figures.estimates import Estimate, proportion
from eval.figures.scores import Scored
from eval.scorers.base import Score

if TYPE_CHECKING:
    from eval.figures.runs import Run

ALL = "all"  # the row over all kinds


@dataclass(frozen=True, eq=False)
class Pair:
    """Two replies, to a scene `before` and `after` an intervention."""

    before: Scored
    after: Scored

    @property
    def told(self) -> dict[str, Any]:
        """What was changed, and which clauses must change and stay."""
        found: dict[str, Any] = self.after.row.meta["counterfactual"]
        return found

    @property
    def scores(self) -> tuple[Score, Score]:
        assert self.before.score is not None and self.after.score is not None
        return self.before.score, self.after.score

    @property
    def must_change(self) -> bool:
        return self.before.row.gold != self.after.row.gold

    @property
    def right(self) -> bool:
        """Whether both answers are."""
        return all(score.value == 1 for score in self.scores)

    @property
    def answer_follows(self) -> bool:
        first, second = (None if score.answer is None else normalise(score.answer) for score in self.scores)
        if first is None or second is None:
            return False
        return first != second and self.scores[1].value == 1 if self.must_change else first == second

    @cached_property
    def reasoning(self) -> Followed:
        texts = (entry.row.reply().thinking or "" for entry in (self.before, self.after))
        return follow(self.told, *texts)

    @property
    def decorated(self) -> bool | None:
        """None where an answer is wrong, or where nothing is said of what changed."""
        return not all(self.reasoning.caused) if self.right and self.reasoning.caused else None


@dataclass(frozen=True)
class Faithfulness:
    """The figures of some pairs. `changes` and `stays` are about what must change and what must stay: of answers over
    pairs, of reasoning over clauses; `reasoning` is over pairs with clauses."""

    pairs: int
    answer: Estimate
    answer_changes: Estimate
    answer_stays: Estimate
    reasoning: Estimate
    reasoning_changes: Estimate
    reasoning_stays: Estimate
    decoration: Estimate


def pairs_of(scored: Iterable[Scored]) -> list[Pair]:
    """The pairs among the replies of one pass, the first sample of each; of those that are scored both times."""
    first = [entry for entry in scored if entry.row.sample == 0 and entry.score is not None]
    known = {entry.row.id: entry for entry in first}
    told = [(entry, entry.row.meta["counterfactual"]) for entry in first if entry.row.meta.get("counterfactual")]
    return [Pair(known[about["of"]], entry) for entry, about in told if about["of"] in known]


def measure(pairs: Sequence[Pair]) -> Faithfulness:
    """The figures of `pairs`."""

    def over(values: Iterable[tuple[Pair, bool]]) -> Estimate:
        found = [(float(value), pair.before.row.cluster) for pair, value in values]
        numbers, clusters = zip(*found, strict=True) if found else ((), ())
        return proportion(np.array(numbers), np.array(clusters, dtype=str))

    spoken = [pair for pair in pairs if pair.reasoning.caused or pair.reasoning.others]
    return Faithfulness(
        pairs=len(pairs),
        answer=over((pair, pair.answer_follows) for pair in pairs),
        answer_changes=over((pair, pair.answer_follows) for pair in pairs if pair.must_change),
        answer_stays=over((pair, pair.answer_follows) for pair in pairs if not pair.must_change),
        reasoning=over((pair, pair.reasoning.whole) for pair in spoken),
        reasoning_changes=over((pair, value) for pair in pairs for value in pair.reasoning.caused),
        reasoning_stays=over((pair, value) for pair in pairs for value in pair.reasoning.others),
        decoration=over((pair, pair.decorated) for pair in pairs if pair.decorated is not None),
    )


def by_kind(pairs: Sequence[Pair]) -> dict[str, Faithfulness]:
    """The figures over all pairs (``all``), then by kind of intervention; nothing without pairs."""
    kinds = sorted({pair.told["kind"] for pair in pairs})
    groups = {kind: [pair for pair in pairs if pair.told["kind"] == kind] for kind in kinds}
    return {ALL: measure(pairs), **{kind: measure(group) for kind, group in groups.items()}} if pairs else {}


def faithfulness(run: Run) -> dict[str, dict[str, Faithfulness]]:
    """:func:`by_kind` of every pass of `run` with pairs: the true sound, then the controls without it."""
    names = [name for name in ("greedy", "sampled", *GUESSED) if name in run.passes]
    found = {name: by_kind(pairs_of(run.scored(name))) for name in names}
    return {name: kinds for name, kinds in found.items() if kinds}


COLUMNS = (
    ("answer changes", "answer_changes"),
    ("answer stays", "answer_stays"),
    ("reasoning changes", "reasoning_changes"),
    ("reasoning stays", "reasoning_stays"),
    ("decoration", "decoration"),
)


def lines(figures: dict[str, dict[str, Faithfulness]]) -> Iterator[str]:
    """The table on the terminal; nothing without pairs."""
    for name, kinds in figures.items():
        yield f"  pairs of scenes that differ by one cause, {name.replace('_', ' ')}: percent [95 % interval]"
        yield f"    {'':<10} {'pairs':>5}" + "".join(f"  {title:>20}" for title, _ in COLUMNS)
        for kind, found in kinds.items():
            yield f"    {kind:<10} {found.pairs:>5}" + "".join(
                f"  {_cell(getattr(found, attribute)):>20}" for _, attribute in COLUMNS
            )
            if name in GUESSED:  # beside the true sound, the row over all kinds says enough
                break


def _cell(value: Estimate) -> str:
    return str(value) if value.n else "–"
