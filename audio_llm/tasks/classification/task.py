"""Classes of whole clips: one of several (classification), or any number of them (tagging)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.audio import Hearing
from audio_llm.encoders.heads import build_classifier
from audio_llm.errors import CheckpointError, ConfigError, TrainingError, describe
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.folder import WEIGHTS, load_encoder, load_strictly, part_of, read_parts, save_parts
from audio_llm.tasks.clips import Batch
from audio_llm.tasks.scores import average_precision
from audio_llm.tasks.supervised import SupervisedTask


class ClassTargets(NamedTuple):
    shares: Tensor  # (batch, classes) float32: 1 where a class is heard, less where clips are mixed


class ClassObservations(NamedTuple):
    """Windows of one clip have its number in common; they are averaged by their lengths."""

    numbers: np.ndarray  # (windows,)
    lengths: np.ndarray  # (windows,) samples
    probabilities: np.ndarray  # (windows, classes)
    targets: np.ndarray  # (windows, classes)


class TaggingTask(SupervisedTask):
    """Binary cross-entropy for every class by itself."""

    name = "tagging"

    def __init__(
        self,
        encoder: AudioEncoder,
        labels: Sequence[str],
        head: Mapping[str, Any],
        *,
        smoothing: float = 0.0,
        hearing: Hearing = "refuse",
    ) -> None:
        super().__init__(encoder, labels)
        self.head_config, self.smoothing, self.hearing = dict(head), smoothing, hearing
        self.head = build_classifier(self.head_config, encoder, len(labels))

    def targets(self, batch: Batch) -> tuple[ClassTargets]:
        shares = torch.zeros(len(batch.events), len(self.labels))
        for row, events in enumerate(batch.events):
            for event in events:
                shares[row, self.labels[event.label]] = 1.0
        if batch.mix is not None:
            share = batch.mix.share[:, None]
            shares = share * shares + (1.0 - share) * shares[batch.mix.partner]
        return (ClassTargets(shares),)

    def logits(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """``(batch, classes)`` float32."""
        return self.head(*self.encoder(waveform, lengths)).float()

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.loss(self.logits(waveform, lengths), targets[0].shares)
        return loss, {"classes": loss.detach()}

    def loss(self, logits: Tensor, shares: Tensor) -> Tensor:
        smooth = shares * (1.0 - self.smoothing) + 0.5 * self.smoothing
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(dim=1).mean()

    def activate(self, logits: Tensor) -> Tensor:
        """Probabilities ``(batch, classes)``."""
        return logits.sigmoid()

    def observe(self, waveform: Tensor, lengths: Tensor, targets: tuple[Any, ...], batch: Batch) -> ClassObservations:
        probabilities = self.activate(self.logits(waveform, lengths))
        return ClassObservations(
            np.array(batch.numbers), batch.lengths.numpy(), probabilities.cpu().numpy(), targets[0].shares.cpu().numpy()
        )

    def summarise(self, parts: Sequence[ClassObservations]) -> dict[str, Any]:
        return tagging_scores(*by_clip(parts)[1:])

    def save(self, folder: Path) -> None:
        facts = {"task": self.name, "labels": list(self.labels), "head": self.head_config, "hearing": self.hearing}
        save_parts(folder, self.encoder, {"head": self.head}, facts)


class ClassificationTask(TaggingTask):
    """Cross-entropy over classes that exclude each other."""

    name = "classification"

    def targets(self, batch: Batch) -> tuple[ClassTargets]:
        for events in batch.events:
            found = sorted({event.label for event in events})
            if len(found) != 1:
                cure = "Use task: tagging for clips with several classes or none."
                raise TrainingError(describe("a clip", "one class", ", ".join(found) or "none", cure))
        return super().targets(batch)

    def loss(self, logits: Tensor, shares: Tensor) -> Tensor:
        return F.cross_entropy(logits, shares, label_smoothing=self.smoothing)

    def activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    def summarise(self, parts: Sequence[ClassObservations]) -> dict[str, Any]:
        _, probabilities, targets = by_clip(parts)
        return class_scores(probabilities, targets.argmax(axis=1))


def load_classifier(folder: str | Path) -> tuple[AudioEncoder, nn.Module, dict[str, Any]]:
    """Encoder and classifier of a folder written by classification or tagging (evaluation mode), and its config."""
    config, state = read_parts(folder)
    if not {"head", "labels"} <= set(config) or config.get("task") not in ("classification", "tagging"):
        cure = "Train one with 'audio-llm train' and task: classification or tagging."
        raise CheckpointError(describe(f"encoder folder {folder}", "a classifier beside the encoder", "none", cure))
    encoder = load_encoder(folder)
    try:
        head = build_classifier(config["head"], encoder, len(config["labels"]))
    except ConfigError as error:
        raise CheckpointError(f"encoder folder {folder}: {error}") from error
    load_strictly(head, part_of(state, "head"), f"{folder}/{WEIGHTS}")
    return encoder, head.eval(), config


def by_clip(parts: Sequence[ClassObservations]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip numbers (clips,), probabilities and targets (clips, classes): windows averaged by their lengths."""
    whole = ClassObservations(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    numbers, where = np.unique(whole.numbers, return_inverse=True)
    weights = np.zeros((len(numbers), 1))
    np.add.at(weights, where, whole.lengths[:, None].astype(np.float64))
    sums = np.zeros((2, len(numbers), whole.targets.shape[1]))
    np.add.at(sums[0], where, whole.probabilities * whole.lengths[:, None])
    np.maximum.at(sums[1], where, whole.targets)
    return numbers, sums[0] / weights, sums[1]


def class_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Accuracy, recall and F1 averaged over the classes that are there, mean negative log-likelihood.

    `probabilities` (clips, classes) and `truth` (clips,). ``score`` is the accuracy.
    """
    guess = probabilities.argmax(axis=1)
    present = np.unique(truth)
    hits = np.array([np.sum((guess == k) & (truth == k)) for k in present])
    asked = np.array([np.sum(truth == k) for k in present])
    said = np.array([np.sum(guess == k) for k in present])
    likelihood = np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, None)
    accuracy = float((guess == truth).mean())
    return {
        "accuracy": accuracy,
        "macro_recall": float((hits / asked).mean()),
        "macro_f1": float((2 * hits / (asked + said)).mean()),
        "log_loss": float(-np.log(likelihood).mean()),
        "score": accuracy,
    }


def tagging_scores(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Mean average precision over the classes that are there, F1 at one half over all decisions. ``score`` is mAP."""
    present = np.flatnonzero(targets.any(axis=0))
    precisions = [average_precision(probabilities[:, k], targets[:, k] > 0.5) for k in present]
    guess, truth = probabilities > 0.5, targets > 0.5
    hit, wrong = int((guess & truth).sum()), int((guess ^ truth).sum())
    mean = float(np.mean(precisions)) if precisions else 0.0
    return {"mean_ap": mean, "micro_f1": 2 * hit / (2 * hit + wrong) if hit + wrong else 0.0, "score": mean}
