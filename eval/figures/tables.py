"""A run's figures as text on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from audio_llm.files import write_json, write_lines
from eval.controls import named, silenced, unheard_by_count
from eval.figures import counterfactual
from eval.figures.runs import Run
from eval.figures.scores import Cell, by
from eval.scorers.base import Bounding

SCORES_NAME, SCORE_LINES_NAME = "scores.json", "scores.jsonl"


def write_scores(out: Path, run: Run) -> None:
    """``scores.json``: the tables under the first scorer and the figures of all of them; ``scores.jsonl``: one line an
    answer and scorer (value, answer, explanation). Both are recomputed from the predictions alone, at any time."""
    write_lines(out / SCORE_LINES_NAME, run.score_lines())  # first: figures are taken as the lines go by
    tree = {
        "scorer": {"name": run.headline.name, "version": run.headline.version},
        "summary": to_plain(run.summary),
        "spectrum": to_plain(run.spectrum),
    }
    if pairs := counterfactual.faithfulness(run):
        tree["counterfactual"] = to_plain(pairs)
    if warning := unheard_by_count(run.rows):
        tree["warning"] = warning
    write_json(out / SCORES_NAME, tree)


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings; a number that does not exist becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (item.name for item in dataclasses.fields(value))
        return {name: to_plain(getattr(value, name)) for name in names if name != "scorer"}
    if isinstance(value, dict):
        return {str(name): to_plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_run(run: Run) -> None:
    """The run as a table on the terminal, broken down by kind of question and by what its benchmark groups by."""
    summary, scorer = run.summary, run.headline
    print(f"\n{run.name}: accuracy in percent [95 % interval], scorer {scorer.name} {scorer.version}")
    published = run.by_published_rule
    beside = f"; {published.scorer} {published.cell.accuracy!s}" if published is not None else ""
    scored = len({entry.row.id for entry in run.main if entry.score is not None})
    counted = 0 if published is None else published.cell.accuracy.n
    if run.published_rule and counted < scored:  # a rule that drops what it cannot read
        beside = (beside or f"; {run.published_rule} –") + f" over {counted} of {scored}"
    left_out, reasons = run.left_out
    if reasons:
        beside += f"; left out {percent(left_out)} %"
    labels = {"greedy": "greedy", "sampled": f"T={summary.sampled_temperature:g}"}
    for name, cell in (("greedy", summary.greedy), ("sampled", summary.sampled)):
        if cell is not None:
            print(f"  {labels[name]:<34} {line(cell, run.silent(answers=name).get(''))}{beside}")
            beside = ""
    if summary.several is not None:
        replies, adds = summary.several, summary.several.majority_adds
        label = f"most frequent answer of {replies.n}"
        print(f"  {label:<34} {replies.majority!s:>22}  adds {adds.difference} to one reply, p {adds.p_value:.2g}")
        for k, right in replies.pass_at.items():
            print(f"  {f'one of {k} replies right (pass@{k})':<34} {right!s:>22}  n {right.n}")
    for reason, count in reasons.items():
        print(f"  {'left out: ' + reason:<34} {count}")
    for control, cell in summary.controls.items():
        print(f"  {named(control) + _at(run, control):<34} {line(cell)}")
    if summary.ranked is not None and isinstance(scorer, Bounding):
        print(f"  {scorer.ranked_by:<34} {summary.ranked!s:>22}")
    if summary.flips is not None and summary.flips.share.n:
        share = summary.flips.share
        print(f"  {'swap: right answers that follow':<34} {share!s:>22}  of {share.n}")
    for control, found in summary.contributions.items():
        label = f"sound {number} adds" if (number := silenced(control)) else f"audio contribution over {control}"
        label += _at(run, control)
        print(f"  {label:<34} {found.difference!s:>22}  n {found.difference.n}, p {found.p_value:.2g}")
    if summary.permutations is not None:
        orders = summary.permutations
        label = f"options in {orders.k} other order{'s' * (orders.k != 1)}"
        spread = f"std {100 * orders.std:.1f}, worst {orders.worst}, all {orders.all_k}"
        print(f"  {label:<34} {orders.mean!s:>22}  {spread}")
        print(f"  {'the same option in every order':<34} {orders.consistency!s:>22}  n {orders.consistency.n}")
    if warning := unheard_by_count(run.rows):
        print(f"  warning: {warning}")
    for told in counterfactual.lines(counterfactual.faithfulness(run)):
        print(told)
    print("  by kind of question")
    silent = run.silent("question_type")
    for kind, cell in summary.by_type.items():
        print(f"    {kind:<32} {line(cell, silent.get(kind))}")
    for group in (name for name in run.groups if name != "question_type"):
        print(f"  by {group}")
        silent = run.silent(group)
        for value, cell in by(run.main, group).items():
            print(f"    {value:<32} {line(cell, silent.get(value))}")


def _at(run: Run, control: str) -> str:
    """The temperature of a control where it is not that of the pass in the first line."""
    pass_ = run.summary.beside.get(control, run.answers)
    return "" if pass_ == run.answers else f", T={run.passes[control][0].temperature:g}"


def line(cell: Cell, silent: Cell | None = None) -> str:
    """An accuracy with its interval, and beside it what guessing and `silent`, the same questions in silence, reach."""
    notes = [f"chance {percent(cell.chance)}"]
    notes += [f"silence {percent(silent.accuracy.value)}"] if silent else []
    notes += [f"n {cell.accuracy.n}"]
    notes += [f"unread {cell.parse_failures}"] if cell.parse_failures else []
    notes += [f"cut {cell.truncated}"] if cell.truncated else []
    notes += [f"errors {cell.errors} left out"] if cell.errors else []
    return f"{cell.accuracy if cell.accuracy.n else '–'!s:>22}  " + ", ".join(notes)


def print_spectrum(run: Run) -> None:
    """One line a scorer and pass: accuracy with its interval, unreadable replies; further figures below it."""
    for name, readings in run.spectrum.items():
        print(f"\n{name}: accuracy in percent [95 % interval] by scorer")
        beside = run.spectrum.get("silence", []) if run.summary.beside.get("silence") == name else []
        quiet = {reading.scorer: reading.cell for reading in beside}
        for reading in readings:
            print(f"  {reading.scorer:<26} {line(reading.cell, quiet.get(reading.scorer))}")
            for figure, value in reading.figures.items():
                found = reading.intervals.get(figure)
                bounds = f" [{number(found.low)}, {number(found.high)}]{found.few}" if found else ""
                print(f"      {figure:<46} {number(value)}{bounds}")
    if unscored := run.unscored:
        first = unscored[0]
        who = f"'{first['id']}' by {first['scorer']}"
        print(f"\n{len(unscored)} answers have no score; the first, {who}: {first['explanation']}")
        for told, count in run.unscored_by_reason.items():
            print(f"  {count} x {told}")


def percent(value: float) -> str:
    """A share in percent, a dash where there is none."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


def number(value: float) -> str:
    """A count as it is, anything else with four decimals, a dash for what does not exist."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if math.isfinite(value) else "–"
