"""BAT's table (Zheng et al. 2024; SLAM-LLM's README): the five kinds of questions A to E in the paper's columns.

Every figure of a run has an interval over recordings. The published rows are printed as they were reported: their mAP
is by an embedding service, ours by the embedder that is named, so that these two columns are not to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from audio_llm.errors import DataError, describe
from eval.figures.estimates import Estimate, mean_of, proportion
from eval.figures.runs import Run
from eval.figures.scores import score_rows
from eval.predictions import Prediction
from eval.scorers.base import Score
from eval.scorers.spatial_sound_qa import LabelSimilarity, SpatialSoundQA, distance_intervals

COLUMNS = ("mAP A", "mAP C", "DoA B", "DoA D", "DER B", "DER D", "Direction", "Distance", "BA")
SINGLE, SINGLE_PLACE = "CLASSIFICATION", "DOA"
MIXED, MIXED_PLACE = "MIXUP_SINGLE_CLASSIFICATION", "MIXUP_SINGLE_DOA"
DIRECTION, DISTANCE = "MIXUP_DIRECTION", "MIXUP_DISTANCE_BOTH"
# As reported, in percent: the table of SLAM-LLM's README, which holds the paper's rows and those of its own re-run.
PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "random (reported)": (0.61, 0.59, 12.57, 12.41, 67.33, 67.46, 50.00, 50.00, 50.00),
    "BAT in one stage (reported)": (26.23, 9.06, 76.49, 37.09, 29.28, 51.62, 65.12, 81.98, 73.55),
    "BAT, the paper (reported)": (26.34, 9.89, 75.54, 37.65, 29.16, 47.90, 69.77, 84.01, 76.89),
    "BAT, model.pt of SLAM-LLM (reported)": (25.08, 8.27, 72.73, 35.07, 34.10, 52.82, 69.84, 80.36, 75.10),
}
Scores = list[tuple[Prediction, Score]]


@dataclass(frozen=True)
class Row:
    """A run's figures by column, as shares of 1; a column without questions is left out."""

    name: str
    figures: dict[str, Estimate]
    embedder: str


def row_of(run: Run) -> Row:
    """Of the answers with their own sound. Raises :class:`DataError` for a run without a question of these kinds."""
    return figures_of(run.name, [entry.row for entry in run.main])


def figures_of(name: str, rows: Sequence[Prediction]) -> Row:
    """See :func:`row_of`."""
    scored = [(entry.row, entry.score) for entry in score_rows(rows, SpatialSoundQA()) if entry.score is not None]
    kinds: dict[str, Scores] = {}
    for row, score in scored:
        kinds.setdefault(row.question_type.upper(), []).append((row, score))
    labels = LabelSimilarity()
    figures: dict[str, Estimate] = {}
    for column, kind in (("mAP A", SINGLE), ("mAP C", MIXED)):
        if kind in kinds:
            figures[column] = _precision([row for row, _ in kinds[kind]], labels)
    for letter, kind in (("B", SINGLE_PLACE), ("D", MIXED_PLACE)):
        if kind in kinds:
            clusters = _clusters(kinds[kind])
            figures[f"DoA {letter}"] = proportion(np.array([score.value for _, score in kinds[kind]]), clusters)
            figures[f"DER {letter}"] = distance_intervals(kinds[kind], clusters)["DER beyond 0.5 m"]
    for column, kind in (("Direction", DIRECTION), ("Distance", DISTANCE)):
        if kind in kinds:
            values = np.array([score.value for _, score in kinds[kind]])
            figures[column] = proportion(values, _clusters(kinds[kind]))
    if "Direction" in figures and "Distance" in figures:
        figures["BA"] = mean_of([figures["Direction"], figures["Distance"]])
    if not figures:
        found = ", ".join(sorted(kinds)) or "none"
        raise DataError(describe(f"run '{name}'", "questions of SpatialSoundQA's types A to E", found))
    return Row(name, figures, labels.embedder)


def _clusters(scores: Scores) -> np.ndarray:
    return np.array([row.cluster for row, _ in scores])


def _precision(rows: Sequence[Prediction], labels: LabelSimilarity) -> Estimate:
    """Mean average precision over the classes that occur, with the interval that Spatial-AST's own has: of resampled
    recordings, but no percentiles, for whom repeats lift every resample."""
    from eval.tasks.spatial import mean_average_precision

    pairs = [(row, score) for row in rows if (score := labels.score(row)) is not None]
    similarity, targets = labels.compared([row for row, _ in pairs], [score for _, score in pairs])
    return mean_average_precision(similarity, targets, np.array([row.cluster for row, _ in pairs]))


def table(rows: Sequence[Row]) -> str:
    """Markdown: the runs, then what others reported."""
    embedder = rows[0].embedder if rows else "characters"
    lines = [
        f"| model | {' | '.join(COLUMNS)} |",
        "|---|" + "---|" * len(COLUMNS),
        *(f"| {row.name} | {' | '.join(str(row.figures.get(name, '–')) for name in COLUMNS)} |" for row in rows),
        *(f"| *{name}* | {' | '.join(f'*{value:.2f}*' for value in values)} |" for name, values in PUBLISHED.items()),
        "",
        "Percent; DER is an error, low is good. In brackets 95 % intervals over recordings.",
        f"mAP: by {embedder}, over the classes that occur.",
        "*In italics: figures that others reported for the published data (SLAM-LLM's README: the paper's rows, and a "
        "re-run); their mAP is by an embedding service and cannot be compared.*",
    ]
    return "\n".join(lines)
