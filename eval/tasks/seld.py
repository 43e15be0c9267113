"""Stereo SELD from a folder of clips to a table of results: predictions as CSV files, official scores, a submission.

A run folder holds ``predictions/NAME.csv`` (one per clip, written one by one: a run that was stopped goes on),
``rejects.jsonl``, ``run.json`` (the model, the data and what was asked) and ``scores.json``. Scores are always made
anew from the predictions; tables of other people's systems are scored the same way (:func:`score`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from audio_llm.audio import Waveform
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.datasets.folders import files_below
from audio_llm.datasets.seld_tables import FRAME_SECONDS
from audio_llm.errors import AudioLLMError, ConfigError, NothingHeardError, describe, nearest
from audio_llm.files import content_hash, write_json, write_lines
from audio_llm.model.folder import CONFIG, WEIGHTS
from audio_llm.tasks.seld.predict import load, locate_file
from audio_llm.tasks.seld.predict import recognises as is_model
from audio_llm.tasks.seld.scores import SCORES, Average, Criteria
from eval.benchmarks.base import one_of
from eval.tasks import Options, claim, folds_seen
from eval.tasks.seld_metric import Evaluation, Groups, read_folder, score_tables, write_submission

PREDICTIONS, SUBMISSION, RUN, RESULT, REJECTS = "predictions", "submission", "run.json", "scores.json", "rejects.jsonl"
STANDS_OUT = 1.0  # dB, about the smallest difference of level that is heard
_SWITCHES = {"true": True, "false": False}
_CHOICES = {"part": ("development", "evaluation"), "average": ("macro", "micro"), "intervals": get_args(Groups)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is heard, when it counts as heard, and how it is scored. The defaults are the challenge's."""

    part: Literal["development", "evaluation"] = "development"  # evaluation: tables are hidden, a submission is written
    folds: tuple[str, ...] = (dcase_seld.TEST_FOLD,)  # or rooms, of the development set
    threshold: float | None = None  # None: the model's own, one per class, found on its validation clips
    criteria: Criteria = dataclasses.field(default_factory=Criteria)
    average: Average = "macro"
    strict: bool = False
    intervals: Groups | None = (
        None  # jackknife over these; None: over recordings, where names tell them, else over rooms
    )
    seen: bool = False  # hear what trained the model or was chosen on as well, and say so


def parse_settings(options: Mapping[str, str]) -> Settings:
    """Of ``--option KEY=VALUE``. Raises :class:`ConfigError` for unknown keys and values."""
    criteria = {field.name: field for field in dataclasses.fields(Criteria)}
    known = ("part", "folds", "threshold", "average", "strict", "intervals", "seen", *criteria)
    values: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise ConfigError(describe("--option", ", ".join(known), f"'{key}'{nearest(key, known)}"))
        if key == "folds":
            values[key] = tuple(text.split(","))
        elif key in _CHOICES:
            values[key] = one_of(options, key, _CHOICES[key])
        elif key in ("strict", "seen", "onscreen"):
            (places if key == "onscreen" else values)[key] = _SWITCHES[one_of(options, key, tuple(_SWITCHES))]
        elif key == "threshold":
            values["threshold"] = _number(key, text)
        else:
            places[key] = _number(key, text)
    return Settings(**values, criteria=Criteria(**places))


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ConfigError(describe(f"--option {key}", "a number above 0", f"'{text}'"))
    return value


def recognises(path: Path) -> bool:
    """Whether `path` is a model of events in time, or a folder of tables that any system predicted."""
    return is_model(path) or is_table_folder(path)


def is_table_folder(folder: str | Path) -> bool:
    """Whether `folder` has predictions as CSV tables and is no model."""
    folder = Path(folder)
    return folder.is_dir() and not (folder / CONFIG).is_file() and bool(files_below(folder, endings=(".csv",)))


def evaluate(model: str | Path, data: Sequence[str], out: Path, options: Options) -> str:
    """Hear the clips of a folder of stereo SELD and score them (or write a submission), or score a folder of tables."""
    if len(data) > 1:
        raise ConfigError(describe("data", "one folder of stereo SELD, or of tables", f"{len(data)}"))
    settings = parse_settings(options.pairs)
    if is_table_folder(model):
        return score(model, data[0], settings, out)
    if options.overwrite:
        clean(out)
    clips, rejects = hear(model, data[0], out, settings, progress=not options.quiet)
    if rejects and len(rejects) == len(clips):
        found = f"none of {len(clips)}: {rejects[0]['reason']}"
        raise NothingHeardError(describe(f"evaluation of {model}", "clips that can be heard", found))
    if rejects:
        print(f"{len(rejects)} of {len(clips)} clips could not be heard, see {out / REJECTS}", file=sys.stderr)
    if settings.part == "evaluation":
        return f"{submit(clips, out)} events of {len(clips)} clips: {out / SUBMISSION}"
    return score(out / PREDICTIONS, data[0], settings, out)


# ------------------------------------------------------------------------------------------------- hearing


def choose(data: str | Path, settings: Settings) -> dcase_seld.SELDFolder:
    """The clips that are asked for."""
    if settings.part == "evaluation":
        return dcase_seld.find_evaluation(data)
    return dcase_seld.find(data).select(settings.folds)


def hear(
    model: str | Path, data: str | Path, out: Path, settings: Settings, *, progress: bool = True
) -> tuple[dcase_seld.SELDFolder, list[dict[str, str]]]:
    """Predict what is not predicted yet; returns the clips and those that could not be heard, with the reason.

    Raises :class:`ConfigError` when `out` has predictions of another model, other clips or another threshold, and for
    folds that the model saw in training, unless the settings allow it.
    """
    from tqdm import tqdm

    locator = load(model, settings.threshold)
    clips = choose(data, settings)
    if clips.labels != locator.labels:
        found = f"{len(clips.labels)} ({', '.join(clips.labels[:3])}, …)"
        raise ConfigError(describe(f"classes of {data}", f"the model's {len(locator.labels)}", found))
    seen = seen_in_training(model, clips)
    if seen and not settings.seen:
        cure = "Name other folds, or add --option seen=true, and the scores will say so."
        expected = "clips that the model was neither trained nor chosen on"
        raise ConfigError(describe(f"folds of {data}", expected, ", ".join(seen), cure))
    begin(model, clips, out, locator.thresholds, seen)
    rejects = []
    for clip in tqdm(clips.clips, desc="clips", leave=False, mininterval=1.0, disable=not progress):
        path = out / PREDICTIONS / f"{clip.name}.csv"
        if path.is_file():
            continue
        try:
            rows = locate_file(locator, clip.path).rows()
        except AudioLLMError as error:
            rejects.append({"item": clip.name, "reason": str(error)})
            continue
        seld_tables.write_rows(path, rows)
    write_lines(out / REJECTS, rejects)
    return clips, rejects


def seen_in_training(model: str | Path, clips: dcase_seld.SELDFolder) -> list[str]:
    """Which rooms of `clips` the model saw (:func:`eval.tasks.folds_seen`)."""
    names = folds_seen(model) or set()
    return sorted({clip.room for clip in clips.clips if {clip.room, clip.fold} & names})


def begin(model: str | Path, clips: dcase_seld.SELDFolder, out: Path, threshold: Any, seen: Sequence[str] = ()) -> None:
    """Say whose the folder `out` is, or see that it is this run's."""
    names = "\n".join(f"{clip.name} {clip.path.stat().st_size}" for clip in clips.clips)
    claimed = {
        "model": Path(model).name,
        "sha256": content_hash(Path(model) if Path(model).is_file() else Path(model) / WEIGHTS),
        "clips": len(clips),
        "data": hashlib.sha256(names.encode()).hexdigest(),
        "threshold": threshold,
        "seen": list(seen),
    }
    claim(out / RUN, claimed, {"sounds": clips.fingerprint}, {"seen": []})
    (out / PREDICTIONS).mkdir(parents=True, exist_ok=True)


def clean(out: Path) -> None:
    """Remove an earlier run's files from `out`."""
    for folder in (PREDICTIONS, SUBMISSION):
        for path in (out / folder).glob("*.csv"):
            path.unlink()
    for name in (RUN, RESULT, REJECTS):
        (out / name).unlink(missing_ok=True)


def submit(clips: dcase_seld.SELDFolder, out: Path) -> int:
    """``submission/NAME.csv`` for every clip of the evaluation set, as the challenge takes them; returns the events."""
    names = [f"{clip.name}.csv" for clip in clips.clips]
    return write_submission(out / SUBMISSION, read_folder(out / PREDICTIONS), names)


# ------------------------------------------------------------------------------------------------- scores


def references(data: str | Path, settings: Settings) -> tuple[dict[str, np.ndarray], list[str]]:
    """True tables by file name and the names of classes: of a corpus's folds, or of any folder of tables."""
    if dcase_seld.recognises(data):
        clips = choose(data, settings)
        return {f"{clip.name}.csv": clips.rows(number) for number, clip in enumerate(clips.clips)}, clips.labels
    return read_folder(data), dcase_seld.read_labels(data)


def score(predictions: str | Path, data: str | Path, settings: Settings, out: Path) -> str:
    """Score tables, write ``scores.json`` and return the result as text, the metric's arguments included."""
    tables, labels = references(data, settings)
    result = score_tables(tables, read_folder(predictions), settings.criteria, settings.strict, len(labels))
    report = as_tree(result, labels, settings, _seen_by(Path(predictions)))
    if dcase_seld.recognises(data):
        heard = heard_tables(choose(data, settings))
        oracle = score_tables(tables, heard, settings.criteria, settings.strict, len(labels))
        report["ceiling"] = _plain(oracle.scores(settings.average).values[0])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULT, report)
    return as_text(report)


def heard_tables(clips: dcase_seld.SELDFolder) -> dict[str, np.ndarray]:
    """What an oracle could predict: the true rows of frames that stand out of their clip's background. A clip that
    cannot be opened keeps all of them."""
    tables = {}
    for number, clip in enumerate(clips.clips):
        rows = clips.rows(number)
        with contextlib.suppress(AudioLLMError):
            rows = standing_out(rows, clips.load_waveform(number))
        tables[f"{clip.name}.csv"] = rows
    return tables


def standing_out(rows: np.ndarray, waveform: Waveform) -> np.ndarray:
    """Rows of the frames that are `STANDS_OUT` dB louder than the median frame without any; all where there are not
    three such."""
    hop = round(FRAME_SECONDS * waveform.sample_rate)
    frames = waveform.num_samples // hop
    power = np.square(waveform.samples[:, : frames * hop].astype(np.float64)).mean(axis=0).reshape(frames, hop)
    level = 10 * np.log10(power.mean(axis=1) + 1e-14)
    rows = rows[rows[:, 0] < frames]
    quiet = np.setdiff1d(np.arange(frames), rows[:, 0].astype(int))
    if len(quiet) < 3:
        return rows
    return rows[level[rows[:, 0].astype(int)] > np.median(level[quiet]) + STANDS_OUT]


def _seen_by(predictions: Path) -> list[str]:
    """The rooms that the model of these predictions had seen, as ``run.json`` in their folder or above says."""
    for folder in (predictions, predictions.parent):
        if (folder / RUN).is_file():
            try:
                return list(json.loads((folder / RUN).read_text(encoding="utf-8")).get("seen", []))
            except (ValueError, AttributeError, TypeError):
                return []  # another program's file of that name
    return []


def as_tree(result: Evaluation, labels: Sequence[str], settings: Settings, seen: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments and scores for JSON; intervals are jackknife ones over recordings or rooms, where there are two."""
    scores = result.scores(settings.average)
    tree: dict[str, Any] = {
        "metric": {
            **{name: _plain(value) for name, value in dataclasses.asdict(settings.criteria).items()},
            "average": settings.average,
            "strict": settings.strict,
            "files": len(result.names),
            "missing": len(result.missing),
            "classes": len(labels),
            **({"seen": list(seen)} if seen else {}),
        },
        "scores": {name: _plain(value) for name, value in scores.table().items()},
    }
    if len(result.names) > 1:
        tree["intervals"] = _intervals(result, settings)
    tree["classes"] = {
        label: {name: _plain(value) for name, value in zip(SCORES, values, strict=True)}
        for label, values in zip(labels, scores.classwise.T.tolist(), strict=True)
    }
    return tree


def _intervals(result: Evaluation, settings: Settings) -> dict[str, Any]:
    over = settings.intervals or result.independent
    try:
        whole, _ = result.intervals(settings.average, over)
    except ConfigError:  # all of one recording
        return {}
    pairs = zip(SCORES, whole.low.tolist(), whole.high.tolist(), strict=True)
    facts = {"over": over, "groups": len(set(result.groups(over)))}
    return facts | {name: [_plain(low), _plain(high)] for name, low, high in pairs}


def _plain(value: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


_COLUMNS: dict[str, tuple[str, float, str]] = {  # what it is called, factor, unit
    "f_score": ("F ↑", 100, " %"),
    "doa_error": ("DOA error ↓", 1, "°"),
    "distance_error": ("distance error ↓", 0.01, " m"),
    "relative_distance_error": ("relative distance error ↓", 100, " %"),
}


def _shown(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value * _COLUMNS[name][1]:.2f}{_COLUMNS[name][2]}"


def as_text(tree: Mapping[str, Any]) -> str:
    """Markdown: the metric's arguments, the scores with their intervals, and those of every class."""
    metric, intervals = tree["metric"], tree.get("intervals") or {}
    over = f" (jackknife over {intervals['groups']} {intervals['over']})" if intervals else ""
    lines = [
        f"F{metric['degrees']:g}°/{metric['relative_distance']:g}, {metric['average']} over {metric['classes']} "
        f"classes, {metric['files']} files ({metric['missing']} missing), "
        + ("every frame and file" if metric["strict"] else "frames and files as the official metric counts them"),
        *([f"seen in training or by what was chosen: {', '.join(metric['seen'])}"] if "seen" in metric else []),
        "",
        f"| score | value | 95 %{over} |",
        "|---|---|---|",
    ]
    for name, (title, _, _) in _COLUMNS.items():
        low, high = intervals.get(name, (None, None))
        lines.append(
            f"| {title} | {_shown(name, tree['scores'][name])} | {_shown(name, low)} to {_shown(name, high)} |"
        )
    if tree.get("ceiling") is not None:
        said = f"an oracle that hears every labelled frame {STANDS_OUT:g} dB above its clip's background reaches F "
        lines += ["", f"Ceiling: {said}{100 * tree['ceiling']:.1f} %."]
    lines += ["", "| class | " + " | ".join(title for title, _, _ in _COLUMNS.values()) + " |", "|---|---|---|---|---|"]
    for label, values in tree["classes"].items():
        lines.append(f"| {label} | " + " | ".join(_shown(name, values[name]) for name in _COLUMNS) + " |")
    return "\n".join(lines)
