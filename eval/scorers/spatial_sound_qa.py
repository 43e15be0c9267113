"""SpatialSoundQA's figures: what the paper reports (BAT, Zheng et al. 2024) and what shows how they came about.

Rows are scored by :mod:`eval.scorers.open_answers`; this file adds what only many rows have: F1 over labels, mean
average precision by text embeddings, distance error rates at several tolerances, balance of yes and no.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from audio_llm.datasets.reverberation import read_classes
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.language.quantities import read_distance
from audio_llm.language.replies import normalise, read_labels
from eval.embedders import CharacterNgrams, LocalEncoder, Table, TextEmbedder, unit
from eval.figures.estimates import Estimate, average, proportion, share
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, unscored
from eval.scorers.open_answers import answer_kind, score_open

TOLERANCES = (0.0, 0.5, 1.0)  # metres; answers stand on a grid of 0.5 m, so that 0 asks for the exact step
AT_ONCE = 1024  # answers embedded together: tens of megabytes, whatever the number of answers
NONBINARY = ("MIXUP_NONBINARY_DISTANCE", "MIXUP_NONBINARY_SOURCE", "MIXUP_NONBINARY_DIRECTION")
Pair = tuple[Prediction, Score]


class SpatialSoundQA:
    """Value of a row: label set exactly right, all direction words right, distance within 0.5 m, yes/no right."""

    name = "spatial-sound-qa"
    version = "2"
    title = "SpatialSoundQA"
    ranked_by = ""  # the paper ranks every kind of question by a figure of its own

    def score(self, row: Prediction) -> Score | None:
        return None if unscored(row) or row.choices else score_open(row)

    def aggregate(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, float]:
        """Figures by name. Shares are of 1, ``MAE`` is in metres over the distances that could be read."""
        pairs = list(zip(rows, scores, strict=True))
        figures = {"parse failures": _mean([not score.parsed for _, score in pairs])}
        for name, found in _by(pairs, lambda row: answer_kind(row)).items():
            figures |= {f"{name}: {figure}": value for figure, value in FIGURES[name](found).items()}
        types = _by(pairs, lambda row: row.question_type)
        figures |= {f"{name}: accuracy": _accuracy(found) for name, found in types.items()}
        binary = [_accuracy(types[name]) for name in ("MIXUP_DIRECTION", "MIXUP_DISTANCE_BOTH") if name in types]
        if len(binary) == 2:
            figures["binary accuracy, mean of direction and distance"] = _mean(binary)
        open_ended = [_accuracy(types[name]) for name in NONBINARY if name in types]
        if open_ended:
            figures["non-binary accuracy, mean of types"] = _mean(open_ended)
        return figures

    def intervals(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, Estimate]:
        """Of the micro F1 of labels and of distance errors, over clusters."""
        found: dict[str, Estimate] = {}
        for name, pairs in _by(list(zip(rows, scores, strict=True)), lambda row: answer_kind(row)).items():
            clusters = np.array([row.cluster for row, _ in pairs])
            if name in INTERVALS:
                found |= {f"{name}: {figure}": value for figure, value in INTERVALS[name](pairs, clusters).items()}
        return found


def _by(pairs: Sequence[Pair], name: Callable[[Prediction], str]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for row, score in pairs:
        groups[name(row)].append((row, score))
    return dict(sorted(groups.items()))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _accuracy(pairs: Sequence[Pair]) -> float:
    return _mean([score.value for _, score in pairs])


def labels_figures(pairs: Sequence[Pair]) -> dict[str, float]:
    """Exact set; F1 over (item, label) pairs; F1 by class, averaged over the classes of the gold answers."""
    said = [read_labels(score.answer or "") for _, score in pairs]
    gold = [read_labels(row.gold) for row, _ in pairs]
    hits: Counter[str] = Counter()
    told: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for mine, true in zip(said, gold, strict=True):
        hits.update(mine & true)
        told.update(mine)
        asked.update(true)
    by_class = [2 * hits[label] / (told[label] + asked[label]) for label in asked]
    total = told.total() + asked.total()
    return {
        "exact set": _accuracy(pairs),
        "micro F1": 2 * hits.total() / total if total else math.nan,
        "macro F1": _mean(by_class),
    }


def label_intervals(pairs: Sequence[Pair], clusters: np.ndarray) -> dict[str, Estimate]:
    said = [(read_labels(score.answer or ""), read_labels(row.gold)) for row, score in pairs]
    hits = np.array([2 * len(mine & true) for mine, true in said])
    labels = np.array([len(mine) + len(true) for mine, true in said])
    return {"micro F1": share(hits, labels, clusters)} if labels.any() else {}


def direction_figures(pairs: Sequence[Pair]) -> dict[str, float]:
    """Share right by axis, and of all asked axes together (the paper's DoA accuracy)."""
    axes = sorted({axis for _, score in pairs for axis in score.parts if "/" in axis})
    figures = {axis: _mean([score.parts[axis] for _, score in pairs if axis in score.parts]) for axis in axes}
    return {"all axes": _accuracy(pairs), **figures}


def distance_figures(pairs: Sequence[Pair]) -> dict[str, float]:
    """Distance error rate: share of answers farther off than a tolerance, or without a distance; mean error."""
    errors = _distance_errors(pairs)
    read = [error for error in errors if math.isfinite(error)]
    rates = {f"DER beyond {limit:g} m": _mean([error > limit + 1e-9 for error in errors]) for limit in TOLERANCES}
    return {**rates, "MAE (m)": _mean(read), "without a distance": 1 - len(read) / len(errors)}


def distance_intervals(pairs: Sequence[Pair], clusters: np.ndarray) -> dict[str, Estimate]:
    errors = np.array(_distance_errors(pairs))
    found = {f"DER beyond {limit:g} m": proportion(errors > limit + 1e-9, clusters) for limit in TOLERANCES}
    read = np.isfinite(errors)
    return found | ({"MAE (m)": average(errors[read], clusters[read])} if read.any() else {})


def _distance_errors(pairs: Sequence[Pair]) -> list[float]:
    """In metres; infinite where no distance could be read."""
    errors = []
    for row, _ in pairs:
        said, gold = read_distance(row.reply().said), read_distance(row.gold)
        errors.append(math.inf if said is None or gold is None else abs(said - gold))
    return errors


def yes_no_figures(pairs: Sequence[Pair]) -> dict[str, float]:
    """Accuracy, its mean over both golds, and the shares of yes: a model that always says yes shows here."""
    golds = [normalise(row.gold) for row, _ in pairs]
    recalls = [
        _mean([score.value for gold, (_, score) in zip(golds, pairs, strict=True) if gold == word])
        for word in ("yes", "no")
    ]
    return {
        "accuracy": _accuracy(pairs),
        "balanced accuracy": _mean([recall for recall in recalls if math.isfinite(recall)]),
        "yes among gold answers": _mean([gold == "yes" for gold in golds]),
        "yes among answers": _mean([score.answer == "yes" for _, score in pairs]),
    }


FIGURES: dict[str, Callable[[Sequence[Pair]], dict[str, float]]] = {
    "labels": labels_figures,
    "yes_no": yes_no_figures,
    "distance": distance_figures,
    "direction": direction_figures,
    "place": lambda pairs: {**direction_figures(pairs), **distance_figures(pairs)},
    "choice": lambda pairs: {},
}


INTERVALS: dict[str, Callable[[Sequence[Pair], np.ndarray], dict[str, Estimate]]] = {
    "labels": label_intervals,
    "distance": distance_intervals,
    "place": distance_intervals,
}


class LabelSimilarity:
    """How near the words of a label answer are to the gold answer, and the published mAP over classes.

    The whole answer is embedded once and every class is scored by its cosine with it; average precision by class is
    taken over all answers (``calculate_map.py`` of the published code, which embeds over a paid service). Settings:
    ``embedder`` is ``characters`` or a local encoder folder; ``classes`` the CSV of class names (default: the labels
    of the gold answers); ``class_table`` and ``answer_table`` give vectors instead (they must be of one model).
    """

    name = "label-similarity"
    version = "1"
    SETTINGS = ("embedder", "classes", "class_table", "answer_table")

    def __init__(
        self,
        embedder: TextEmbedder | None = None,
        classes: Sequence[str] | None = None,
        class_table: TextEmbedder | None = None,
    ) -> None:
        self._answers: TextEmbedder = embedder or CharacterNgrams()
        self._labels: TextEmbedder = class_table or self._answers
        self._classes = list(classes) if classes is not None else None
        names = dict.fromkeys([self._answers.name, self._labels.name])
        self.title = f"Label similarity by {' and '.join(names)}"

    @property
    def embedder(self) -> str:
        """What answers are compared by."""
        return self._answers.name

    def configured(self, options: Mapping[str, str]) -> LabelSimilarity:
        for name in options:
            if name not in self.SETTINGS:
                known = ", ".join(self.SETTINGS)
                raise ConfigError(describe(f"scorer '{self.name}'", known, f"'{name}'{nearest(name, self.SETTINGS)}"))
        if ("class_table" in options) != ("answer_table" in options):
            raise ConfigError(
                describe(f"scorer '{self.name}'", "class_table together with answer_table", "one of them")
            )
        kind = options.get("embedder", "characters")
        embedder: TextEmbedder = CharacterNgrams() if kind == "characters" else LocalEncoder(kind)
        tables = [Table(options[name]) for name in ("answer_table", "class_table") if name in options]
        if tables:
            embedder = tables[0]
        classes = list(read_classes(options["classes"]).values()) if "classes" in options else None
        return LabelSimilarity(embedder, classes, tables[1] if tables else None)

    def score(self, row: Prediction) -> Score | None:
        """Cosine of answer and gold answer, at least 0; only for questions that ask for labels."""
        if unscored(row) or row.choices or answer_kind(row) != "labels":
            return None
        said = row.reply().said
        if not said:
            return Score(row.id, row.question_type, 0.0, None, f"no answer to read; gold {row.gold}", False)
        mine, true = self._answers([said])[0], self._labels_of(row.gold)
        value = float(np.clip(mine @ true, 0.0, 1.0))
        note = f"cosine {value:.3f} with the gold labels {row.gold}, by {self._answers.name}"
        return Score(row.id, row.question_type, value, said, note, True)

    def _labels_of(self, gold: str) -> np.ndarray:
        return unit(self._labels(gold_labels(gold)).sum(axis=0, keepdims=True))[0]

    def aggregate(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> dict[str, float]:
        """mAP over the classes that occur, and over all classes with 0 for the others (as published)."""
        similarity, targets = self.compared(rows, scores)
        precisions, count = precisions_of(similarity, targets), targets.shape[1]
        name = self._answers.name
        return {
            f"mAP over classes that occur ({name})": _mean(precisions),
            f"mAP over all {count} classes ({name})": float(np.sum(precisions)) / count,
        }

    def compared(self, rows: Sequence[Prediction], scores: Sequence[Score]) -> tuple[np.ndarray, np.ndarray]:
        """(rows, classes) each: the cosine of every answer with every class, and whether the gold answer names it."""
        golds = [gold_labels(row.gold) for row in rows]
        classes = self._classes or sorted({label for gold in golds for label in gold})
        unknown = {label for gold in golds for label in gold} - set(classes)
        if unknown:
            raise ConfigError(
                describe("classes", f"the label '{sorted(unknown)[0]}' of a gold answer", "no such class")
            )
        targets = np.array([[label in gold for label in classes] for gold in golds], dtype=bool)
        similarity = np.zeros(targets.shape)
        told = [place for place, score in enumerate(scores) if score.answer]
        of_classes = self._labels(classes)
        for start in range(0, len(told), AT_ONCE):
            places = told[start : start + AT_ONCE]
            similarity[places] = self._answers([str(scores[place].answer) for place in places]) @ of_classes.T
        return similarity, targets


def precisions_of(similarity: np.ndarray, targets: np.ndarray) -> list[float]:
    """The average precision of every class that occurs, of (rows, classes) each."""
    from audio_llm.tasks.scores import average_precision

    present = np.flatnonzero(targets.any(axis=0))
    return [average_precision(similarity[:, place], targets[:, place]) for place in present]


def gold_labels(gold: str) -> list[str]:
    """The labels of a ``"; "`` list in lower case, commas and parentheses kept, as class tables have them."""
    return [label for part in gold.split(";") if (label := part.strip().lower())]


SCORERS: tuple[Scorer, ...] = (SpatialSoundQA(), LabelSimilarity())
