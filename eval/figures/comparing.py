"""Two runs side by side on the questions that both answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from audio_llm.errors import describe, nearest
from eval.figures.estimates import Comparison
from eval.figures.runs import Run
from eval.figures.scores import Cell, Scored, by, compare, group_of, grouped, summarise
from eval.figures.tables import percent
from eval.predictions import Prediction, PredictionsError
from eval.scorers import Scorer
from eval.scorers.base import Asking


@dataclass(frozen=True)
class Line:
    """One group of questions: both accuracies on the common ones, their difference and the test of it."""

    name: str
    first: Cell
    second: Cell
    found: Comparison
    q_value: float  # of a group: its p, corrected for as many groups as were looked at; of all questions its p
    silent: tuple[Cell | None, Cell | None]  # both runs in silence, where they were asked so


@dataclass(frozen=True)
class Compared:
    """The whole table; `only` counts the questions that just one of the two runs answered."""

    names: tuple[str, str]
    scorer: str
    only: tuple[int, int]
    lines: list[Line]


def compare_runs(first: Run, second: Run, *, answers: str, group: str) -> Compared:
    """`second` against `first` on one pass, under the first scorer of `second`. Raises :class:`PredictionsError` where
    they were not asked the same."""
    scorer = second.headline
    left, right = _answers(first, answers, scorer), _answers(second, answers, scorer)
    common = [name for name in left if name in right]
    if not common:
        raise PredictionsError(describe(f"runs {first.name} and {second.name}", "questions in common", "none"))
    for name in common:
        refuse_other_question(name, left[name][0].row, right[name][0].row)
    firsts = [right[name][0] for name in common]
    _refuse_unknown_group(group, [entry.row for entry in firsts])
    groups = {name: [entry.row.id for entry in found] for name, found in grouped(firsts, group).items()}
    parts = [("all", common), *(groups.items() if len(groups) > 1 else [])]
    silent = [_silent(run, answers, scorer, group, set(common)) for run in (first, second)]
    lines = corrected([_line(name, ids, left, right, silent) for name, ids in parts])
    only = len(left) - len(common), len(right) - len(common)
    return Compared((first.name, second.name), f"{scorer.name} {scorer.version}", only, lines)


def _answers(run: Run, answers: str, scorer: Scorer) -> dict[str, list[Scored]]:
    """Scored replies of a pass by question."""
    if answers not in run.passes:
        found = f"only {', '.join(run.passes)}{nearest(answers, run.passes)}"
        raise PredictionsError(describe(f"run {run.name}", f"answers '{answers}'", found))
    scored = run.scored(answers, scorer)
    rows: dict[str, list[Scored]] = defaultdict(list)
    for entry in scored:
        if entry.score is not None:
            rows[entry.row.id].append(entry)
    if not rows:
        found = f"none among {len(scored)}, of which {sum(bool(entry.row.error) for entry in scored)} errors"
        cure = None
        if isinstance(scorer, Asking):
            found += next((f"; {entry.problem}" for entry in scored if entry.problem), "")
            cure = f"Set it up: --with {scorer.name}.KEY=VALUE."
        raise PredictionsError(
            describe(f"run {run.name}", f"answers that scorer '{scorer.name}' can score", found, cure)
        )
    return rows


def refuse_other_question(name: str, first: Prediction, second: Prediction, where: str = "") -> None:
    """Raises :class:`PredictionsError` where item `name` has another question, choices or answer in one of two rows."""
    for what, a, b in (
        ("question", first.question, second.question),
        ("choices", sorted(first.choices), sorted(second.choices)),
        ("answer", first.gold, second.gold),
    ):
        if a != b:
            cure = "Both runs must be of the same version of the data: see data_sha256 in their run.json."
            raise PredictionsError(
                describe(f"item '{name}'{where}, {what}", f"{a!r} in both runs", f"{b!r} in one", cure)
            )


def _refuse_unknown_group(group: str, rows: list[Prediction]) -> None:
    known = sorted({"question_type", "format"}.union(*(row.meta for row in rows)))
    if all(group_of(row, group) is None for row in rows):
        raise PredictionsError(describe("--by", f"one of {', '.join(known)}", f"'{group}'{nearest(group, known)}"))


def _silent(run: Run, answers: str, scorer: Scorer, group: str, common: set[str]) -> dict[str, Cell]:
    asked = run.scored("silence", scorer) if run.summary.beside.get("silence") == answers else []
    found = [entry for entry in asked if entry.row.id in common]
    return {"all": summarise(found), **by(found, group)} if found else {}


def _line(
    name: str,
    ids: list[str],
    left: Mapping[str, list[Scored]],
    right: Mapping[str, list[Scored]],
    silent: list[dict[str, Cell]],
) -> Line:
    first, second = ([entry for item in ids for entry in scored[item]] for scored in (left, right))
    one, other = (found.get(name) for found in silent)
    found = compare(first, second)
    return Line(name, summarise(first), summarise(second), found, found.p_value, (one, other))


def corrected(lines: list[Line]) -> list[Line]:
    """The lines with the q of all but the first, which is about all questions (Benjamini and Hochberg 1995): of the
    groups with a q below 0.05 at most one in twenty is expected to differ by accident."""
    from scipy.stats import false_discovery_control

    head, groups = lines[:1], lines[1:]
    q_values = false_discovery_control([line.found.p_value for line in groups]) if groups else ()
    return head + [replace(line, q_value=float(q)) for line, q in zip(groups, q_values, strict=True)]


def table(compared: Compared) -> str:
    """The comparison as text."""
    width = max(len(line.name) for line in compared.lines)
    head = f"accuracy in percent [95 % interval], scorer {compared.scorer}"
    lines = [f"{compared.names[0]} -> {compared.names[1]}: {head}"]
    for line in compared.lines:
        found, quiet = line.found, [percent(cell.accuracy.value) if cell else "–" for cell in line.silent]
        q = f", q {line.q_value:.2g}" if line is not compared.lines[0] else ""
        lines.append(
            f"  {line.name:<{width}}  {line.first.accuracy!s:>22}  {line.second.accuracy!s:>22}  "
            f"difference {found.difference!s:>22}  n {found.difference.n}, better only before {found.only_first}, only "
            f"after {found.only_second}, p {found.p_value:.2g}{q}; chance {percent(line.second.chance)}, "
            f"silence {quiet[0]} and {quiet[1]}"
        )
    if any(compared.only):
        lines.append(f"  answered by one run alone and left out: {compared.only[0]} and {compared.only[1]}")
    return "\n".join(lines)
