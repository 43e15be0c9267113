"""The spatial task: which sound, where, how far, and when. Scores follow Spatial-AST's evaluation and DCASE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from audio_llm.encoders.heads import SpatialHeads, SpatialLogits
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.folder import WEIGHTS, load_strictly, part_of, read_parts, save_parts
from audio_llm.shards.schema import Event
from audio_llm.tasks.clips import Batch
from audio_llm.tasks.scores import average_precision, great_circle, unit_vector
from audio_llm.tasks.spatial.heads import (
    ClipTargets,
    EventHead,
    EventOutput,
    EventTargets,
    class_azimuth,
    clip_losses,
    clip_targets,
    event_losses,
    event_targets,
    total_loss,
)
from audio_llm.tasks.spatial.weights import LossWeights
from audio_llm.tasks.supervised import SupervisedTask

T = TypeVar("T", bound=tuple)

SIDE_MARGIN = math.sin(
    math.radians(10)
)  # sources within 10 degrees of the dividing plane have no side to be right about
ER_DEGREES = 20.0


class Observations(NamedTuple):
    """What one batch contributes, as plain arrays, so that processes can exchange them."""

    sound_scores: np.ndarray  # (clips, classes)
    sound_targets: np.ndarray
    single: np.ndarray  # (clips,) bool: one event only
    distance: np.ndarray  # (placed clips, 2): predicted and true class
    direction: np.ndarray  # (placed clips, 2, 3): predicted and true unit vector
    frames: np.ndarray  # (3,) true positives, false positives, false negatives of cells (column, class)
    event_class: np.ndarray  # (2,) right, asked: most active class of the columns of single-event clips
    event_direction: np.ndarray  # (events, 2, 3)
    event_distance: np.ndarray  # (events, 2) metres


def observe(
    logits: SpatialLogits,
    output: EventOutput,
    clip: ClipTargets,
    event: EventTargets,
    events: Sequence[Sequence[Event]],
    labels: dict[str, int],
) -> Observations:
    """Compare one batch with the truth (all tensors on the CPU)."""
    placed = np.flatnonzero(((clip.azimuth >= 0) & (clip.elevation >= 0)).numpy())
    ranged = np.flatnonzero((clip.distance >= 0).numpy())
    distance = np.stack([logits.distance.argmax(dim=1).numpy(), clip.distance.numpy()], axis=1)[ranged]
    azimuth, elevation = logits.azimuth.argmax(dim=1).tolist(), logits.elevation.argmax(dim=1).tolist()
    direction = [
        [
            unit_vector(class_azimuth(azimuth[row]), elevation[row] - 90),
            unit_vector(class_azimuth(int(clip.azimuth[row])), int(clip.elevation[row]) - 90),
        ]
        for row in placed
    ]
    guess, truth = output.activity > 0, event.activity > 0.5
    single = np.array([len(listed) == 1 for listed in events])
    columns = truth.any(dim=2).numpy() & single[:, None]
    right = (output.activity.argmax(dim=2) == event.activity.argmax(dim=2)).numpy()
    event_direction, event_distance = _events(output, event, events, labels)
    return Observations(
        logits.sound.float().numpy(),
        clip.sound.numpy(),
        single,
        distance,
        np.array(direction).reshape(-1, 2, 3),
        np.array([int((guess & truth).sum()), int((guess & ~truth).sum()), int((~guess & truth).sum())]),
        np.array([int((right & columns).sum()), int(columns.sum())]),
        event_direction,
        event_distance,
    )


def _events(
    output: EventOutput, target: EventTargets, events: Sequence[Sequence[Event]], labels: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Direction and distance of every event, averaged over the columns where it sounds."""
    directions, distances = [], []
    for row, listed in enumerate(events):
        for event in listed:
            label = labels[event.label]
            columns = target.activity[row, :, label] > 0.5
            if not columns.any() or sum(other.label == event.label for other in listed) > 1:
                continue
            if event.azimuth is not None:
                mean: Tensor = output.direction[row, columns, label].mean(dim=0)
                directions.append([mean.tolist(), unit_vector(event.azimuth, event.elevation or 0.0)])
            if event.distance is not None:
                guess = float(output.log_distance[row, columns, label].mean().clamp(-3, 5).exp())
                distances.append([guess, event.distance])
    return np.array(directions).reshape(-1, 2, 3), np.array(distances).reshape(-1, 2)


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if hits.size else None


def _sides(vectors: np.ndarray, axis: int) -> float | None:
    """Share of right signs along `axis` (1: left/right, 0: front/back), of sources clearly on one side."""
    clear = vectors[np.abs(vectors[:, 1, axis]) > SIDE_MARGIN]
    return _share(np.sign(clear[:, 0, axis]) == np.sign(clear[:, 1, axis]))


def summarise(parts: Sequence[Observations]) -> dict[str, Any]:
    """All scores, shares in 0 to 1, angles in degrees; what no clip could tell is left out.

    ``mean_ap``, ``er20`` and ``direction_mae`` are Spatial-AST's; ``distance_accuracy`` is within one class of 0.5 m.
    ``score`` is the mean of those in 0 to 1 that are there and decides which weights are kept.
    """
    whole = Observations(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    present = np.flatnonzero(whole.sound_targets.any(axis=0))
    precisions = [average_precision(whole.sound_scores[:, k], whole.sound_targets[:, k]) for k in present]
    best = whole.sound_scores.argmax(axis=1)
    named = whole.sound_targets[np.arange(len(best)), best] > 0.5
    angles = great_circle(whole.direction[:, 0], whole.direction[:, 1])
    event_angles = great_circle(whole.event_direction[:, 0], whole.event_direction[:, 1])
    hit, false, missed = whole.frames.reshape(-1, 3).sum(axis=0).tolist()
    right, asked = whole.event_class.reshape(-1, 2).sum(axis=0).tolist()
    far = np.abs(whole.event_distance[:, 0] - whole.event_distance[:, 1])
    scores: dict[str, Any] = {
        "mean_ap": float(np.mean(precisions)) if precisions else None,
        "class_accuracy": _share(named[whole.single]),
        "distance_accuracy": _share(np.abs(whole.distance[:, 0] - whole.distance[:, 1]) <= 1),
        "er20": _share(angles > ER_DEGREES),
        "direction_mae": float(angles.mean()) if angles.size else None,
        "left_right": _sides(whole.direction, 1),
        "front_back": _sides(whole.direction, 0),
        "frame_f1": 2 * hit / (2 * hit + false + missed) if hit + false + missed else None,
        "event_class_accuracy": right / asked if asked else None,
        "event_left_right": _sides(whole.event_direction, 1),
        "event_front_back": _sides(whole.event_direction, 0),
        "event_direction_mae": float(event_angles.mean()) if event_angles.size else None,
        "event_distance_accuracy": _share(far <= 0.5),
    }
    goals = [scores[name] for name in ("mean_ap", "distance_accuracy", "frame_f1", "event_left_right")]
    if scores["er20"] is not None:
        goals.append(1.0 - scores["er20"])
    known = [goal for goal in goals if goal is not None]
    scores["score"] = sum(known) / len(known) if known else 0.0
    return {name: value for name, value in scores.items() if value is not None}


class SpatialTask(SupervisedTask):
    """Spatial-AST's clip heads and an event head on one encoder."""

    def __init__(self, encoder: AudioEncoder, labels: Sequence[str], weights: LossWeights) -> None:
        super().__init__(encoder, labels)
        if encoder.grid is None or not hasattr(encoder, "cls_tokens"):
            cure = "Use spatial_ast, or task: classification or tagging."
            expected = "an encoder with clip tokens and a patch grid"
            raise ConfigError(describe(f"encoder '{encoder.name}'", expected, "none", cure))
        self.columns = encoder.grid[0]
        self.spatial = SpatialHeads(encoder.hidden_size, len(labels))
        self.events = EventHead(encoder.hidden_size, len(labels))
        self.weights = weights

    def predict(self, waveform: Tensor, lengths: Tensor) -> tuple[SpatialLogits, EventOutput]:
        tokens, _ = self.encoder(waveform, lengths)
        return self.spatial(tokens), self.events(self.encoder.patches(tokens))

    def targets(self, batch: Batch) -> tuple[ClipTargets, EventTargets]:
        seconds = self.encoder.window_seconds / self.columns
        return clip_targets(batch.events, self.labels), event_targets(batch.events, self.labels, self.columns, seconds)

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        clip, event = targets
        logits, output = self.predict(waveform, lengths)
        parts = {**clip_losses(logits, clip, self.weights), **event_losses(output, event)}
        return total_loss(parts, self.weights), {name: value.detach() for name, value in parts.items()}

    def observe(self, waveform: Tensor, lengths: Tensor, targets: tuple[Any, ...], batch: Batch) -> Observations:
        logits, output = self.predict(waveform, lengths)
        clip, event = targets
        return observe(_on_cpu(logits), _on_cpu(output), _on_cpu(clip), _on_cpu(event), batch.events, self.labels)

    def summarise(self, parts: Sequence[Observations]) -> dict[str, Any]:
        return summarise(parts)

    def save(self, folder: Path) -> None:
        heads = {"spatial": self.spatial, "events": self.events}
        save_parts(folder, self.encoder, heads, {"task": "spatial", "labels": list(self.labels)})


def load_spatial(folder: str | Path) -> tuple[SpatialHeads, list[str]]:
    """The clip heads of an encoder folder (published weights have no others), and the names of their classes."""
    config, state = read_parts(folder)
    part, labels = part_of(state, "spatial"), config.get("labels")
    if "fc_norm.weight" not in part or not labels:
        cure = "Train one with 'audio-llm train' and task: spatial, or convert a published one."
        raise CheckpointError(describe(f"encoder folder {folder}", "Spatial-AST's heads", "none", cure))
    spatial = SpatialHeads(part["fc_norm.weight"].shape[0], len(labels))
    load_strictly(spatial, part, f"{folder}/{WEIGHTS}")
    return spatial.eval(), list(labels)


def _on_cpu(group: T) -> T:
    """A named tuple of tensors, moved; float32 where it was half precision."""
    return type(group)(*(part.float().cpu() if part.is_floating_point() else part.cpu() for part in group))
