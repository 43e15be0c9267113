"""The metric of DCASE 2025 task 3: F-score, direction, distance and relative distance errors of matched events.

Per frame and class, references and predictions are matched by the least total angle between folded azimuths (Politis et
al. 2025; F20°/1: right within 20 degrees and a relative distance error of 1). Everything a file contributes is a sum,
so that scores of any set of files, leave-one-out included, cost one subtraction: `file_counts` gives the sums,
`scores_of` the scores (both in :mod:`audio_llm.tasks.seld.scores`), :func:`jackknife` their intervals.

``strict=False`` is the official implementation bit for bit. That one scores neither the last annotated frame of a file
nor anything after it, nothing in a file without references, and no file whose prediction is missing; ``strict=True``
scores all of these.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from audio_llm.datasets.folders import files_below
from audio_llm.datasets.seld_tables import FRAME_SECONDS, fold_azimuth, read_rows, write_rows
from audio_llm.encoders.seld_head import CLASSES
from audio_llm.errors import ConfigError, ShardError, describe, nearest
from audio_llm.tasks.seld.scores import Average, Criteria, Scores, file_counts, scores_of

Groups = Literal["recordings", "rooms", "clips"]


class Interval(NamedTuple):
    """Jackknife estimates: each array of the shape of what was estimated."""

    estimate: np.ndarray
    bias: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray


def jackknife(
    sums: np.ndarray, groups: Sequence[str] | None = None, average: Average = "macro"
) -> tuple[Interval, Interval]:
    """Intervals of the five scores and of the classwise ones from the sums of files ``(files, 9, classes)``.

    Leaves out one file at a time, or all files of one of `groups` (one name per file): windows of one recording are not
    independent, and leaving out single windows makes intervals too narrow (see :attr:`Evaluation.independent`). Needs
    two.
    """
    if groups is not None:
        names, index = np.unique(list(groups), return_inverse=True)
        pooled = np.zeros((len(names), *sums.shape[1:]))
        np.add.at(pooled, index, sums)
        sums = pooled
    if len(sums) < 2:
        raise ConfigError(describe("jackknife", "at least two files or groups", str(len(sums))))
    total = sums.sum(axis=0)
    whole, without = scores_of(total, average), scores_of(total - sums, average)
    return (
        jackknife_interval(whole.values, without.values),
        jackknife_interval(whole.classwise, without.classwise),
    )


def jackknife_interval(whole: np.ndarray, without: np.ndarray, confidence: float = 0.95) -> Interval:
    """Jackknife (Efron & Tibshirani 1993, ch. 11) from a statistic and its leave-one-out values ``(n, ...)``."""
    from scipy.stats import t

    count = len(without)
    mean = without.mean(axis=0)
    bias = (count - 1) * (mean - whole)
    error = np.sqrt((count - 1) * np.square(without - mean).mean(axis=0))
    estimate = np.asarray(whole - bias)
    margin = t.ppf(0.5 + confidence / 2, count - 1) * error
    return Interval(estimate, bias, error, estimate - margin, estimate + margin)


# --------------------------------------------------------------------------------------------------------------- files


def recording_of(name: str) -> str:
    """The recording a clip was cut from: ``fold4_room8_mix003_deg120_start0042.wav`` → ``fold4_room8_mix003``."""
    match = re.match(r"(.*?fold\d+_room\d+_mix\d+)", Path(name).name)
    return match[1] if match else Path(name).stem


def room_of(name: str) -> str:
    """The room a clip was recorded in: ``fold4_room8_mix003_deg120_start0042.wav`` → ``fold4_room8``."""
    match = re.match(r"(.*?fold\d+_room\d+)", Path(name).name)
    return match[1] if match else Path(name).stem


_GROUP_OF: dict[str, Callable[[str], str]] = {"recordings": recording_of, "rooms": room_of, "clips": str}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The sums of every scored file, by which all scores are made."""

    names: list[str]
    sums: np.ndarray  # (files, 9, classes)
    missing: list[str]  # references without a prediction: left out, or with `strict` counted as all missed

    def scores(self, average: Average = "macro") -> Scores:
        return scores_of(self.sums.sum(axis=0), average)

    def groups(self, over: Groups) -> list[str]:
        """The recording or the room of every file, or the file itself."""
        return [_GROUP_OF[over](name) for name in self.names]

    @property
    def independent(self) -> Groups:
        """The smallest groups that names tell of: recordings, rooms where no two clips are of one recording, or clips.

        The second are scenes made one by one (``audio-llm prep``): those of a room share its echoes and its sounds.
        """
        names: tuple[Groups, ...] = ("recordings", "rooms")
        return next((over for over in names if len(set(self.groups(over))) < len(self.names)), "clips")

    def intervals(self, average: Average = "macro", over: Groups | None = None) -> tuple[Interval, Interval]:
        """:func:`jackknife` over recordings, rooms or clips; by default over those that are :attr:`independent`."""
        return jackknife(self.sums, self.groups(over or self.independent), average)


def score_tables(
    reference: Mapping[str, np.ndarray],
    predicted: Mapping[str, np.ndarray],
    criteria: Criteria | None = None,
    strict: bool = False,
    num_classes: int = len(CLASSES),
) -> Evaluation:
    """Score tables by name. Raises :class:`ShardError` for a prediction without a reference, or when there are none."""
    for name in predicted:
        if name not in reference:
            raise ShardError(f"prediction {name}: there is no reference of that name{nearest(name, reference)}.")
    missing = sorted(set(reference) - set(predicted))
    names = sorted(reference) if strict else sorted(predicted)
    if not names:
        raise ShardError(describe("predictions", "at least one file", "none"))
    nothing = np.zeros((0, 6))
    sums = [file_counts(reference[name], predicted.get(name, nothing), criteria, strict, num_classes) for name in names]
    return Evaluation(names, np.stack(sums), missing)


def read_folder(folder: str | Path) -> dict[str, np.ndarray]:
    """All CSV tables below a folder, by file name. Raises :class:`ShardError` when there are none, or two of a name."""
    tables: dict[str, np.ndarray] = {}
    for path in files_below(Path(folder), endings=(".csv",)):
        if path.name in tables:
            raise ShardError(describe(f"folder {folder}", "one table of each name", f"two of {path.name}"))
        tables[path.name] = read_rows(path)
    if not tables:
        raise ShardError(describe(f"folder {folder}", "CSV tables", "none"))
    return tables


def write_submission(folder: str | Path, tables: Mapping[str, np.ndarray], names: Sequence[str]) -> int:
    """Tables as one CSV per clip of the evaluation set, for every one of `names`. Returns the number of events.

    Raises :class:`ShardError` where a clip was not predicted, an azimuth cannot come from stereo once it is folded, or
    a frame lies beyond 5 s.
    """
    frames = round(5.0 / FRAME_SECONDS)
    absent = [name for name in names if name not in tables]
    if absent:
        raise ShardError(describe("submission", f"predictions for {len(names)} clips", f"none for {absent[0]}"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    total = 0
    for name in names:
        rows = tables[name].copy()
        if len(rows) and rows[:, 0].max() >= frames:
            raise ShardError(describe(f"submission, {name}", f"frames 0 to {frames - 1}", str(int(rows[:, 0].max()))))
        rows[:, 3] = np.round(fold_azimuth(rows[:, 3]))
        write_rows(Path(folder) / f"{Path(name).stem}.csv", rows)
        total += len(rows)
    return total
