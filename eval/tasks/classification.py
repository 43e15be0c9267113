"""Scores of classification over a corpus's folds: mean and deviation, recall of every class, what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.errors import require
from audio_llm.tasks.classification.task import class_scores
from eval.figures.estimates import proportion

Predictions = Sequence[Mapping[str, Any]]  # lines of predictions.jsonl: clip, recording, label, probabilities


def confusion(predictions: Predictions, labels: Sequence[str]) -> np.ndarray:
    """Counts ``(truth, answer)``."""
    where = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for line in predictions:
        counts[where[line["label"]], int(np.argmax(line["probabilities"]))] += 1
    return counts


def score(predictions: Predictions, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro recall, macro F1 and log loss of one fold; by salience where the corpus tells it."""
    where = {label: index for index, label in enumerate(labels)}
    truth = np.array([where[line["label"]] for line in predictions])
    probabilities = np.array([line["probabilities"] for line in predictions])
    scores = class_scores(probabilities, truth)
    del scores["score"]
    right = probabilities.argmax(axis=1) == truth
    for name, wanted in (("foreground_accuracy", True), ("background_accuracy", False)):
        part = np.array([line.get("foreground") is wanted for line in predictions])
        if part.any():
            scores[name] = float(right[part].mean())
    return scores


def summarise(folds: Mapping[str, Predictions], labels: Sequence[str]) -> dict[str, Any]:
    """Every fold's scores, their mean and sample standard deviation, recall per class and the pooled confusion.

    Mean and deviation are over folds, as the corpora's authors ask; recall is over all clips, with its 95 % interval,
    of which a recording is the unit where several clips are of one.
    """
    each = {name: score(predictions, labels) for name, predictions in folds.items()}
    names = list(next(iter(each.values())))
    values = {name: np.array([scores[name] for scores in each.values() if name in scores]) for name in names}
    lines = [line for predictions in folds.values() for line in predictions]
    recall = {}
    for index, label in enumerate(labels):
        mine = [line for line in lines if line["label"] == label]
        right = np.array([int(np.argmax(line["probabilities"])) == index for line in mine], dtype=float)
        estimate = proportion(right, clusters=np.array([line["recording"] for line in mine]))
        recall[label] = {"recall": estimate.value, "low": estimate.low, "high": estimate.high, "clips": estimate.n}
    return {
        "folds": each,
        "mean": {name: float(found.mean()) for name, found in values.items()},
        "sd": {name: float(found.std(ddof=1)) if len(found) > 1 else None for name, found in values.items()},
        "recall": recall,
        "confusion": confusion(lines, labels).tolist(),
        "labels": list(labels),
    }


def table(scores: Mapping[str, Any]) -> str:
    """Markdown: a row per fold and their mean ± sd, then the recall of every class and what it is mostly taken for."""
    names = list(scores["mean"])
    lines = ["| fold | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for fold, found in scores["folds"].items():
        lines.append(f"| {fold} | " + " | ".join(_number(name, found.get(name)) for name in names) + " |")
    spread = {name: "" if sd is None else f" ± {_number(name, sd)}" for name, sd in scores["sd"].items()}
    means = [_number(name, scores["mean"][name]) + spread[name] for name in names]
    lines += ["| **mean ± sd** | " + " | ".join(means) + " |", "", "| class | recall | 95 % | clips | taken for |"]
    lines.append("|---|---|---|---|---|")
    for index, label in enumerate(scores["labels"]):
        entry, others = scores["recall"][label], np.array(scores["confusion"][index])
        others[index] = 0
        taken = f"{scores['labels'][int(others.argmax())]} ({others.max()})" if others.any() else ""
        interval = f"{100 * entry['low']:.0f} to {100 * entry['high']:.0f}"
        lines.append(f"| {label} | {100 * entry['recall']:.1f} | {interval} | {entry['clips']} | {taken} |")
    return "\n".join(lines)


def headline(scores: Mapping[str, Any]) -> str:
    """Mean accuracy ± deviation over the folds, in percent; of one fold there is no deviation."""
    mean, spread = _number("accuracy", scores["mean"]["accuracy"]), scores["sd"]["accuracy"]
    if spread is None:
        return f"{mean} % on one fold"
    return f"{mean} ± {_number('accuracy', spread)} % over {len(scores['folds'])} folds"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "log_loss" else f"{100 * value:.1f}"


def require_drawing() -> None:
    """Say so before hours of training, not after them, when the picture cannot be drawn."""
    require("matplotlib", "the picture of the confusion matrix", "demo")


def draw_confusion(scores: Mapping[str, Any], path: str | Path, title: str) -> None:
    """The confusion matrix as a picture, rows in percent of their class; the format is the path's suffix."""
    require_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    counts, labels = np.array(scores["confusion"]), scores["labels"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(5.0, 0.45 * len(labels) + 2.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("report", ["#fbfbfa", "#0072b2"])  # the report's page and first series
    axes.imshow(shares, cmap=colours, vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(f"{title}\n{counts.sum()} clips, chance {100 / len(labels):.1f} %, rows in percent")
    axes.spines[:].set_visible(False)
    if len(labels) <= 20:  # beyond that the numbers are smaller than the eye
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=colour, size=8)
    figure.savefig(path, dpi=120)
