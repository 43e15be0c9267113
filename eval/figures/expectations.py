"""Does a set of runs show what it should? Limits in YAML, checked against numbers recomputed from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from audio_llm.config import load
from audio_llm.errors import ConfigError
from eval.figures.runs import Run
from eval.figures.scores import compare, summarise
from eval.figures.tables import percent

Measure = Literal["accuracy", "above_chance", "difference", "flips", "parse_failures"]


@dataclass
class Expectation:
    """One limit. `measure` of `run` (``difference``: minus that of the run `minus`) on the pass `answers`.

    All are shares: 0.04 is four points. `interval_above` asks that the lower end of the 95 % interval lie above it;
    `within` that the value lie no further from zero.
    """

    name: str
    measure: Measure
    run: str
    minus: str | None = None
    answers: str = "greedy"
    at_least: float | None = None
    at_most: float | None = None
    within: float | None = None
    interval_above: float | None = None


@dataclass
class Expectations:
    """The file: a list of limits."""

    verb: ClassVar[str] = "report"
    checks: list[Expectation] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """What came of one expectation, as a row a person can read."""

    name: str
    wanted: str
    found: str
    passed: bool


def read_expectations(path: str | Path) -> Expectations:
    """Read the YAML file. Raises :class:`ConfigError` for an unknown key, and for no check or one without any limit."""
    expectations = load(Expectations, path)
    if not expectations.checks:
        raise ConfigError(f"{path}: expected at least one check under 'checks', found none.")
    for check in expectations.checks:
        if check.at_least is None and check.at_most is None and check.within is None and check.interval_above is None:
            raise ConfigError(f"{path}: check '{check.name}': expected at_least, at_most, within or interval_above.")
        if (check.measure == "difference") != (check.minus is not None):
            raise ConfigError(f"{path}: check '{check.name}': 'minus' belongs to measure difference, and only there.")
    return expectations


def verify(expectations: Expectations, runs: Mapping[str, Run]) -> list[Finding]:
    """One finding a check; a run or a pass that is not there is a failed check."""
    return [_verify_one(check, runs) for check in expectations.checks]


def _verify_one(check: Expectation, runs: Mapping[str, Run]) -> Finding:
    wanted = _wanted(check)
    try:
        value, low, text = _measure(check, runs)
    except LookupError as error:
        return Finding(check.name, wanted, str(error.args[0]), False)
    passed = (
        (check.at_least is None or value >= check.at_least - 1e-12)
        and (check.at_most is None or value <= check.at_most + 1e-12)
        and (check.within is None or abs(value) <= check.within + 1e-12)
        and (check.interval_above is None or low > check.interval_above)
    )
    return Finding(check.name, wanted, text, passed)


def _measure(check: Expectation, runs: Mapping[str, Run]) -> tuple[float, float, str]:
    """Value, lower end of its interval, and both as text. Raises LookupError where there is nothing to measure."""
    run = _run(runs, check.run)
    if check.measure == "difference":
        other = _run(runs, str(check.minus))
        for each in (run, other):
            _check_asked(each, check.answers)
        found = compare(other.scored(check.answers, run.headline), run.scored(check.answers))
        return found.difference.value, found.difference.low, f"{found.difference} points, p = {found.p_value:.2g}"
    if check.measure == "flips":
        flips = run.summary.flips
        if flips is None or flips.share.n == 0:
            raise LookupError(f"run '{check.run}' has no right left/right answers under swap")
        return flips.share.value, flips.share.low, f"{flips.share} % of {flips.share.n}"
    _check_asked(run, check.answers)
    cell = summarise(run.scored(check.answers))
    if cell.accuracy.n == 0:
        raise LookupError(f"run '{check.run}' has no scored answers '{check.answers}'")
    accuracy = cell.accuracy
    silent = run.silent(answers=check.answers).get("")
    beside = f"chance {percent(cell.chance)}" + (f", silence {percent(silent.accuracy.value)}" if silent else "")
    if check.measure == "accuracy":
        return accuracy.value, accuracy.low, f"{accuracy} % ({beside})"
    if check.measure == "above_chance":
        above = accuracy.value - cell.chance
        return above, accuracy.low - cell.chance, f"{100 * above:+.1f} points ({accuracy} %, {beside})"
    share = cell.unread
    return share.value, share.low, f"{share} % ({cell.parse_failures} of {cell.replies} replies)"


def _run(runs: Mapping[str, Run], name: str) -> Run:
    if name not in runs:
        raise LookupError(f"no run named '{name}' among {', '.join(runs)}")
    return runs[name]


def _check_asked(run: Run, answers: str) -> None:
    if answers not in run.passes:
        raise LookupError(f"run '{run.name}' has no answers '{answers}' (it has {', '.join(run.passes)})")


def _wanted(check: Expectation) -> str:
    what = f"{check.measure.replace('_', ' ')} of {check.run}"
    what += f" - {check.minus}" if check.minus else ""
    what += "" if check.measure == "flips" else f" ({check.answers})"
    limits = [
        f"≥ {100 * check.at_least:g}" if check.at_least is not None else "",
        f"≤ {100 * check.at_most:g}" if check.at_most is not None else "",
        f"within ± {100 * check.within:g}" if check.within is not None else "",
        f"interval above {100 * check.interval_above:g}" if check.interval_above is not None else "",
    ]
    return f"{what} {', '.join(limit for limit in limits if limit)}"


def print_findings(findings: list[Finding]) -> None:
    """A table of passed and failed checks."""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        verdict = "PASS" if finding.passed else "FAIL"
        print(f"  {verdict}  {finding.name:<{width}}  {finding.found}   wanted: {finding.wanted}")
    failed = sum(not finding.passed for finding in findings)
    print(f"  {len(findings) - failed} of {len(findings)} expectations met")
