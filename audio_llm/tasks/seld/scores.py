"""What the metric of DCASE 2025 task 3 counts in a file, scores of such counts, and thresholds that raise them.

Per frame and class, references and predictions are matched by the least total angle between folded azimuths (Politis et
al. 2025; F20°/1: right within 20 degrees and a relative distance error of 1). Everything a file contributes is a sum.

``strict=False`` is the official implementation bit for bit. That one scores neither the last annotated frame of a file
nor anything after it, and nothing in a file without references; ``strict=True`` scores all of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from audio_llm.datasets.seld_tables import fold_azimuth
from audio_llm.encoders.seld_head import CLASSES, ELEMENTS
from audio_llm.errors import ShardError, describe
from audio_llm.tasks.seld.tracks import decode

_EPS = float(np.finfo(float).eps)
Average = Literal["macro", "micro"]
# What is summed per class: events right; predictions without a reference; references without a prediction; matched but
# in the wrong place; then over matched pairs: degrees, centimetres, relative distance, equal onscreen, their number.
SUMS = ("right", "extra", "missed", "misplaced", "angle", "distance", "relative", "onscreen", "pairs")
SCORES = ("f_score", "doa_error", "distance_error", "relative_distance_error", "onscreen_accuracy")


@dataclasses.dataclass(frozen=True)
class Criteria:
    """When a matched event is in the right place. The defaults are the challenge's F20°/1."""

    degrees: float = 20.0
    centimetres: float = math.inf
    relative_distance: float = 1.0
    onscreen: bool = False  # whether the onscreen flag must agree


class Scores(NamedTuple):
    """`values` and `classwise` in the order of :data:`SCORES`: share, degrees, centimetres, share, share."""

    values: np.ndarray  # (5,)
    classwise: np.ndarray  # (5, classes); NaN where a class was never matched

    def table(self) -> dict[str, float]:
        return dict(zip(SCORES, self.values.tolist(), strict=True))


# -------------------------------------------------------------------------------------------------------------- counts


def _groups(rows: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Rows by (frame, class), in the order of the table."""
    if not len(rows):
        return {}
    keys = rows[:, 0].astype(np.int64) << 16 | rows[:, 1].astype(np.int64)
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return {(int(part[0, 0]), int(part[0, 1])): part for part in np.split(rows[order], cuts)}


def match(reference: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of least total angle: indices into both tables, and the angle of each pair in degrees."""
    cost = np.abs(fold_azimuth(reference[:, None, 3]) - fold_azimuth(predicted[None, :, 3]))
    if cost.size == 1:
        return np.zeros(1, dtype=int), np.zeros(1, dtype=int), cost[0]
    from scipy.optimize import linear_sum_assignment

    first, second = linear_sum_assignment(cost)
    return first, second, cost[first, second]


def file_counts(
    reference: np.ndarray,
    predicted: np.ndarray,
    criteria: Criteria | None = None,
    strict: bool = False,
    num_classes: int = len(CLASSES),
) -> np.ndarray:
    """The sums of one file, ``(9, classes)`` in the order of :data:`SUMS`, from two DCASE tables ``(n, 6)``.

    Raises :class:`ShardError` for a class beyond `num_classes`.
    """
    criteria = criteria or Criteria()
    for name, rows in (("reference", reference), ("prediction", predicted)):
        if len(rows) and rows[:, 1].max() >= num_classes:
            raise ShardError(describe(name, f"classes 0 to {num_classes - 1}", f"class {int(rows[:, 1].max())}"))
    truth, guess = _groups(np.asarray(reference, np.float64)), _groups(np.asarray(predicted, np.float64))
    end = math.inf if strict else max((frame for frame, _ in truth), default=0)
    sums = np.zeros((len(SUMS), num_classes))
    for key in sorted(truth.keys() | guess.keys()):
        frame, label = key
        if frame >= end:
            continue
        if key not in guess:
            sums[2, label] += len(truth[key])
        elif key not in truth:
            sums[1, label] += len(guess[key])
        else:
            sums[:, label] += _matched(truth[key], guess[key], criteria)
    return sums


def _matched(truth: np.ndarray, guess: np.ndarray, criteria: Criteria) -> np.ndarray:
    first, second, angle = match(truth, guess)
    wanted, found = truth[first], guess[second]
    distance = np.abs(wanted[:, 4] - found[:, 4])
    relative = distance / (wanted[:, 4] + _EPS)
    seen = wanted[:, 5] == found[:, 5]
    wrong = (angle > criteria.degrees) | (distance > criteria.centimetres) | (relative > criteria.relative_distance)
    if criteria.onscreen:
        wrong |= ~seen
    pairs = len(first)
    return np.array(
        [
            pairs - wrong.sum(),
            max(0, len(guess) - len(truth)),
            max(0, len(truth) - len(guess)),
            wrong.sum(),
            angle.sum(),
            distance.sum(),
            relative.sum(),
            seen.sum(),
            pairs,
        ],
        dtype=np.float64,
    )


# -------------------------------------------------------------------------------------------------------------- scores


def scores_of(sums: np.ndarray, average: Average = "macro") -> Scores:
    """Scores of summed counts ``(..., 9, classes)``; leading axes stay.

    Macro F is the mean over all classes, those that never occur counting 0; the errors are means over the classes that
    were matched at all. Micro sums the classes first.
    """
    classwise = _class_scores(sums)
    if average == "micro":
        return Scores(_class_scores(sums.sum(axis=-1, keepdims=True))[..., 0], classwise)
    errors = classwise[..., 1:, :]
    known = ~np.isnan(errors)
    means = _ratio(np.where(known, errors, 0.0).sum(axis=-1), known.sum(axis=-1))
    return Scores(np.concatenate((classwise[..., :1, :].mean(axis=-1), means), axis=-1), classwise)


def _class_scores(sums: np.ndarray) -> np.ndarray:
    """``(..., 9, classes)`` → ``(..., 5, classes)``."""
    part = dict(zip(SUMS, np.moveaxis(sums, -2, 0), strict=True))
    half = 0.5 * (part["extra"] + part["missed"])
    f_score = part["right"] / (_EPS + part["right"] + part["misplaced"] + half)
    errors = [_ratio(part[name], part["pairs"]) for name in ("angle", "distance", "relative", "onscreen")]
    return np.stack([f_score, *errors], axis=-2)


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


# ---------------------------------------------------------------------------------------------------------- thresholds

GRID = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))  # 0.10 to 0.90


def tune_thresholds(
    outputs: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    grid: Sequence[float] = GRID,
    criteria: Criteria | None = None,
    strict: bool = False,
    elements: Sequence[str] = ELEMENTS,
) -> tuple[np.ndarray, np.ndarray]:
    """The threshold of each class with the best F on validation data, and that F: both ``(classes,)``.

    `outputs` are network outputs ``(frames, tracks, elements, classes)`` by the names of `reference`. A class's events
    depend on its own threshold alone, so that one pass per threshold finds the best of all combinations. A class
    without any right event at any threshold gets 0.5. Never tune on the data that is reported.
    """
    num_classes = next(iter(outputs.values())).shape[-1]
    f_scores = []
    for threshold in grid:
        sums = [
            file_counts(
                reference[name], decode(values, threshold, elements=elements).rows(), criteria, strict, num_classes
            )
            for name, values in outputs.items()
        ]
        f_scores.append(scores_of(np.sum(sums, axis=0)).classwise[0])
    table = np.stack(f_scores)  # (grid, classes)
    best = table.max(axis=0)
    chosen = np.array(grid)[table.argmax(axis=0)]
    return np.where(best > 0, chosen, 0.5), best
