"""What an encoder can learn by itself: which sound, how far, from where (per clip), and who, where, when (per column).

Two conventions meet here. Events carry azimuths counter-clockwise with 0 in front and 90 left; the published classes of
Spatial-AST count counter-clockwise from the right (0 right, 90 front, 180 left, 270 behind). :func:`azimuth_class` and
:func:`class_azimuth` are the only places that convert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.encoders.heads import (
    _EPS,
    AZIMUTH_CLASSES,
    DISTANCE_CLASSES,
    ELEVATION_CLASSES,
    SpatialLogits,
)
from audio_llm.shards.schema import Event
from audio_llm.tasks.scores import unit_vector
from audio_llm.tasks.spatial.weights import LossWeights

DISTANCE_STEP = 0.5  # metres per class, published
_FRONT_CLASS = 90  # the published azimuth class of straight ahead
_START_ACTIVITY = -3.0  # logit of one cell in twenty
_START_LOG_DISTANCE = 0.9  # 2.5 m


# ------------------------------------------------------------------------------------------------- classes and angles


def azimuth_class(azimuth: float) -> int:
    """Published class of an azimuth in degrees (counter-clockwise, 0 front, 90 left)."""
    return (round(azimuth) + _FRONT_CLASS) % AZIMUTH_CLASSES


def class_azimuth(index: int) -> float:
    """Azimuth in (−180, 180] of a published class; inverse of :func:`azimuth_class` on whole degrees."""
    azimuth = (index - _FRONT_CLASS) % AZIMUTH_CLASSES
    return float(azimuth if azimuth <= 180 else azimuth - 360)


def elevation_class(elevation: float) -> int:
    """Published class of an elevation: degree + 90. Straight up shares class 179 (the published code wraps it to 0)."""
    return min(round(elevation) + 90, ELEVATION_CLASSES - 1)


def distance_class(distance: float) -> int:
    """Published class of a distance in metres, 0.5 m each; farther than 10 m is the last class."""
    return min(round(distance / DISTANCE_STEP), DISTANCE_CLASSES - 1)


# -------------------------------------------------------------------------------------------------------- clip heads


class ClipTargets(NamedTuple):
    """Targets of :class:`SpatialHeads`; −1 where a clip has no single answer (no event, or several places)."""

    sound: Tensor  # (batch, classes) float, multi-label
    distance: Tensor  # (batch,) int64
    azimuth: Tensor  # (batch,) int64
    elevation: Tensor  # (batch,) int64


def clip_targets(events: Sequence[Sequence[Event]], labels: dict[str, int]) -> ClipTargets:
    """Clip-level targets; a clip whose events are at several places has a sound target but no place."""
    sound = torch.zeros(len(events), len(labels))
    places = torch.full((3, len(events)), -1, dtype=torch.int64)
    for row, clip in enumerate(events):
        for event in clip:
            sound[row, labels[event.label]] = 1.0
        where = {(event.azimuth, event.elevation, event.distance) for event in clip}
        if len(where) == 1:
            azimuth, elevation, distance = where.pop()
            places[0, row] = -1 if distance is None else distance_class(distance)
            places[1, row] = -1 if azimuth is None else azimuth_class(azimuth)
            places[2, row] = -1 if elevation is None else elevation_class(elevation)
    return ClipTargets(sound, *places)


# ------------------------------------------------------------------------------------------------------- event head


class EventOutput(NamedTuple):
    """Per time column and class: activity logit, direction vector (x front, y left, z up), distance in metres."""

    activity: Tensor  # (batch, columns, classes)
    direction: Tensor  # (batch, columns, classes, 3)
    log_distance: Tensor  # (batch, columns, classes), natural logarithm of metres


class EventHead(nn.Module):
    """Who, where and when from the patch tokens: one linear map on the mean of each time column's tokens.

    It is linear on purpose: a language model reads the same tokens, and what a linear map finds in them a projector
    finds too. Activity has its own logit beside the vector, because an ambiguous direction (front or behind a spherical
    head) averages to a short vector, which plain ACCDOA would read as silence.
    """

    OUTPUTS = 5  # activity, x, y, z, log distance

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.linear = nn.Linear(hidden_size, self.OUTPUTS * num_classes)
        with torch.no_grad():  # silence is the usual answer: start there instead of spending updates on finding out
            self.linear.bias.view(num_classes, self.OUTPUTS)[:, 0] = _START_ACTIVITY
            self.linear.bias.view(num_classes, self.OUTPUTS)[:, 4] = _START_LOG_DISTANCE

    def forward(self, patches: Tensor) -> EventOutput:
        """`patches` ``(batch, columns, rows, hidden)``."""
        output = self.linear(self.norm(patches).mean(dim=2)).unflatten(-1, (self.num_classes, self.OUTPUTS)).float()
        return EventOutput(output[..., 0], output[..., 1:4], output[..., 4])


class EventTargets(NamedTuple):
    """Targets of :class:`EventHead`. Two events of one class in one column: the nearer one is asked for."""

    activity: Tensor  # (batch, columns, classes) 0 or 1
    direction: Tensor  # (batch, columns, classes, 3), zero where unknown
    log_distance: Tensor  # (batch, columns, classes), NaN where unknown


def event_targets(
    events: Sequence[Sequence[Event]], labels: dict[str, int], columns: int, column_seconds: float
) -> EventTargets:
    """An event is active in the columns it fills by half, or by half of its own length when it is shorter than one."""
    activity = torch.zeros(len(events), columns, len(labels))
    direction = torch.zeros(len(events), columns, len(labels), 3)
    log_distance = torch.full((len(events), columns, len(labels)), math.nan)
    starts = torch.arange(columns, dtype=torch.float64) * column_seconds
    for row, clip in enumerate(events):
        far_first = sorted(clip, key=lambda event: -(math.inf if event.distance is None else event.distance))
        for event in far_first:
            onset = event.onset or 0.0
            offset = columns * column_seconds if event.offset is None else event.offset
            overlap = (starts + column_seconds).clamp(max=offset) - starts.clamp(min=onset)
            filled = overlap >= 0.5 * min(column_seconds, offset - onset) - 1e-9
            active = filled & (overlap > 0)
            label = labels[event.label]
            activity[row, active, label] = 1.0
            if event.azimuth is not None:
                vector = unit_vector(event.azimuth, event.elevation or 0.0)
                direction[row, active, label] = torch.tensor(vector)
            if event.distance is not None:
                log_distance[row, active, label] = math.log(max(event.distance, 0.1))
    return EventTargets(activity, direction, log_distance)


# ------------------------------------------------------------------------------------------------------------ losses


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def smooth_classes(target: Tensor, classes: int, deviation: float, wraps: bool) -> Tensor:
    """Soft targets ``(batch, classes)``: a Gaussian of `deviation` classes about each target, on the circle or not."""
    offset = (torch.arange(classes, device=target.device) - target[:, None]).abs()
    if wraps:
        offset = torch.minimum(offset, classes - offset)
    return torch.softmax(-0.5 * (offset / deviation) ** 2, dim=1)


def _class_loss(logits: Tensor, target: Tensor, deviation: float = 0.0, wraps: bool = False) -> Tensor:
    known = target >= 0
    soft: Tensor = target.clamp(min=0)
    if deviation > 0:
        soft = smooth_classes(soft, logits.shape[1], deviation, wraps)
    return _mean_where(F.cross_entropy(logits.float(), soft, reduction="none"), known)


def clip_losses(logits: SpatialLogits, targets: ClipTargets, weights: LossWeights) -> dict[str, Tensor]:
    """Unweighted parts by the names of :class:`LossWeights`; clips without a single place count only for `sound`."""
    sound = F.binary_cross_entropy_with_logits(logits.sound.float(), targets.sound, reduction="none")
    deviation = weights.azimuth_smoothing
    return {
        "sound": sound.sum(dim=1).mean(),
        "distance": _class_loss(logits.distance, targets.distance),
        "azimuth": _class_loss(logits.azimuth, targets.azimuth, deviation, wraps=True),
        "elevation": _class_loss(logits.elevation, targets.elevation, deviation),
    }


def event_losses(output: EventOutput, targets: EventTargets) -> dict[str, Tensor]:
    """Unweighted parts by the names of :class:`LossWeights`."""
    activity = F.binary_cross_entropy_with_logits(output.activity, targets.activity, reduction="none")
    placed = targets.direction.square().sum(dim=-1) > 0
    ranged = ~targets.log_distance.isnan()
    vector_error = (output.direction - targets.direction).square().sum(dim=-1)
    distance_error = (output.log_distance - targets.log_distance.nan_to_num()).square()
    return {
        "activity": activity.sum(dim=2).mean(),
        "direction": _mean_where(vector_error, placed),
        "log_distance": _mean_where(distance_error, ranged),
    }


def total_loss(parts: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Weighted sum of the parts."""
    return torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
