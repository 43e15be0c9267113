"""A run's numbers in one place: passes, kinds of question, controls; as dataclasses, as JSON and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_llm.files import write_json
from eval.controls import CONTROLS
from eval.predictions import Prediction
from eval.scorers import SCORERS, Scorer
from eval.scoring import HEADLINE, Cell, Flips, by, compare, flips, summarise
from eval.statistics import Estimate

SCORES_NAME = "scores.json"


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


def headline_of(manifest: Mapping[str, Any]) -> Scorer:
    """The scorer whose figures stand in a run's tables: that of its benchmark."""
    return SCORERS.get(str(manifest.get("scorer", {}).get("name")), HEADLINE)


def summarise_run(name: str, rows: Sequence[Prediction], *, seed: int = 0, scorer: Scorer = HEADLINE) -> RunSummary:
    """All tables of one run, recomputed from its predictions."""
    passes = passes_of(rows)
    main = passes.get("greedy") or passes.get("sampled") or []
    options: dict[str, Any] = {"seed": seed, "scorer": scorer}
    controls = {control: summarise(found, **options) for control, found in passes.items() if control in CONTROLS}
    by_type = by(main, "question_type", **options)
    warm = [row.temperature for row in passes.get("sampled", [])]
    return RunSummary(
        name=name,
        greedy=summarise(passes["greedy"], **options) if "greedy" in passes else None,
        sampled=summarise(passes["sampled"], **options) if "sampled" in passes else None,
        sampled_temperature=warm[0] if warm else 0.0,
        controls=controls,
        flips=flips(main, passes["swap"], scorer=scorer) if "swap" in passes else None,
        silence_gap=compare(passes["silence"], main, **options).difference if "silence" in passes else None,
        by_type=by_type,
        by_format=by(main, "format", **options),
        macro_by_type=_mean([cell.accuracy.value for cell in by_type.values() if cell.accuracy.n]),
        scorer=scorer,
        rows=passes,
    )


def write_scores(out: Path, rows: Sequence[Prediction], scorer: Scorer = HEADLINE) -> None:
    """``scores.json``: the tables and one row per answer (value, answer, explanation), recomputable at any time."""
    summary = summarise_run(out.name, rows, scorer=scorer)
    tree = {
        "scorer": {"name": scorer.name, "version": scorer.version},
        "summary": to_plain(summary),
        "scores": [
            {"control": row.control, "temperature": row.temperature, "sample": row.sample, **to_plain(found)}
            for row in rows
            if (found := scorer.score(row)) is not None
        ],
    }
    write_json(out / SCORES_NAME, tree)


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


def print_run(name: str, rows: Sequence[Prediction], scorer: Scorer = HEADLINE) -> None:
    """The run as a table on the terminal."""
    summary = summarise_run(name, rows, scorer=scorer)
    print(f"\n{name}: accuracy in percent [95 % interval], scorer {scorer.name} {scorer.version}")
    for label, cell in [
        ("greedy", summary.greedy),
        (f"T={summary.sampled_temperature:g}", summary.sampled),
        *summary.controls.items(),
    ]:
        if cell is not None:
            print(f"  {label:<34} {_line(cell)}")
    if summary.flips is not None and summary.flips.share.n:
        share = summary.flips.share
        print(f"  {'swap: right answers that follow':<34} {share!s:>22}  of {share.n}")
    print("  by kind of question")
    for kind, cell in summary.by_type.items():
        print(f"    {kind:<32} {_line(cell)}")


def _line(cell: Cell) -> str:
    notes = [f"chance {100 * cell.chance:.1f}", f"n {cell.accuracy.n}"]
    notes += [f"unread {cell.parse_failures}"] if cell.parse_failures else []
    notes += [f"cut {cell.truncated}"] if cell.truncated else []
    notes += [f"errors {cell.errors} left out"] if cell.errors else []
    return f"{cell.accuracy!s:>22}  " + ", ".join(notes)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
