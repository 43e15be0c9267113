"""Right answers: the numbers to take away, runs against each other, kinds of question, scorers side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from eval.figures import charts
from eval.figures.estimates import Estimate
from eval.figures.expectations import Finding
from eval.figures.runs import Run
from eval.figures.scores import Cell, by, compare, grouped, item_values, summarise
from eval.report.markup import accuracy, escape, estimate, kind_of, note, percent, signed, table, won_and_lost
from eval.scorers.base import Asking, Bounding

MOST_BARS = 24  # groups of one chart
HALF = {"width": 500, "left": 215}  # of a chart beside another one
LEVELS = ("easy", "medium", "hard")
# What a question may be filed under besides its kind, and the heading of its bars; benchmarks add theirs.
TOPICS = {
    "format": "By format",
    "task": "By domain",
    "category": "By domain",
    "sub-category": "By skill",
    "sub_category": "By skill",
    "difficulty": "By difficulty",
    "part": "By part",
}


def tiles(runs: Sequence[Run]) -> str:
    """The numbers to take away, of the last run."""
    last = runs[-1].summary
    if last.main is None:
        return ""
    right, chance = last.main.accuracy, last.main.chance
    above = f"95 % interval {100 * (right.low - chance):+.1f} – {100 * (right.high - chance):+.1f}"
    entries = [
        (percent(right.value), f"{last.name}: right answers", f"chance {percent(chance)}"),
        (f"{100 * (right.value - chance):+.1f}", "points above chance", above),
    ]
    if "silence" in last.controls:
        silent = last.controls["silence"]
        entries.append((percent(silent.accuracy.value), "right in silence", f"chance {percent(silent.chance)}"))
    if last.flips is not None and last.flips.share.n:
        share = last.flips.share
        entries.append((percent(share.value), "follow swapped channels", f"of {share.n} right left/right answers"))
    if last.permutations is not None:
        stable = last.permutations.all_k
        entries.append(
            (percent(stable.value), "right in every order", f"of {last.permutations.k} other orders of the options")
        )
    cards = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span><small>{escape(small)}</small></div>'
        for value, label, small in entries
    )
    return f'<div class="tiles">{cards}</div>'


def more_sft(runs: Sequence[Run]) -> str:
    """What a run named "more SFT", the control of GRPO that spends the same time on SFT, reached compared with the run
    named "GRPO", in a sentence; nothing where there are no such two runs."""
    named = {run.name.casefold().replace("_", " "): run for run in runs}
    control, grpo = named.get("more sft"), named.get("grpo")
    if control is None or grpo is None:
        return ""
    first, second = grpo.scored(grpo.answers, control.headline), control.main
    common = item_values(first).keys() & item_values(second).keys()
    if not common:
        return ""
    found = compare(first, second).difference
    reward, more = (
        percent(summarise(entry for entry in scored if entry.row.id in common).accuracy.value)
        for scored in (first, second)
    )
    ahead = "is ahead" if found.low > 0 else "is behind" if found.high < 0 else "is neither ahead nor behind"
    points = f"{100 * found.value:+.1f} points, 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return (
        f'<p class="lead">More SFT for the same time reached <b>{more}</b>, GRPO <b>{reward}</b>: '
        f"on the same questions more SFT {ahead} ({points}).</p>"
    )


def headline(runs: Sequence[Run]) -> str:
    """One row a run: accuracy with its interval, chance, silence, swapped channels, unreadable replies."""
    warm = max((run.summary.sampled_temperature for run in runs), default=0.0)
    ranked = {run.headline.ranked_by for run in runs if isinstance(run.headline, Bounding)} - {""}
    columns: dict[str, Callable[[Run, Cell], str]] = {
        "greedy": lambda run, main: accuracy(run.summary.greedy),
        **{name: functools.partial(_ranked, name) for name in sorted(ranked)},
        f"one sample, T={warm:g}": lambda run, main: accuracy(run.summary.sampled),
        **({MOST: _most_frequent, ANY: _any_right} if any(run.summary.several for run in runs) else {}),
        "chance": lambda run, main: percent(main.chance),
        "silence": lambda run, main: accuracy(run.summary.controls.get("silence")),
        "swap follows": lambda run, main: _follows(run),
        "unread": lambda run, main: str(main.parse_failures),
        "cut": lambda run, main: str(main.truncated),
        "tokens": lambda run, main: f"{main.mean_completion_tokens:.0f}",
        "questions": lambda run, main: f"{main.accuracy.n}" + _unasked(run, main),
    }
    published = {found.scorer for run in runs if (found := run.by_published_rule) is not None}
    columns |= {f"by {name}": functools.partial(_published, name) for name in sorted(published)}
    if not warm:
        columns = {name: cell for name, cell in columns.items() if not name.startswith("one sample")}
    rows = [
        [f'<i class="dot" style="background:{charts.colour(index)}"></i>{escape(run.name)}']
        + [cell(run, main) for cell in columns.values()]
        for index, run in enumerate(runs)
        if (main := run.summary.main) is not None
    ]
    text = (
        "Accuracy in percent with its 95 % interval, over clusters of questions about one recording or clip. "
        "<b>Chance</b>: one over the number of choices, and for open "
        "questions the best constant answer. <b>Silence</b>: the same questions with the sound taken away. <b>Swap "
        "follows</b>: of the right left/right answers, how many turn round when the channels are exchanged. "
        "<b>Unread</b>: replies without a readable answer, counted as wrong. <b>Cut</b>: replies that reached the "
        "token limit. <b>Most frequent answer</b>, <b>one of all right</b> (pass@k): of several replies to a question. "
        "<b>Questions</b> is the denominator; those that could not be asked are not in it."
    )
    return table(["run", *columns], rows) + note(text)


MOST, ANY = "most frequent answer", "one of all right"  # columns of runs with several replies to a question


def _most_frequent(run: Run, main: Cell) -> str:
    found = run.summary.several
    return f"{estimate(found.majority)} of {found.n}" if found else "–"


def _any_right(run: Run, main: Cell) -> str:
    found = run.summary.several
    return f"{estimate(found.pass_at[found.n])} of {found.n}" if found else "–"


def _ranked(name: str, run: Run, main: Cell) -> str:
    """The figure `name` where it is what the run's benchmark ranks by."""
    scorer, found = run.headline, run.summary.ranked
    return estimate(found) if found and isinstance(scorer, Bounding) and scorer.ranked_by == name else "–"


def _published(name: str, run: Run, main: Cell) -> str:
    """Accuracy under the scorer `name` where that is the rule that the run's benchmark publishes."""
    found = run.by_published_rule
    return accuracy(found.cell) if found is not None and found.scorer == name else "–"


def _unasked(run: Run, main: Cell) -> str:
    """How many questions could not be asked; of a benchmark that leaves some out, the share that both are of it."""
    share, reasons = run.left_out
    told = f" <small>+ {main.errors} not asked</small>" if main.errors else ""
    return f" <small>{percent(share)} % left out</small>" if reasons else told


def _follows(run: Run) -> str:
    flips = run.summary.flips
    return estimate(flips.share) if flips is not None and flips.share.n else "–"


def expectations(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = [
        [
            '<b class="good">met</b>' if finding.passed else '<b class="bad">not met</b>',
            escape(finding.name),
            escape(finding.found),
            escape(finding.wanted),
        ]
        for finding in findings
    ]
    return "<h3>Expectations</h3>" + table(["", "what", "found", "wanted"], rows)


def differences(runs: Sequence[Run]) -> str:
    """Every later run minus every earlier one, on the questions both answered."""
    rows = []
    for later in range(1, len(runs)):
        for earlier in range(later - 1, -1, -1):
            a, b = runs[earlier], runs[later]
            cells = [escape(f"{b.name} − {a.name}")]
            for way in ("greedy", "sampled"):
                if way not in a.passes or way not in b.passes:
                    cells += ["–", "–"]
                    continue
                found = compare(a.scored(way, b.headline), b.scored(way))
                if found.difference.n == 0:
                    cells += ["no common questions", "–"]
                    continue
                cells += [signed(found.difference), won_and_lost(found)]
            rows.append(cells)
    if not rows:
        return ""
    text = (
        "Difference in points with its 95 % interval; then questions that only the one : only the other run did better "
        "on, with the paired test. Questions about one recording or clip are one cluster in both."
    )
    return table(["difference", "greedy", "won : lost", "one sample", "won : lost"], rows) + note(text)


# ------------------------------------------------------------------------------------------------ kinds and topics


def by_kind(runs: Sequence[Run]) -> str:
    """Bars by kind of question, then by domain, difficulty and whatever else the questions are filed under."""
    kinds = _bars(runs, [run.summary.by_type for run in runs], "Accuracy by kind of question")
    text = charts.legend([run.name for run in runs]) + kinds + _parts_table(runs[-1])
    blocks = []
    for topic in topics(runs[-1]):
        cells = [by(run.main, topic) for run in runs]
        heading = TOPICS.get(topic, f"By {topic.replace('_', ' ')}")
        blocks.append(f"<div><h3>{escape(heading)}</h3>{_bars(runs, cells, heading, **HALF)}</div>")
    return text + (f'<div class="halves">{"".join(blocks)}</div>' if blocks else "")


def topics(run: Run) -> list[str]:
    """What else besides its kind sets the questions of a run apart, into groups few enough for bars."""
    found = []
    for name in dict.fromkeys(("format", *run.groups, *TOPICS)):
        values = grouped(run.main, name)
        if name != "question_type" and 2 <= len(values) <= MOST_BARS:
            found.append(name)
    return found


def _bars(runs: Sequence[Run], cells: Sequence[dict[str, Cell]], label: str, **size: int) -> str:
    """One bar a run and group; `cells` by group, one mapping a run."""
    names = list(dict.fromkeys(name for part in reversed(cells) for name in part))[:MOST_BARS]
    if set(names) <= set(LEVELS):
        names = [name for name in LEVELS if name in names]
    groups = []
    for name in names:
        found = [part.get(name) for part in cells]
        bars = [charts.Bar.of(run.name, cell.accuracy if cell else None) for run, cell in zip(runs, found, strict=True)]
        groups.append((kind_of(name), next(cell.chance for cell in found if cell), bars))
    return charts.bars(groups, label=label, **size)


def _parts_table(run: Run) -> str:
    """Direction axes and distance of composite answers."""
    rows = [
        [escape(kind_of(kind)), escape(part), estimate(value), str(value.n)]
        for kind, cell in run.summary.by_type.items()
        for part, value in cell.parts.items()
    ]
    if not rows:
        return ""
    return f"<h3>Parts of an answer: {escape(run.name)}</h3>" + table(["kind", "part", "right", "questions"], rows)


# ---------------------------------------------------------------------------------------------- scorers side by side


def spectrum(runs: Sequence[Run]) -> str:
    """The same replies under every scorer of the benchmark: one bar a scorer and run, and each scorer's own figures."""
    names = list(dict.fromkeys((reading.scorer, reading.title) for run in runs for reading in run.main_readings))
    if len(names) < 2:
        return ""
    groups = []
    for scorer, title in names:
        found = [next((entry for entry in run.main_readings if entry.scorer == scorer), None) for run in runs]
        bars = [
            charts.Bar.of(run.name, entry.cell.accuracy if entry else None)
            for run, entry in zip(runs, found, strict=True)
        ]
        groups.append((title, next((entry.cell.chance for entry in found if entry), math.nan), bars))
    text = (
        "One and the same set of replies, scored by different rules; a gap between two bars is the rules', not the "
        "model's. Each rule is shown over the questions that it applies to (pointing at a bar tells how many)."
    )
    unscored = "".join(map(_unscored, runs))
    return charts.bars(groups, label="Accuracy by scorer") + note(text) + unscored + _figures(runs[-1])


def _bounds(found: Estimate | None) -> str:
    return f" <small>{found.low:.4g} – {found.high:.4g}</small>" if found else ""


def _unscored(run: Run) -> str:
    """How many answers a scorer that asks somebody else has no score for, and why."""
    asking = [scorer for scorer in run.scorers if isinstance(scorer, Asking)]
    lines = [entry for scorer in asking for entry in run.scored(run.answers, scorer) if entry.problem]
    if not lines:
        return ""
    first = f"'{lines[0].row.id}' by {lines[0].scorer}: no score: {lines[0].problem}"
    again = "".join(f"; {count} x {told}" for told, count in run.unscored_by_reason.items())
    again = again and f". With the controls{again.removeprefix(';')}"
    return note(escape(f"{run.name}: {len(lines)} answers have no score; the first, {first}{again}"))


def _figures(run: Run) -> str:
    blocks = []
    for reading in run.main_readings:
        rows = [
            [escape(name), f"{value:.4g}" + _bounds(reading.intervals.get(name))]
            for name, value in reading.figures.items()
            if math.isfinite(value)
        ]
        if rows:
            title = f"Figures of {escape(reading.title)} ({escape(reading.scorer)} {escape(reading.version)})"
            blocks.append(f"<details><summary>{title}: {escape(run.name)}</summary>{table(['', ''], rows)}</details>")
    return "".join(blocks)
