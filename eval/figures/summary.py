"""The figures of one run: its passes, kinds of question and controls under its first scorer; one pass under any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eval.controls import CONTROLS, GUESSED, is_control, silenced
from eval.figures.estimates import Comparison, Estimate
from eval.figures.scores import (
    Cell,
    Flips,
    Permutations,
    Scored,
    by,
    compare,
    flips,
    permutations,
    summarise,
)
from eval.figures.several import Several, several
from eval.predictions import Prediction
from eval.scorers.base import Aggregating, Bounding, Score, Scorer


@dataclass(frozen=True)
class RunSummary:
    """What the tables say about one run. `sampled` is the highest temperature above 0, where there is one."""

    name: str
    greedy: Cell | None
    sampled: Cell | None
    sampled_temperature: float
    controls: dict[str, Cell]
    beside: dict[str, str]  # by control: the pass that it is compared with, the true sound at its own temperature
    flips: Flips | None
    contributions: dict[str, Comparison]  # of the audio: against each control without it (or one sound of it), on the
    # same questions
    permutations: Permutations | None
    several: Several | None  # replies to a question at that temperature
    ranked: Estimate | None  # the figure that the benchmark ranks systems by, where that is not the accuracy
    by_type: dict[str, Cell]
    by_format: dict[str, Cell]
    macro_by_type: float

    @property
    def main(self) -> Cell | None:
        return self.greedy or self.sampled


def passes_of(rows: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Rows by pass: ``greedy``, ``sampled`` (the highest temperature above 0) and the controls by name."""
    warmest = max((row.temperature for row in rows if not row.control), default=0.0)
    passes: dict[str, list[Prediction]] = {}
    for row in rows:
        passes.setdefault(row.control or _true_sound(row.temperature, warmest), []).append(row)
    return passes


def _true_sound(temperature: float, warmest: float) -> str:
    if temperature == 0:
        return "greedy"
    return "sampled" if temperature == warmest else f"temperature {temperature:g}"


def _beside(passes: Mapping[str, list[Scored]]) -> dict[str, str]:
    """The pass that each control differs from by its sound (or order of options) alone: that of the same temperature.
    Controls are asked at the first temperature of a run, which need not be that of the main pass."""
    temperatures = {name: found[0].row.temperature for name, found in passes.items() if found}
    return {
        control: name
        for control in [*CONTROLS, *filter(silenced, temperatures)]
        for name in temperatures
        if control in temperatures and not is_control(name) and temperatures[name] == temperatures[control]
    }


def summarise_run(name: str, passes: Mapping[str, list[Scored]], scorer: Scorer) -> RunSummary:
    """All tables of one run, from its passes as `scorer` scored them."""
    main = passes.get("greedy") or passes.get("sampled") or []
    beside = _beside(passes)
    without = [*GUESSED, *sorted(filter(silenced, beside), key=lambda name: silenced(name) or 0)]
    contributions = {name: compare(passes[name], passes[beside[name]]) for name in without if name in beside}
    by_type = by(main, "question_type")
    right = [cell.accuracy.value for cell in by_type.values() if cell.accuracy.n]
    return RunSummary(
        name=name,
        greedy=summarise(passes["greedy"]) if "greedy" in passes else None,
        sampled=summarise(passes["sampled"]) if "sampled" in passes else None,
        sampled_temperature=passes["sampled"][0].row.temperature if "sampled" in passes else 0.0,
        controls={control: summarise(found) for control, found in passes.items() if is_control(control)},
        beside=beside,
        flips=flips(passes[beside["swap"]], passes["swap"]) if "swap" in beside else None,
        contributions=contributions,
        permutations=permutations(
            passes.get("shuffled_options", []), own=passes.get(beside.get("shuffled_options", ""), [])
        ),
        several=several(passes.get("sampled", [])),
        ranked=_intervals(scorer, main).get(scorer.ranked_by) if isinstance(scorer, Bounding) else None,
        by_type=by_type,
        by_format=by(main, "format"),
        macro_by_type=sum(right) / len(right) if right else math.nan,
    )


@dataclass(frozen=True)
class Reading:
    """One pass of a run as one scorer reads it; `figures` are what the scorer has beyond the mean of its rows."""

    scorer: str
    version: str
    title: str
    cell: Cell
    figures: dict[str, float]
    intervals: dict[str, Estimate] = field(default_factory=dict)  # of some of the figures


def reading(scorer: Scorer, scored: Sequence[Scored]) -> Reading | None:
    """The figures of one pass; None where the scorer applies to none of it."""
    rows, scores = _applied(scored)
    if not scores:
        return None
    figures = scorer.aggregate(rows, scores) if isinstance(scorer, Aggregating) else {}
    cell, intervals = summarise(scored), _intervals(scorer, scored)
    return Reading(scorer.name, scorer.version, scorer.title, cell, figures, intervals)


def _intervals(scorer: Scorer, scored: Sequence[Scored]) -> dict[str, Estimate]:
    return scorer.intervals(*_applied(scored)) if isinstance(scorer, Bounding) else {}


def _applied(scored: Sequence[Scored]) -> tuple[list[Prediction], list[Score]]:
    """Rows that have a score and the scores, side by side."""
    pairs = [(entry.row, entry.score) for entry in scored if entry.score is not None]
    return [row for row, _ in pairs], [score for _, score in pairs]
