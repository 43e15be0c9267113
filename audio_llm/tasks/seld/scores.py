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
from audio_llm.tasks.seld.tracks import UNIFY, decode_active, lengths

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
    _check_classes("reference", reference, num_classes)
    _check_classes("prediction", predicted, num_classes)
    truth, guess = np.asarray(reference, np.float64), np.asarray(predicted, np.float64)
    end = math.inf if strict else _last_frame(truth)
    keys, cells = _cells(truth[truth[:, 0] < end], guess[guess[:, 0] < end], criteria or Criteria())
    return _summed(keys & _CLASS, cells, num_classes)


_CLASS = (1 << 16) - 1  # a cell's key is its frame before these bits, and its class in them


def _keys(rows: np.ndarray) -> np.ndarray:
    return rows[:, 0].astype(np.int64) << 16 | rows[:, 1].astype(np.int64)


def _check_classes(name: str, rows: np.ndarray, num_classes: int) -> None:
    if len(rows) and rows[:, 1].max() >= num_classes:
        raise ShardError(describe(name, f"classes 0 to {num_classes - 1}", f"class {int(rows[:, 1].max())}"))


def _last_frame(rows: np.ndarray) -> float:
    return rows[:, 0].max() if len(rows) else 0


def _summed(place: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Columns of `values` ``(n, k)`` summed by their `place` ``(n,)`` of `count`: ``(k, count)``."""
    return np.stack([np.bincount(place, column, minlength=count) for column in values.T])


def _cells(truth: np.ndarray, guess: np.ndarray, criteria: Criteria) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``(n,)`` of the cells (a frame and a class) that two tables fill, rising, and their sums ``(n, 9)``."""
    keys, cell = np.unique(np.concatenate((_keys(truth), _keys(guess))), return_inverse=True)
    of = cell[: len(truth)], cell[len(truth) :]
    many, found = (np.bincount(part, minlength=len(keys)) for part in of)
    first, second = _pairs(truth, guess, of, many, found)
    wanted, said = truth[first], guess[second]
    angle = np.abs(fold_azimuth(wanted[:, 3]) - fold_azimuth(said[:, 3]))
    distance = np.abs(wanted[:, 4] - said[:, 4])
    relative = distance / (wanted[:, 4] + _EPS)
    seen = wanted[:, 5] == said[:, 5]
    wrong = (angle > criteria.degrees) | (distance > criteria.centimetres) | (relative > criteria.relative_distance)
    if criteria.onscreen:
        wrong |= ~seen
    of_pairs = np.stack((~wrong, wrong, angle, distance, relative, seen, np.ones(len(first))), axis=1)
    right, misplaced, *rest = _summed(of[0][first], of_pairs, len(keys))
    return keys, np.stack((right, np.maximum(0, found - many), np.maximum(0, many - found), misplaced, *rest), axis=1)


def _pairs(
    truth: np.ndarray, guess: np.ndarray, of: tuple[np.ndarray, np.ndarray], many: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are matched, cell by cell: indices into both tables. `of` has the cell of each row."""
    order, begin = [np.argsort(part, kind="stable") for part in of], [np.cumsum(n) - n for n in (many, found)]
    single = np.flatnonzero((many == 1) & (found == 1))
    pairs = [(order[0][begin[0][single]], order[1][begin[1][single]])]
    for cell in np.flatnonzero((many > 0) & (found > 0) & (many + found > 2)).tolist():
        rows = order[0][begin[0][cell] :][: many[cell]], order[1][begin[1][cell] :][: found[cell]]
        first, second, _ = match(truth[rows[0]], guess[rows[1]])
        pairs.append((rows[0][first], rows[1][second]))
    first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
    by_cell = np.argsort(of[0][first], kind="stable")  # the order in which numbers are added
    return first[by_cell], second[by_cell]


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
    depend on its own threshold alone, so that the best of each class is the best of all combinations. A class
    without any right event at any threshold gets 0.5. Never tune on the data that is reported.
    """
    num_classes = next(iter(outputs.values())).shape[-1]
    steps = np.sort(np.asarray(grid, dtype=np.float32))
    changes = np.zeros((len(SUMS), (len(steps) + 1) * num_classes))
    names = list(outputs)
    for start in range(0, len(names), _TOGETHER):
        part = [(np.asarray(outputs[name], np.float32), reference[name]) for name in names[start : start + _TOGETHER]]
        changes += _changes(part, steps, criteria or Criteria(), strict, elements)
    sums = np.cumsum(changes.reshape(len(SUMS), -1, num_classes), axis=1)[:, :-1]
    ranks = np.searchsorted(steps, np.asarray(grid, dtype=np.float32))
    table = scores_of(np.moveaxis(sums, 1, 0)).classwise[:, 0][ranks]  # (grid, classes)
    best = table.max(axis=0)
    chosen = np.array(grid)[table.argmax(axis=0)]
    return np.where(best > 0, chosen, 0.5), best


_TOGETHER = 256  # files whose frames are looked at as one recording


def _changes(
    files: Sequence[tuple[np.ndarray, np.ndarray]],
    steps: np.ndarray,
    criteria: Criteria,
    strict: bool,
    elements: Sequence[str],
) -> np.ndarray:
    """By how much the sums of `files` (outputs, reference) change from each of the rising thresholds `steps` to the
    next: ``(9, (steps + 1) · classes)``, the first from nothing. Counts are exact, sums of errors up to rounding.

    In a cell, the longest k tracks are active at every threshold from the length of track k + 1 to below that of
    track k: at most three sets of tracks are decoded and matched, however many thresholds there are.
    """
    truths, numbers, begin = [], [], 0
    for output, rows in files:
        rows = np.asarray(rows, np.float64).reshape(-1, 6)
        _check_classes("reference", rows, output.shape[-1])
        end = math.inf if strict else _last_frame(rows)
        truth = rows[rows[:, 0] < end]
        truths.append(truth + np.array([begin, 0, 0, 0, 0, 0]))
        number = np.arange(len(output))
        numbers.append(np.where(number < end, number + begin, -1))
        begin += int(max(len(output), _last_frame(truth) + 1))
    truth, number = np.concatenate(truths), np.concatenate(numbers)  # of frames: where in the joined recording; or out
    values = np.concatenate([output for output, _ in files])[number >= 0]
    number = number[number >= 0]
    num_classes = values.shape[-1]
    length = np.nan_to_num(lengths(values, elements), nan=-np.inf)
    ordered = -np.sort(-length, axis=1)
    ordered = np.concatenate((ordered, np.full_like(ordered[:, :1], -np.inf)), axis=1)
    low = np.searchsorted(steps, ordered)  # the first threshold at which fewer than k + 1 tracks are active
    keys, silent = _cells(truth, truth[:0], criteria)
    total = _summed(keys & _CLASS, silent, (len(steps) + 1) * num_classes)  # nothing said: missed at all thresholds
    for k in range(1, length.shape[1] + 1):
        first, last = low[:, k], low[:, k - 1]  # (frames, classes)
        active = (length >= ordered[:, k - 1 : k]) & (first < last)[:, None]
        found = decode_active(values, active, UNIFY, elements).rows()
        found[:, 0] = number[found[:, 0].astype(int)]
        asked = truth[np.isin(_keys(truth), _keys(found))]
        keys, cells = _cells(asked, found, criteria)
        cells[:, SUMS.index("missed")] -= np.bincount(np.searchsorted(keys, _keys(asked)), minlength=len(keys))
        at = np.searchsorted(number, keys >> 16), keys & _CLASS
        for bound, sign in ((first, 1), (last, -1)):
            total += sign * _summed(bound[at] * num_classes + at[1], cells, total.shape[1])
    return total
