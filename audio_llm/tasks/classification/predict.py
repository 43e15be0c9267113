"""Classes of one file of any length, by a trained encoder folder, a folder of folds (an ensemble) or a published file.

A file is heard in windows of the encoder, and what they say is averaged. The last window ends where the file does, so
that it is as long as the others; only a file shorter than one window is padded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audio_llm import audio
from audio_llm.config import VALUES
from audio_llm.datasets.reverberation import read_classes
from audio_llm.errors import AudioError, CheckpointError, ConfigError, describe, one_line
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.validate import CONFIG, read_facts
from audio_llm.tasks.base import LONGEST
from audio_llm.tasks.classification.task import load_classifier
from audio_llm.tasks.folder import load_published, published_name

FOLDS = "folds.json"  # in a folder that `audio-llm folds` wrote: {"members": [encoder folders]}
FOLD_FILE = "model_fold_{}_best.safetensors"  # what the UrbanSound8K project calls the model tested on a fold
# Encoders of which there are published classifiers; CNN14's other files find events.
_PUBLISHED = (("beats", False), ("urbansound_cnn", False), ("cnn14", True))


@dataclass
class Prediction:
    """Probabilities of one file: mean over its windows, weighted by their lengths, and each window's own."""

    labels: list[str]
    probabilities: np.ndarray  # (classes,)
    windows: np.ndarray  # (windows, classes)
    starts: list[float]  # seconds
    ends: list[float]

    @property
    def best(self) -> int:
        return int(self.probabilities.argmax())


@dataclass
class Classifier:
    """One or several models with the same classes; several answer with the mean of their probabilities."""

    members: list[tuple[AudioEncoder, nn.Module]]
    labels: list[str]
    task: str = "classification"
    hearing: str = "refuse"
    batch_size: int = 16
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __post_init__(self) -> None:
        for encoder, head in self.members:
            encoder.to(self.device).eval()
            head.to(self.device).eval()

    def predict(self, waveform: audio.Waveform, hop_seconds: float | None = None, name: str = "audio") -> Prediction:
        """Raises :class:`AudioError` for channels that the encoder does not take (see `hearing`)."""
        parts = [self._member(encoder, head, waveform, hop_seconds, name) for encoder, head in self.members]
        starts, ends = parts[0][1:]
        same = all(part[1] == starts for part in parts)
        windows = np.mean([part[0] for part in parts], axis=0) if same else parts[0][0]
        means = [np.average(part[0], axis=0, weights=np.subtract(part[2], part[1])) for part in parts]
        return Prediction(self.labels, np.mean(means, axis=0), windows, starts, ends)

    def _member(
        self, encoder: AudioEncoder, head: nn.Module, waveform: audio.Waveform, hop_seconds: float | None, name: str
    ) -> tuple[np.ndarray, list[float], list[float]]:
        waveform = audio.hear(waveform, encoder.layouts, self.hearing, name=name)
        if not np.isfinite(waveform.samples).all():  # decode() refuses such files; arrays come from anywhere
            raise AudioError(describe(name, "finite samples", "NaN or Inf"))
        samples = audio.resample(waveform, encoder.sample_rate).samples
        if not samples.shape[1]:
            raise AudioError(describe(name, f"at least one sample at {encoder.sample_rate} Hz", "none"))
        places = window_places(samples.shape[1], encoder.window_samples, self._hop(encoder, hop_seconds))
        found = [
            self._probabilities(encoder, head, samples, places[start : start + self.batch_size])
            for start in range(0, len(places), self.batch_size)
        ]
        rate = encoder.sample_rate
        return np.concatenate(found), [start / rate for start, _ in places], [end / rate for _, end in places]

    def _hop(self, encoder: AudioEncoder, seconds: float | None) -> int:
        if seconds is None:
            return encoder.window_samples
        if not 0 < seconds <= encoder.window_seconds:
            expected = f"more than 0 and at most the window's {encoder.window_seconds:g} seconds"
            raise ConfigError(describe("hop", expected, f"{seconds:g}"))
        return max(1, round(seconds * encoder.sample_rate))

    @torch.inference_mode()
    def _probabilities(
        self, encoder: AudioEncoder, head: nn.Module, samples: np.ndarray, places: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        lengths = torch.tensor([end - start for start, end in places])
        batch = np.zeros((len(places), samples.shape[0], int(lengths.max())), dtype=np.float32)
        for row, (start, end) in enumerate(places):
            batch[row, :, : end - start] = samples[:, start:end]
        logits: Tensor = head(*encoder(torch.from_numpy(batch).to(self.device), lengths.to(self.device))).float()
        return (logits.sigmoid() if self.task == "tagging" else logits.softmax(dim=1)).cpu().numpy()


def window_places(length: int, window: int, hop: int) -> list[tuple[int, int]]:
    """(start, end) of the windows that cover `length` samples; the last one ends at the end."""
    if length <= window:
        return [(0, length)]
    starts = list(range(0, length - window + 1, hop))
    if starts[-1] + window < length:
        starts.append(length - window)
    return [(start, start + window) for start in starts]


def recognises(path: Path) -> bool:
    """Whether `path` is a folder of training or of folds, or a published file; one that names no task classifies."""
    if path.is_file():
        return published_name(path) in _PUBLISHED
    facts = read_facts(path)
    if not facts:
        return bool(folds_of(path))
    return facts.get("task") == "classification" or ("head" in facts and facts.get("task") != "tagging")


def load(path: str | Path, hearing: str | None = None, fold: str | None = None) -> Classifier:
    """A classifier from what `path` is; `hearing` replaces what the model was trained with.

    Of a folder of folds, `fold` takes the model that was tested on that one; by default all of them answer together.
    Raises :class:`CheckpointError` for a path that is no classifier, or an ensemble whose classes differ, and
    :class:`ConfigError` for a fold that is not there.
    """
    path = Path(path)
    folds = folds_of(path)
    if fold is not None:
        if fold not in folds:
            expected = f"one of {', '.join(folds)}" if folds else "a folder of folds as the model"
            raise ConfigError(describe(f"--fold {fold}", expected, "none of that number" if folds else str(path)))
        folds = {fold: folds[fold]}
    members = [_open(model) for models in folds.values() for model in models] or [_open(path)]
    configs = [config for _, _, config in members]
    if any(config["labels"] != configs[0]["labels"] for config in configs):
        raise CheckpointError(describe(f"ensemble {path}", "members with the same classes", "others"))
    layouts = members[0][0].layouts
    hearing = hearing or _stored_hearing(configs[0], layouts)
    try:
        audio.audible(layouts, hearing)
    except ConfigError as error:
        raise ConfigError(f"model {path}: {error}") from error
    return Classifier([member[:2] for member in members], configs[0]["labels"], configs[0]["task"], hearing)


def named(labels: Sequence[str], table: str | Path) -> list[str]:
    """`labels` with names for identifiers (``/m/…``), and for bare numbers where the table has as many classes.

    Raises :class:`ConfigError` for a table that names none of them.
    """
    names = read_classes(table)
    rows = list(names.values())
    found = []
    for number, label in enumerate(labels):
        bare = label == f"class {number}" and len(rows) == len(labels)
        found.append(names.get(label, rows[number] if bare else label))
    if found == list(labels):
        told = f"{len(rows)} others than {', '.join(labels[:2])} …"
        raise ConfigError(describe(f"--labels {table}", f"names of the model's {len(labels)} classes", told))
    return found


def folds_of(path: Path) -> dict[str, list[Path]]:
    """The models of a folder of folds by the fold that each was tested on, in order; empty for a single model.

    They are those of `audio-llm folds` (one for every seed), or the files of the UrbanSound8K project.
    """
    found: dict[str, list[Path]] = {}
    if (path / FOLDS).is_file():
        for member in _members(path):
            found.setdefault(member.parent.name.removeprefix("fold-"), []).append(member)
    elif not (path / CONFIG).is_file():
        before, _, behind = FOLD_FILE.partition("{}")
        for file in path.glob(FOLD_FILE.format("*")):
            found[file.name.removeprefix(before).removesuffix(behind)] = [file]
        found = dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))
    return found


def _open(path: Path) -> tuple[AudioEncoder, nn.Module, dict[str, Any]]:
    """Encoder, classifier and facts of an encoder folder or of a published file."""
    if not path.is_file():
        return _load_folder(path)
    published = load_published(path, "head", "classification")
    return published.encoder, published.heads["head"], published.facts


def _stored_hearing(facts: dict[str, Any], layouts: Sequence[str]) -> str:
    """What a model was trained with. Folders of version 0.1 call it ``channels``, and some have it in vain."""
    if "hearing" in facts or "channels" not in facts:
        return str(facts.get("hearing", "refuse"))
    return VALUES["hearing"].get(facts["channels"], facts["channels"]) if "mono" in layouts else "refuse"


def _load_folder(folder: Path) -> tuple[AudioEncoder, nn.Module, dict[str, Any]]:
    if not folder.exists():
        cure = "Train one with 'audio-llm train' or 'audio-llm folds', or give a published file."
        raise CheckpointError(describe(f"model {folder}", "a folder or a file", "none", cure))
    if not (folder / CONFIG).is_file():
        expected = f"{CONFIG} of 'audio-llm train', {FOLDS} of a finished 'audio-llm folds', or {FOLD_FILE.format('N')}"
        raise CheckpointError(describe(f"model {folder}", expected, "none of them"))
    return load_classifier(folder)


def _members(folder: Path) -> list[Path]:
    try:
        names = json.loads((folder / FOLDS).read_text(encoding="utf-8"))["members"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(describe(str(folder / FOLDS), "a list of members", type(error).__name__)) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(describe(str(folder / FOLDS), "a list of members", repr(names)[:60]))
    if not names:
        raise CheckpointError(describe(str(folder / FOLDS), "at least one finished fold", "none"))
    return [folder / name for name in names]


def predict_file(classifier: Classifier, path: str | Path, hop_seconds: float | None = None) -> Prediction:
    """Decode and classify one file."""
    return classifier.predict(audio.decode(path, max_seconds=LONGEST), hop_seconds, name=str(path))


# ------------------------------------------------------------------------------------------------------ as text


def as_text(path: str, prediction: Prediction, form: str) -> str:
    """A prediction as ``table``, ``json`` (one line) or ``block``."""
    if form == "block":
        return as_block(prediction)
    return as_json(path, prediction) if form == "json" else as_table(path, prediction)


def as_json(path: str, prediction: Prediction) -> str:
    """One line: the file, its best class, all probabilities, and the best class of every window."""
    windows = [
        {
            "start": round(start, 3),
            "end": round(end, 3),
            "label": prediction.labels[int(row.argmax())],
            "probability": round(float(row.max()), 6),
        }
        for start, end, row in zip(prediction.starts, prediction.ends, prediction.windows, strict=True)
    ]
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    record = {
        "file": path,
        "label": prediction.labels[prediction.best],
        "probability": round(float(prediction.probabilities.max()), 6),
        "probabilities": {label: round(float(value), 6) for label, value in pairs},
        "windows": windows,
    }
    return json.dumps(record, ensure_ascii=False)


def as_block(prediction: Prediction) -> str:
    """The block that the UrbanSound8K project's own script prints, with its names of classes."""
    names = [label.replace(" ", "_") for label in prediction.labels]
    lines = [
        "--- Prediction Results ---",
        f"Predicted Class: {names[prediction.best]} (ID: {prediction.best})",
        f"Confidence: {prediction.probabilities[prediction.best]:.4f}",
        "",
        "Full Probabilities:",
    ]
    lines += [f"  {name:<20}: {value:.4f}" for name, value in zip(names, prediction.probabilities, strict=True)]
    return "\n".join(lines)


def as_table(path: str, prediction: Prediction, top: int = 3) -> str:
    """The file and its `top` classes; for a file of several windows, when each class was the most probable one."""
    order = np.argsort(-prediction.probabilities, kind="stable")[:top]
    best = [f"{prediction.labels[k]} {100 * prediction.probabilities[k]:.1f} %" for k in order]
    lines = [f"{one_line(path)}: {', '.join(best)}"]
    if len(prediction.starts) > 1:
        lines += [
            f"  {_clock(start)} to {_clock(end)}  {prediction.labels[int(row.argmax())]} {100 * row.max():.1f} %"
            for start, end, row in _runs(prediction)
        ]
    return "\n".join(lines)


def _runs(prediction: Prediction) -> list[tuple[float, float, np.ndarray]]:
    """Neighbouring windows with the same best class as one stretch, with their mean."""
    runs: list[tuple[float, float, list[np.ndarray]]] = []
    for start, end, row in zip(prediction.starts, prediction.ends, prediction.windows, strict=True):
        if runs and runs[-1][2][-1].argmax() == row.argmax():
            runs[-1] = (runs[-1][0], end, [*runs[-1][2], row])
        else:
            runs.append((start, end, [row]))
    return [(start, end, np.mean(rows, axis=0)) for start, end, rows in runs]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{math.floor(minutes)}:{rest:04.1f}"
