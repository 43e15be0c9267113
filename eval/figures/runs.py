"""Scores from stored predictions alone: of a run folder, of a predictions file, of an official file of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, describe
from eval.benchmarks import get_benchmark
from eval.predictions import MANIFEST_NAME, Prediction, PredictionsError, read, read_manifest
from eval.scorers import SCORERS, Scorer, get_scorers
from eval.scorers.mmau import MatchError, OfficialReport, official_report, refuse_nothing

DEFAULT = ("option-resolution", "letter", "mmau-official", "mmau-official-extracted", "mmau-official-resolved")
LEAVING_OUT = {("duplicates", "drop"), ("missing", "skip")}  # options of benchmarks by which questions are not asked


@dataclass(frozen=True)
class Stored:
    """Predictions, the benchmark they belong to ("" where nothing says) and what the run's manifest says of them."""

    name: str
    rows: list[Prediction]
    benchmark: str
    manifest: dict[str, Any]


def load(path: str | Path, benchmark: str | None = None, options: Mapping[str, str] | None = None) -> Stored:
    """A run folder, a ``predictions.jsonl``, or a ``.json`` file in the shape that a benchmark's own scripts read
    (`options`: what that reader takes)."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        rows, manifest = read(path), read_manifest(path if path.is_dir() else path.parent)
        return Stored(path.resolve().name, rows, benchmark or str(manifest.get("benchmark", "")), manifest)
    if not path.is_file():
        raise PredictionsError(describe(str(path), "a run folder or a file of predictions", "nothing there"))
    name = benchmark or "mmau"
    reader = getattr(get_benchmark(name), "read_answers", None)
    if reader is None:
        raise ConfigError(f"benchmark '{name}': has no file of answers of its own; rescore the run folder instead.")
    return Stored(path.stem, reader(path, **(options or {})), name, {})


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


def incomplete(stored: Stored, rows: Sequence[Prediction], *, foreign: bool = False) -> str:
    """What keeps `rows`, one a question, from being the answers to every question of the benchmark, each once, in a
    sentence; "" where nothing does. A `foreign` file has no manifest: its own questions are all there are."""
    run, manifest = f"run {stored.name}", stored.manifest
    expected = "an answer to every question of the benchmark"
    anyway = "or write what there is with --incomplete."
    if not foreign:
        if not manifest:
            cure = f"Give the run's folder, {anyway}"
            return describe(run, expected, f"{len(rows)} answers without the {MANIFEST_NAME} that says so", cure)
        if not manifest.get("finished"):
            cure = f"Finish it by its own command ({manifest.get('command', 'audio-llm eval …')}), {anyway}"
            return describe(run, expected, f"{len(rows)} answers of a run that has not finished", cure)
        limit, items = manifest.get("settings", {}).get("limit"), manifest.get("items")
        if limit is not None and limit == items:
            cure = f"Ask without --limit, into another --out, {anyway}"
            return describe(run, expected, f"the {items} questions of --limit {limit}", cure)
        for name, value in manifest.get("options", {}).items():
            if (name, value) in LEAVING_OUT:
                cure = f"Ask without it, into another --out, {anyway}"
                return describe(run, expected, f"a run with --option {name}={value}, which leaves some out", cure)
        if len(rows) != items:
            cure = f"Ask again with --overwrite, {anyway}"
            return describe(run, f"answers to its {items} questions", f"{len(rows)}", cure)
    if errors := [row for row in rows if row.error]:
        found = f"{len(errors)} of {len(rows)} that could not be asked, the first '{errors[0].id}' ({errors[0].error})"
        cure = f"Mend {'the file' if foreign else 'the data and ask again with --overwrite'}, {anyway}"
        return describe(run, expected, found, cure)
    return ""


def reference_report(path: str | Path) -> OfficialReport:
    """What MMAU's own script prints for a file. Raises :class:`MatchError` with what the original dies of."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise PredictionsError(describe(str(path), "a file of MMAU's answers", str(error.strerror))) from error
    try:
        records = json.loads(text.decode("utf-8"))
        report = official_report(records)
    except json.JSONDecodeError as error:
        message = describe(str(path), "one JSON array", str(error))
        raise MatchError(message, f"json.decoder.JSONDecodeError: {error}") from error
    except (UnicodeDecodeError, RecursionError, TypeError, AttributeError) as error:  # no array of MMAU's items at all
        reference = f"{type(error).__name__}: {error}"
        raise MatchError(describe(str(path), "a JSON array of MMAU's items", "something else"), reference) from error
    print_reference(report)
    refuse_nothing(report, records)
    return report


def print_reference(report: OfficialReport) -> None:
    """The official figures, one group a line, and how many items the original left out without saying so."""
    for name, (percent, count) in report.figures().items():
        print(f"{name} : {percent:.2f}% over {count} samples")
    if report.left_out:
        print(f"{report.left_out} items have no model_output: the official script leaves them out of every denominator")
