"""Scores of classification over a corpus's folds: mean and deviation, recall of every class, what is taken for what.

:func:`evaluate` makes them of a model that is there, ours or published; ``audio-llm folds`` of those that it trains.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm import audio
from audio_llm import config as recipes
from audio_llm.datasets import folders, sounds
from audio_llm.errors import AudioLLMError, ConfigError, NothingHeardError, describe, nearest, require
from audio_llm.files import append_line, read_lines, write_atomically, write_json, write_lines
from audio_llm.identity import start_digest
from audio_llm.tasks.classification import predict
from audio_llm.tasks.classification.task import class_scores
from eval.benchmarks.base import one_of
from eval.figures.estimates import proportion
from eval.tasks import RECIPE, Options, claim, folds_seen

PREDICTIONS, RUN, SCORES, TABLE, REJECTS = "predictions.jsonl", "run.json", "scores.json", "scores.md", "rejects.jsonl"
ALL = "all"  # the one fold of a folder without any
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


def summarise(seeds: Mapping[int, Mapping[str, Predictions]], labels: Sequence[str]) -> dict[str, Any]:
    """Every fold's scores under every seed, their mean and deviations, recall per class, the pooled confusion.

    Mean and sample standard deviation are over folds, as the corpora's authors ask; ``sd_seeds`` is that of the seeds'
    means. Accuracy and recall over all clips have their 95 % intervals over recordings. Several seeds make neither more
    folds nor more clips: a clip counts once, with the share of seeds that have it right.
    """
    runs = {(fold, seed): lines for seed, folds in seeds.items() for fold, lines in folds.items()}
    each = {run: score(lines, labels) for run, lines in runs.items()}
    names = list(next(iter(each.values())))
    found = {name: {run: scores[name] for run, scores in each.items() if name in scores} for name in names}
    pooled = confusion([line for lines in runs.values() for line in lines], labels)
    clips, silent = _by_clip(runs, labels), np.bincount([labels.index(line["label"]) for line in _clips_of(seeds)])
    return {
        "folds": {fold if len(seeds) == 1 else f"{fold}, seed {seed}": scores for (fold, seed), scores in each.items()},
        "mean": {name: float(np.mean(list(values.values()))) for name, values in found.items()},
        "sd": {name: _deviation(values, 0) for name, values in found.items()},
        "sd_seeds": {name: _deviation(values, 1) for name, values in found.items()},
        "accuracy": _plain("value", [entry for entries in clips.values() for entry in entries]),
        "chance": 1 / len(labels),
        "one_answer": float(silent.max() / silent.sum()),
        "recall": {label: _plain("recall", clips[label]) for label in labels if clips[label]},
        "confusion": pooled.tolist(),
        "labels": list(labels),
    }


def _clips_of(seeds: Mapping[int, Mapping[str, Predictions]]) -> list[Mapping[str, Any]]:
    return [line for lines in next(iter(seeds.values())).values() for line in lines]


def _by_clip(runs: Mapping[tuple[str, int], Predictions], labels: Sequence[str]) -> dict[str, list[tuple[float, str]]]:
    """By class, of every clip the share of seeds that have it right, and its recording."""
    right: dict[tuple[str, str, str, str], list[bool]] = defaultdict(list)
    for (fold, _), lines in runs.items():
        for number, line in enumerate(lines):
            clip = str(line.get("clip", number))
            key = (line["label"], fold, clip, str(line.get("recording") or f"{fold} {clip}"))
            right[key].append(labels[int(np.argmax(line["probabilities"]))] == line["label"])
    found: dict[str, list[tuple[float, str]]] = {label: [] for label in labels}
    for (label, _, _, recording), values in right.items():
        found[label].append((float(np.mean(values)), recording))
    return found


def _plain(name: str, clips: Sequence[tuple[float, str]]) -> dict[str, float]:
    estimate = proportion(np.array([value for value, _ in clips]), np.array([recording for _, recording in clips]))
    return {name: estimate.value, "low": estimate.low, "high": estimate.high, "clips": estimate.n}


def _deviation(values: Mapping[tuple[str, int], float], part: int) -> float | None:
    """Sample standard deviation of the means over folds (`part` 0) or seeds (1); None of a single one."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for run, value in values.items():
        groups[run[part]].append(value)
    return float(np.std([np.mean(found) for found in groups.values()], ddof=1)) if len(groups) > 1 else None


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
        if label not in scores["recall"]:  # the model knows it, the folder has none
            continue
        entry, others = scores["recall"][label], np.array(scores["confusion"][index])
        others[index] = 0
        taken = f"{scores['labels'][int(others.argmax())]} ({others.max()})" if others.any() else ""
        interval = f"{100 * entry['low']:.0f} to {100 * entry['high']:.0f}"
        lines.append(f"| {label} | {100 * entry['recall']:.1f} | {interval} | {entry['clips']} | {taken} |")
    return "\n".join(lines)


def headline(scores: Mapping[str, Any]) -> str:
    """Mean accuracy ± deviation over the folds in percent, its interval, and what needs no listening."""
    mean, spread = (_number("accuracy", scores[kind]["accuracy"]) for kind in ("mean", "sd"))
    folds = len({name.partition(", seed ")[0] for name in scores["folds"]})
    over = f" ± {spread} % over {folds} folds" if folds > 1 else " % on one fold"
    if (seeds := scores["sd_seeds"]["accuracy"]) is not None:
        over += f", ± {_number('accuracy', seeds)} over {len(scores['folds']) // folds} seeds"
    low, high = (_number("accuracy", scores["accuracy"][end]) for end in ("low", "high"))
    silent = f"one answer to all, as in silence, {_number('accuracy', scores['one_answer'])}"
    return f"{mean}{over} [{low}, {high}]; chance {_number('accuracy', scores['chance'])}, {silent}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "log_loss" else f"{100 * value:.1f}"


# ------------------------------------------------------------------------------------------- of a model that is there


def line_of(classifier: predict.Classifier, clip: sounds.Clip, fold: str) -> dict[str, Any]:
    """The line of ``predictions.jsonl`` of a clip. Raises :class:`AudioLLMError` for one that cannot be heard."""
    found = classifier.predict(audio.decode(str(clip.path)), name=clip.name)
    line: dict[str, Any] = {"clip": clip.name, "recording": clip.recording, "fold": fold, "label": clip.label}
    if clip.foreground is not None:
        line["foreground"] = clip.foreground
    guess = found.labels[found.best]
    return line | {"guess": guess, "probabilities": [round(float(p), 6) for p in found.probabilities]}


def evaluate(model: str | Path, data: Sequence[str], out: Path, options: Options) -> str:
    """Score a classifier on a labelled sound folder: of a folder of folds every model on the fold it was tested on.

    ``--option folds=1,2`` hears these alone; ``seen=true`` lets folds be heard that the model was trained or chosen on.
    Raises :class:`ConfigError` for such folds, and for classes that the model does not know.
    """
    if len(data) > 1:
        raise ConfigError(describe("data", "one folder of labelled sounds", str(len(data))))
    if unknown := sorted(set(options.pairs) - {"folds", "seen"}):
        raise ConfigError(
            describe("--option", "folds, seen", f"'{unknown[0]}'{nearest(unknown[0], ('folds', 'seen'))}")
        )
    library = sounds.find(data[0])
    if left_out := folders.told(library.left_out):
        print(left_out, file=sys.stderr)
    members = predict.folds_of(Path(model))
    clips = _chosen(library, options.pairs.get("folds"), list(members))
    seen, note = _seen(Path(model), Path(data[0]), clips, bool(members))
    if seen and one_of(options.pairs, "seen", ("false", "true")) != "true":
        cure = "Name other folds (--option folds=…), or add --option seen=true, and the scores will say so."
        expected = "clips that the model was neither trained nor chosen on"
        raise ConfigError(describe(f"folds of {data[0]}", expected, ", ".join(seen), cure))
    first = predict.load(model, fold=next(iter(clips)) if members else None)
    labels = first.labels
    if strange := sorted({clip.label for part in clips.values() for clip in part} - set(labels)):
        found = f"'{strange[0]}'{nearest(strange[0], labels)}"
        raise ConfigError(describe(f"classes of {model}", f"those of the sounds ({', '.join(labels[:4])}, …)", found))
    if options.overwrite:
        for name in (PREDICTIONS, RUN, SCORES, TABLE, REJECTS):
            (out / name).unlink(missing_ok=True)
    weights = [start_digest(path) for fold in clips for path in members.get(fold, [])] or [start_digest(model)]
    facts = {"model": Path(model).name, "sha256": weights, "folds": list(clips), "seen": seen}
    claim(out / RUN, facts, {"sounds": sounds.SoundFolder(library.clips, library.dataset).fingerprint}, {})
    rejects = _hear(first, clips, Path(model) if members else None, out, quiet=options.quiet)
    lines = read_lines(out / PREDICTIONS)
    if not lines:
        found = f"none of {len(rejects)}: {rejects[0]['reason']}"
        raise NothingHeardError(describe(f"evaluation of {model}", "clips that can be heard", found))
    if rejects:
        print(f"{len(rejects)} clips could not be heard, see {out / REJECTS}", file=sys.stderr)
    by_fold = {fold: [line for line in lines if line["fold"] == fold] for fold in clips}
    scores = summarise({0: {fold: part for fold, part in by_fold.items() if part}}, labels) | {
        "dataset": library.dataset,
        "seen": seen,
        "rejects": len(rejects),
    }
    write_json(out / SCORES, scores)
    write_atomically(out / TABLE, table(scores) + "\n")
    return "\n".join([table(scores), "", f"accuracy {headline(scores)}", *note])


def _chosen(library: sounds.Library, folds: str | None, tested: Sequence[str]) -> dict[str, list[sounds.Clip]]:
    """Clips by fold: those named, else those that `tested` has a model for, else all."""
    if not tested and folds is None and any(clip.fold is None for clip in library.clips):
        return {ALL: library.clips}
    official = sounds.official_folds(library)
    known = [fold for fold in official if fold in tested] if tested else list(official)
    asked = folds.split(",") if folds else known
    if unknown := [fold for fold in asked if fold not in known] or ([] if asked else ["none"]):
        expected = f"folds of {library.dataset} that there is a model for" if tested else f"folds of {library.dataset}"
        raise ConfigError(describe("folds", f"{expected} ({', '.join(known) or 'none'})", f"'{unknown[0]}'"))
    return {fold: official[fold] for fold in asked}


def _seen(model: Path, data: Path, folds: Mapping[str, Any], tested: bool) -> tuple[list[str], list[str]]:
    """Which of `folds` a model saw, and what is to be said of it. Members of a folder of folds did not see theirs."""
    if tested:
        return [], []
    known = folds_seen(model)
    if known is not None and not known:  # of a run on all clips of its folders
        trained = recipes.read(model / RECIPE).get("train") or []
        known = set(folds) if data.resolve() in {Path(path).resolve() for path in trained} else None
    if known is None:
        return [], ["What this model was trained on is not known: the scores hold for clips that it has not heard."]
    seen = sorted(set(folds) & known, key=lambda fold: (len(fold), fold))
    return seen, [f"seen in training or by what was chosen: {', '.join(seen)}"] if seen else []


def _hear(
    classifier: predict.Classifier,
    folds: Mapping[str, Sequence[sounds.Clip]],
    members: Path | None,
    out: Path,
    *,
    quiet: bool,
) -> list[dict[str, str]]:
    """Answer what is not answered yet in ``predictions.jsonl``; returns what could not be heard.

    `classifier` is that of the first fold, those of the others are in the folder `members`; without it, it hears all.
    """
    from tqdm import tqdm

    done = {(line["fold"], line["clip"]) for line in read_lines(out / PREDICTIONS)}
    labels, rejects = classifier.labels, []
    for number, (fold, clips) in enumerate(folds.items()):
        if members is not None and number:
            classifier = predict.load(members, fold=fold)
        if classifier.labels != labels:
            raise ConfigError(describe(f"model of fold {fold}", "the classes of the others", "other ones"))
        for clip in tqdm(clips, desc=f"fold {fold}", unit="clip", leave=False, disable=quiet):
            if (fold, clip.name) in done:
                continue
            try:
                append_line(out / PREDICTIONS, line_of(classifier, clip, fold))
            except AudioLLMError as error:
                rejects.append({"clip": clip.name, "reason": str(error)})
    write_lines(out / REJECTS, rejects)
    return rejects


# -------------------------------------------------------------------------------------------------------- the picture


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
    axes.set_title(f"{title}\n{scores['accuracy']['clips']} clips, rows in percent", size=9)
    axes.spines[:].set_visible(False)
    if len(labels) <= 20:  # beyond that the numbers are smaller than the eye
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=colour, size=8)
    figure.savefig(path, dpi=120)
