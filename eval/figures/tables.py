"""A run's numbers in one place: passes, kinds of question, controls; as dataclasses, as JSON and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_llm.files import write_json, write_lines
from eval.controls import CONTROLS, GUESSED, unheard_by_count
from eval.figures.estimates import Estimate
from eval.figures.scores import (
    HEADLINE,
    Cell,
    Comparison,
    Flips,
    Permutations,
    by,
    compare,
    flips,
    permutations,
    summarise,
)
from eval.predictions import Prediction
from eval.scorers import SCORERS, Scorer, get_scorers
from eval.scorers.base import Aggregating, Asking, Bounding, Score

SCORES_NAME, SCORE_LINES_NAME = "scores.json", "scores.jsonl"


@dataclass
class RunSummary:
    """Everything the report says about one run. `sampled` is the highest temperature above 0, where there is one."""

    name: str
    greedy: Cell | None
    sampled: Cell | None
    sampled_temperature: float
    controls: dict[str, Cell]
    flips: Flips | None
    silence_gap: Estimate | None  # accuracy with the sound minus accuracy in silence, on the same questions
    contributions: dict[str, Comparison]  # of the audio: against each control without it, on the same questions
    permutations: Permutations | None
    ranked: Estimate | None  # the figure that the benchmark ranks systems by, where that is not the accuracy
    by_type: dict[str, Cell]
    by_format: dict[str, Cell]
    macro_by_type: float
    scorer: Scorer = field(default=HEADLINE, repr=False)
    rows: dict[str, list[Prediction]] = field(default_factory=dict, repr=False)

    @property
    def main(self) -> Cell | None:
        return self.greedy or self.sampled


def passes_of(rows: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Rows by pass: ``greedy``, ``sampled`` (the highest temperature above 0) and the controls by name."""
    warmest = max((row.temperature for row in rows if not row.control), default=0.0)
    passes: dict[str, list[Prediction]] = {}
    for row in rows:
        if row.control:
            name = row.control
        elif row.temperature == 0:
            name = "greedy"
        elif row.temperature == warmest:
            name = "sampled"
        else:
            name = f"temperature {row.temperature:g}"
        passes.setdefault(name, []).append(row)
    return passes


def headline_of(manifest: Mapping[str, Any], settings: Mapping[str, Mapping[str, str]] | None = None) -> Scorer:
    """The scorer whose figures stand in a run's tables, that of its benchmark, with the `settings` that it has."""
    name = str(manifest.get("scorer", {}).get("name"))
    return get_scorers([name], settings)[0] if name in SCORERS else HEADLINE


def summarise_run(name: str, rows: Sequence[Prediction], *, seed: int = 0, scorer: Scorer = HEADLINE) -> RunSummary:
    """All tables of one run, recomputed from its predictions."""
    passes = passes_of(rows)
    main = passes.get("greedy") or passes.get("sampled") or []
    options: dict[str, Any] = {"seed": seed, "scorer": scorer}
    controls = {control: summarise(found, **options) for control, found in passes.items() if control in CONTROLS}
    contributions = {name: compare(passes[name], main, **options) for name in GUESSED if name in passes}
    by_type = by(main, "question_type", **options)
    warm = [row.temperature for row in passes.get("sampled", [])]
    return RunSummary(
        name=name,
        greedy=summarise(passes["greedy"], **options) if "greedy" in passes else None,
        sampled=summarise(passes["sampled"], **options) if "sampled" in passes else None,
        sampled_temperature=warm[0] if warm else 0.0,
        controls=controls,
        flips=flips(main, passes["swap"], scorer=scorer) if "swap" in passes else None,
        silence_gap=contributions["silence"].difference if "silence" in contributions else None,
        contributions=contributions,
        permutations=permutations(passes.get("shuffled_options", []), own=main, **options),
        ranked=_ranked(main, scorer, seed),
        by_type=by_type,
        by_format=by(main, "format", **options),
        macro_by_type=_mean([cell.accuracy.value for cell in by_type.values() if cell.accuracy.n]),
        scorer=scorer,
        rows=passes,
    )


def _ranked(rows: Sequence[Prediction], scorer: Scorer, seed: int) -> Estimate | None:
    if not isinstance(scorer, Bounding) or not scorer.ranked_by:
        return None
    pairs = [(row, score) for row in rows if (score := scorer.score(row)) is not None]
    found = scorer.intervals([row for row, _ in pairs], [score for _, score in pairs], seed=seed)
    return found.get(scorer.ranked_by)


@dataclass(frozen=True)
class Reading:
    """One pass of a run as one scorer reads it; `figures` are what the scorer has beyond the mean of its rows."""

    scorer: str
    version: str
    title: str
    cell: Cell
    figures: dict[str, float]
    intervals: dict[str, Estimate] = field(default_factory=dict)  # of some of the figures


@dataclass
class Scored:
    """What several scorers make of the same predictions: readings by pass, and every single score."""

    spectrum: dict[str, list[Reading]]
    lines: list[dict[str, Any]]


def score_all(rows: Sequence[Prediction], scorers: Sequence[Scorer], *, seed: int = 0) -> Scored:
    """Every pass under every scorer that applies to it, in the scorers' order."""
    lines = []
    spectrum: dict[str, list[Reading]] = {}
    for scorer in scorers:
        if isinstance(scorer, Asking):
            scorer.prepare(rows)
    for name, found in passes_of(rows).items():
        for scorer in scorers:
            pairs = [(row, score) for row in found if (score := scorer.score(row)) is not None]
            lines += [unscored_line(scorer, row, why) for row, why in problems_of(scorer, found)]
            if not pairs:
                continue
            kept, scores = [row for row, _ in pairs], [score for _, score in pairs]
            figures = scorer.aggregate(kept, scores) if isinstance(scorer, Aggregating) else {}
            intervals = scorer.intervals(kept, scores, seed=seed) if isinstance(scorer, Bounding) else {}
            cell = summarise(found, seed=seed, scorer=Stored(scorer, pairs))
            reading = Reading(scorer.name, scorer.version, scorer.title, cell, figures, intervals)
            spectrum.setdefault(name, []).append(reading)
            lines += [
                {"scorer": scorer.name, "version": scorer.version, "control": row.control}
                | {"temperature": row.temperature, "sample": row.sample, **to_plain(score)}
                for row, score in pairs
            ]
    return Scored(spectrum, lines)


def problems_of(scorer: Scorer, rows: Sequence[Prediction]) -> list[tuple[Prediction, str]]:
    """Of `rows`, those that a scorer which asks somebody else could not score, and why."""
    if not isinstance(scorer, Asking):
        return []
    return [(row, scorer.problems[row.key]) for row in rows if row.key in scorer.problems]


def unscored_line(scorer: Scorer, row: Prediction, why: str) -> dict[str, Any]:
    """The line of a row without a score: it is in no figure, and the reason stands where the explanation would."""
    return {"scorer": scorer.name, "version": scorer.version, "control": row.control} | {
        "temperature": row.temperature,
        "sample": row.sample,
        "id": row.id,
        "question_type": row.question_type,
        "value": None,
        "explanation": f"no score: {why}",
    }


class Stored:
    """Scores that were given already, by the scorer's name: nothing is judged twice for one table."""

    def __init__(self, scorer: Scorer, pairs: Sequence[tuple[Prediction, Score]]) -> None:
        self.name, self.version, self.title = scorer.name, scorer.version, scorer.title
        self._scores = {row.key: score for row, score in pairs}

    def score(self, row: Prediction) -> Score | None:
        return self._scores.get(row.key)


def write_scores(out: Path, rows: Sequence[Prediction], scorers: Sequence[Scorer] = (HEADLINE,)) -> Scored:
    """``scores.json``: the tables under the first scorer and the figures of all of them; ``scores.jsonl``: one line an
    answer and scorer (value, answer, explanation). Both are recomputed from the predictions alone, at any time."""
    headline, scored = scorers[0], score_all(rows, scorers)
    summary = summarise_run(out.name, rows, scorer=headline)
    tree = {
        "scorer": {"name": headline.name, "version": headline.version},
        "summary": to_plain(summary),
        "spectrum": to_plain(scored.spectrum),
    }
    if warning := unheard_by_count(rows):
        tree["warning"] = warning
    write_lines(out / SCORE_LINES_NAME, scored.lines)
    write_json(out / SCORES_NAME, tree)
    return scored


def print_spectrum(scored: Scored) -> None:
    """One line a scorer and pass: accuracy with its interval, unreadable replies; further figures below it."""
    for name, readings in scored.spectrum.items():
        print(f"\n{name}: accuracy in percent [95 % interval] by scorer")
        for reading in readings:
            print(f"  {reading.scorer:<26} {_line(reading.cell)}")
            for figure, value in reading.figures.items():
                found = reading.intervals.get(figure)
                print(f"      {figure:<46} {value:.4f}" + (f" [{found.low:.4f}, {found.high:.4f}]" if found else ""))
    unscored = [line for line in scored.lines if line["value"] is None]
    if unscored:
        first = unscored[0]
        who = f"'{first['id']}' by {first['scorer']}"
        print(f"\n{len(unscored)} answers have no score; the first, {who}: {first['explanation']}")


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings, without the predictions; a number that does not exist becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: to_plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.name not in ("rows", "scorer")
        }
    if isinstance(value, dict):
        return {str(name): to_plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_run(name: str, rows: Sequence[Prediction], scorer: Scorer = HEADLINE, groups: Sequence[str] = ()) -> None:
    """The run as a table on the terminal, broken down by kind of question and by `groups` (keys of the items)."""
    summary = summarise_run(name, rows, scorer=scorer)
    print(f"\n{name}: accuracy in percent [95 % interval], scorer {scorer.name} {scorer.version}")
    for label, cell in [
        ("greedy", summary.greedy),
        (f"T={summary.sampled_temperature:g}", summary.sampled),
        *summary.controls.items(),
    ]:
        if cell is not None:
            print(f"  {label:<34} {_line(cell)}")
    if summary.ranked is not None and isinstance(scorer, Bounding):
        print(f"  {scorer.ranked_by:<34} {summary.ranked!s:>22}")
    if summary.flips is not None and summary.flips.share.n:
        share = summary.flips.share
        print(f"  {'swap: right answers that follow':<34} {share!s:>22}  of {share.n}")
    for control, found in summary.contributions.items():
        test = f", McNemar p {found.mcnemar.p_value:.2g}" if found.mcnemar else ""
        print(f"  {'audio contribution over ' + control:<34} {found.difference!s:>22}  n {found.difference.n}{test}")
    if summary.permutations is not None:
        orders, label = summary.permutations, f"options in {summary.permutations.k} other orders"
        spread = f"std {100 * orders.std:.1f}, worst {orders.worst}, all {orders.all_k}"
        print(f"  {label:<34} {orders.mean!s:>22}  {spread}")
        print(f"  {'the same option in every order':<34} {orders.consistency!s:>22}  n {orders.consistency.n}")
    if warning := unheard_by_count(rows):
        print(f"  warning: {warning}")
    print("  by kind of question")
    for kind, cell in summary.by_type.items():
        print(f"    {kind:<32} {_line(cell)}")
    main = summary.rows.get("greedy") or summary.rows.get("sampled") or []
    for group in (name for name in groups if name != "question_type"):
        print(f"  by {group}")
        for value, cell in by(main, group, scorer=scorer).items():
            print(f"    {value:<32} {_line(cell)}")


def _line(cell: Cell) -> str:
    notes = [f"chance {100 * cell.chance:.1f}", f"n {cell.accuracy.n}"]
    notes += [f"unread {cell.parse_failures}"] if cell.parse_failures else []
    notes += [f"cut {cell.truncated}"] if cell.truncated else []
    notes += [f"errors {cell.errors} left out"] if cell.errors else []
    return f"{cell.accuracy!s:>22}  " + ", ".join(notes)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
