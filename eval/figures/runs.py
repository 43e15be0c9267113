"""A run: stored answers, what their manifest says of them, and every figure taken from them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, describe
from eval.benchmarks import get_benchmark
from eval.benchmarks.sounds import ALSO_IN
from eval.figures.scores import Cell, Scored, by, score_rows, summarise
from eval.figures.summary import Reading, RunSummary, passes_of, reading, summarise_run
from eval.predictions import MANIFEST_NAME, Prediction, PredictionsError, read, read_manifest
from eval.scorers import SCORERS, Scorer, get_scorers
from eval.scorers.base import Asking, Score

DEFAULT = ("option-resolution", "letter", "mmau-official", "mmau-official-extracted", "mmau-official-resolved")
SCORE_FIELDS = tuple(entry.name for entry in fields(Score))
_values = attrgetter(*SCORE_FIELDS)
LEAVING_OUT = {("duplicates", "drop"), ("missing", "skip")}  # options of benchmarks by which questions are not asked


@dataclass(eq=False)
class Run:
    """Answers with the benchmark they belong to ("" where nothing says) and what the run's manifest says of them.

    `scorers`: the first one's figures stand in the tables. Every reply is scored once by each scorer, when it is first
    asked for. Of the other scorers figures are kept, and no scores, unless they ask somebody else.
    """

    name: str
    rows: Sequence[Prediction]
    scorers: Sequence[Scorer]
    benchmark: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    _scored: dict[tuple[str, str], list[Scored]] = field(default_factory=dict, init=False, repr=False)
    _readings: dict[tuple[str, str], Reading | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def headline(self) -> Scorer:
        return self.scorers[0]

    @property
    def groups(self) -> tuple[str, ...]:
        """Keys of the items that its benchmark's tables are broken down by, and where else their sounds lie, where that
        was looked up."""
        looked_up = (ALSO_IN,) if self.rows and ALSO_IN in self.rows[0].meta else ()
        return (*get_benchmark(self.benchmark).groups, *looked_up) if self.benchmark else ()

    @cached_property
    def passes(self) -> dict[str, list[Prediction]]:
        """Its rows by pass: ``greedy``, ``sampled``, controls by name."""
        return passes_of(self.rows)

    def scored(self, answers: str, scorer: Scorer | None = None) -> list[Scored]:
        """The pass `answers` under `scorer`, by default the first one; nothing where there is no such pass."""
        scorer = scorer or self.headline
        key = (answers, scorer.name)
        if key not in self._scored:
            self._scored[key] = score_rows(self.passes.get(answers, []), scorer)
        return self._scored[key]

    def _read(self, answers: str, scorer: Scorer) -> list[Scored]:
        """:meth:`scored`, whose figures are kept."""
        key = (answers, scorer.name)
        asked_again = scorer is self.headline or isinstance(scorer, Asking) or key in self._scored
        found = self.scored(answers, scorer) if asked_again else score_rows(self.passes.get(answers, []), scorer)
        if key not in self._readings:
            self._readings[key] = reading(scorer, found)
        return found

    @property
    def answers(self) -> str:
        """Name of the pass that tables, directions and sounds are about: greedy answers, else sampled ones."""
        return "greedy" if "greedy" in self.passes else "sampled"

    @property
    def main(self) -> list[Scored]:
        """The answers of that pass under the first scorer."""
        return self.scored(self.answers)

    @cached_property
    def summary(self) -> RunSummary:
        return summarise_run(self.name, {name: self.scored(name) for name in self.passes}, self.headline)

    def silent(self, attribute: str = "", answers: str = "") -> dict[str, Cell]:
        """What to read the accuracy of the pass `answers` (by default :attr:`main`) against: silence at the same
        temperature, of all questions under "" and of each group of them by `attribute`. Nothing without one."""
        found = self.scored("silence") if self.summary.beside.get("silence") == (answers or self.answers) else []
        return {"": summarise(found), **(by(found, attribute) if attribute else {})} if found else {}

    def readings(self, answers: str) -> list[Reading]:
        """A pass under every scorer that applies to it."""
        for scorer in self.scorers:
            if (answers, scorer.name) not in self._readings:
                self._read(answers, scorer)
        found = (self._readings[answers, scorer.name] for scorer in self.scorers)
        return [entry for entry in found if entry is not None]

    @cached_property
    def main_readings(self) -> list[Reading]:
        return self.readings(self.answers)

    @cached_property
    def published_rule(self) -> str:
        """Name of the rule that its benchmark publishes, as far as that is not the first scorer; "" without one."""
        name = getattr(get_benchmark(self.benchmark), "published_rule", "") if self.benchmark else ""
        return "" if name == self.headline.name else name

    @cached_property
    def by_published_rule(self) -> Reading | None:
        """That pass under this rule; None where the rule has a score for none of its answers."""
        if not self.published_rule:
            return None
        (rule,) = get_scorers([self.published_rule])
        if rule in self.scorers:
            return next((found for found in self.main_readings if found.scorer == rule.name), None)
        return reading(rule, self.scored(self.answers, rule))

    @property
    def left_out(self) -> tuple[float, dict[str, int]]:
        """The share of the benchmark's questions that this run's figures are not about, and how many of them there are
        by reason: those that were left out when it was opened, and those that could not be asked. Nothing where the
        benchmark does not count them."""
        told = self.manifest.get("left_out") or {}
        reasons, total = dict(told.get("reasons") or {}), told.get("total") or 0
        answers = answers_of(self.rows)
        if not total or not answers:
            return 0.0, {}
        unasked = sum(bool(row.error) for row in answers)
        outside = sum(reasons.values()) / total
        # Under --limit the errors are those of a part of the questions, so they count by their share.
        share = outside + (1 - outside) * unasked / len(answers)
        return share, reasons | ({"could not be asked": unasked} if unasked else {})

    @cached_property
    def spectrum(self) -> dict[str, list[Reading]]:
        """:meth:`readings` of every pass that has some."""
        return {name: found for name in self.passes if (found := self.readings(name))}

    @property
    def unscored(self) -> list[dict[str, Any]]:
        """The lines of :meth:`score_lines` about answers that a scorer could not score."""
        return [
            _line(scorer, entry)
            for name in self.passes
            for scorer in self.scorers
            if isinstance(scorer, Asking)
            for entry in self.scored(name, scorer)
            if entry.problem
        ]

    @property
    def unscored_by_reason(self) -> dict[str, int]:
        """How many of these lines say the same, the most frequent ones, as far as they are several."""
        told = Counter(line["explanation"] for line in self.unscored)
        return {reason: count for reason, count in told.most_common(5) if count > 1}

    def score_lines(self) -> Iterator[dict[str, Any]]:
        """One line an answer and scorer. A row that a scorer could not score is in no figure; the reason stands where
        the explanation would, and such rows come first in their pass."""
        for name in self.passes:
            for scorer in self.scorers:
                scored = self._read(name, scorer)
                yield from (_line(scorer, entry) for entry in scored if entry.problem)
                yield from (_line(scorer, entry) for entry in scored if entry.score is not None)


def _line(scorer: Scorer, entry: Scored) -> dict[str, Any]:
    row, score = entry.row, entry.score
    line: dict[str, Any] = {
        "scorer": scorer.name,
        "version": scorer.version,
        "control": row.control,
        "temperature": row.temperature,
        "sample": row.sample,
    }
    if score is not None:
        line.update(zip(SCORE_FIELDS, _values(score), strict=True))
        return line
    line |= {"id": row.id, "question_type": row.question_type, "value": None}
    return line | {"explanation": f"no score: {entry.problem}"}


def load(
    path: str | Path,
    *,
    name: str | None = None,
    benchmark: str | None = None,
    options: Mapping[str, str] | None = None,
    scorers: str | None = None,
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> Run:
    """A run folder, a ``predictions.jsonl``, or a ``.json`` file in the shape that a benchmark's own scripts read
    (`options`: what that reader takes). `scorers` and `settings` as :func:`scorers_for` takes them."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        rows, manifest = read(path), read_manifest(path if path.is_dir() else path.parent)
        benchmark, name = benchmark or str(manifest.get("benchmark", "")), name or path.resolve().name
        _refuse_lost_rows(name, rows, manifest)
        return Run(name, rows, scorers_for(benchmark, scorers, settings), benchmark, manifest)
    if not path.is_file():
        raise PredictionsError(describe(str(path), "a run folder or a file of predictions", "nothing there"))
    benchmark = benchmark or "mmau"
    reader = getattr(get_benchmark(benchmark), "read_answers", None)
    if reader is None:
        raise ConfigError(f"benchmark '{benchmark}': has no file of answers of its own; rescore the run's folder.")
    rows = reader(path, **(options or {}))
    return Run(name or path.stem, rows, scorers_for(benchmark, scorers, settings), benchmark)


def _refuse_lost_rows(name: str, rows: Sequence[Prediction], manifest: Mapping[str, Any]) -> None:
    """Raise where a run has other rows than it ended with; say so where it has not ended, for its figures are of the
    first questions alone."""
    stated, command = manifest.get("rows"), manifest.get("command", "audio-llm eval …")
    if manifest.get("finished") and isinstance(stated, int) and stated != len(rows):
        cure = (
            f"Repeat its own command ({command}), which asks what is missing; or name predictions without a run.json."
        )
        expected = f"the {stated} answers of its {MANIFEST_NAME}"
        raise PredictionsError(describe(f"run {name}", expected, f"{len(rows)}", cure))
    if manifest and not manifest.get("finished"):
        print(f"run {name}: has not finished; its figures are of the {len(rows)} answers so far", file=sys.stderr)


def load_named(
    arguments: Sequence[str],
    settings: Mapping[str, Mapping[str, str]] | None = None,
    *,
    scorers: str | None = None,
) -> list[Run]:
    """``RUN`` or ``NAME=RUN`` each. Raises for a folder without predictions and for a name used twice."""
    named = [*map(split_name, arguments)]
    runs = [load(path, name=name, scorers=scorers, settings=settings) for name, path in named]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(describe(f"run '{name}'", "a name of its own", "several", "Name them: NAME=FOLDER."))
    return runs


def split_name(argument: str) -> tuple[str, str]:
    """``NAME=FOLDER`` → both; a bare folder gives its own name."""
    name, separator, path = argument.partition("=")
    if separator and not Path(argument).exists():
        if not (name and path):
            raise ConfigError(describe("run", "NAME=FOLDER, or a folder", f"'{argument}'"))
        return name, path
    return Path(argument).resolve().name, argument


def scorers_for(
    benchmark: str, wanted: str | None = None, settings: Mapping[str, Mapping[str, str]] | None = None
) -> list[Scorer]:
    """`wanted` (names with commas, or ``all``), else those of `benchmark`, by name or "" where nothing says; scorers
    with `settings` are added."""
    if wanted == "all":
        names = list(SCORERS)
    elif wanted:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
    else:
        names = list(get_benchmark(benchmark).scorers) if benchmark else list(DEFAULT)
    if not names:
        raise ConfigError(describe("--scorers", "names with commas, or all", f"'{wanted}'"))
    return get_scorers([*names, *(name for name in settings or () if name not in names)], settings)


def answers_of(rows: Sequence[Prediction]) -> list[Prediction]:
    """One row an item, for a submission: the true audio, at the lowest temperature, its first sample."""
    plain = [row for row in rows if not row.control and row.sample == 0]
    coldest = min((row.temperature for row in plain), default=0.0)
    return [row for row in plain if row.temperature == coldest]


def incomplete(run: Run, rows: Sequence[Prediction], *, foreign: bool = False) -> str:
    """What keeps `rows`, one a question, from being the answers to every question of the benchmark, each once, in a
    sentence; "" where nothing does. A `foreign` file has no manifest: its own questions are all there are."""
    name, manifest = f"run {run.name}", run.manifest
    expected = "an answer to every question of the benchmark"
    anyway = "or write what there is with --incomplete."
    if not foreign:
        if not manifest:
            cure = f"Give the run's folder, {anyway}"
            return describe(name, expected, f"{len(rows)} answers without the {MANIFEST_NAME} that says so", cure)
        if not manifest.get("finished"):
            cure = f"Finish it by its own command ({manifest.get('command', 'audio-llm eval …')}), {anyway}"
            return describe(name, expected, f"{len(rows)} answers of a run that has not finished", cure)
        limit, items = manifest.get("settings", {}).get("limit"), manifest.get("items")
        if limit is not None and limit == items:
            cure = f"Ask without --limit, into another --out, {anyway}"
            return describe(name, expected, f"the {items} questions of --limit {limit}", cure)
        for option, value in manifest.get("options", {}).items():
            if (option, value) in LEAVING_OUT:
                cure = f"Ask without it, into another --out, {anyway}"
                return describe(name, expected, f"a run with --option {option}={value}, which leaves some out", cure)
        if left_out := (manifest.get("left_out") or {}).get("reasons"):
            cure = f"The benchmark asks a part of them; {anyway}"
            found = ", ".join(f"{count} left out: {reason}" for reason, count in left_out.items())
            return describe(name, expected, found, cure)
        if len(rows) != items:
            cure = f"Ask again with --overwrite, {anyway}"
            return describe(name, f"answers to its {items} questions", f"{len(rows)}", cure)
    if errors := [row for row in rows if row.error]:
        found = f"{len(errors)} of {len(rows)} that could not be asked, the first '{errors[0].id}' ({errors[0].error})"
        cure = f"Mend {'the file' if foreign else 'the data and ask again with --overwrite'}, {anyway}"
        return describe(name, expected, found, cure)
    return ""
