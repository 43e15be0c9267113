"""Sound event localisation and detection: which sound is where in every 100 ms, and how far.

Labels are rows of a DCASE 2025 table; :func:`adpit_labels` makes targets of them, :class:`SELDHead` predicts
activity-coupled Cartesian vectors (multi-ACCDOA, Shimada et al. 2022) with a distance, :func:`adpit_loss` compares the
two under the permutations of equal sounds, and :func:`decode` turns predictions back into rows and events.

Azimuths are counter-clockwise with 0 in front and 90 left; of a stereo recording they lie in −90 to 90. Rows carry
degrees and centimetres, everything else metres.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio_llm.datasets.seld_tables import COLUMNS, FRAME_SECONDS, fold_azimuth
from audio_llm.encoders.seld_head import CLASSES, ELEMENTS, TRACKS, SELDNetwork
from audio_llm.errors import AudioError, ShardError, describe
from audio_llm.shards.schema import Event
from audio_llm.tasks.scores import unit_vector

UNIFY = 15.0  # degrees within which tracks of one class are one event
_SLOTS = 6  # one event of a class in a frame; two (slots 1, 2); three (slots 3, 4, 5)
_FIRST_SLOT = {1: 0, 2: 1, 3: 3}


# --------------------------------------------------------------------------------------------------------------- rows
# A table of annotations or predictions: (n, 6) float64 by COLUMNS, integers all but for what a file says otherwise.


def active_frames(event: Event, frames: int) -> np.ndarray:
    """Label frames that an event fills by half, or by half of its own length when it is shorter than a frame."""
    starts = np.arange(frames) * FRAME_SECONDS
    onset = event.onset or 0.0
    offset = frames * FRAME_SECONDS if event.offset is None else event.offset
    overlap = np.minimum(starts + FRAME_SECONDS, offset) - np.maximum(starts, onset)
    return np.flatnonzero((overlap > 0) & (overlap >= 0.5 * min(FRAME_SECONDS, offset - onset) - 1e-9))


def event_rows(events: Sequence[Event], labels: dict[str, int], frames: int) -> np.ndarray:
    """Rows of events that have an azimuth and a distance, as two channels hear them (folded); the others are left out.

    The source is the event's number; onscreen is 0.
    """
    rows = [
        (frame, labels[event.label], number, round(float(fold_azimuth(np.array(event.azimuth)))),
         round(100 * event.distance), 0)
        for number, event in enumerate(events)
        if event.azimuth is not None and event.distance is not None
        for frame in active_frames(event, frames)
    ]  # fmt: skip
    return np.array(sorted(rows), dtype=np.float64).reshape(-1, len(COLUMNS))


# ------------------------------------------------------------------------------------------------------------- targets


def _slots(frames: np.ndarray, classes: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``(frames, 6, values, classes)``: the k events of a class in a frame go to the slots for k, three at most."""
    target = np.zeros((shape[0], _SLOTS, values.shape[1], shape[1]), dtype=np.float32)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, key in enumerate(zip(frames.tolist(), classes.tolist(), strict=True)):
        groups.setdefault(key, []).append(index)
    for (frame, label), members in groups.items():
        members = members[:TRACKS]
        first = _FIRST_SLOT[len(members)]
        target[frame, first : first + len(members), :, label] = values[members]
    return target


def _row_values(rows: np.ndarray, frames: int, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[rows[:, 0] < frames]
    if len(rows) and rows[:, 1].max() >= num_classes:
        raise ShardError(describe("rows", f"classes 0 to {num_classes - 1}", f"class {int(rows[:, 1].max())}"))
    angle = np.radians(rows[:, 3])
    values = np.stack((np.ones(len(rows)), np.cos(angle), np.sin(angle), rows[:, 4] / 100, rows[:, 5]), axis=1)
    return rows[:, 0].astype(int), rows[:, 1].astype(int), values


def adpit_labels(rows: np.ndarray, frames: int = 50, num_classes: int = len(CLASSES)) -> np.ndarray:
    """Targets for :func:`adpit_loss`: ``(frames, 6 slots, 5, classes)`` float32 of activity, x, y, metres, onscreen.

    Events of one class in one frame fill slot 0 (one), slots 1 and 2 (two) or 3 to 5 (three; more are left out), in
    the order of the rows. Rows beyond the last frame are left out.
    """
    return _slots(*_row_values(rows, frames, num_classes), (frames, num_classes))


def event_labels(
    events: Sequence[Event], labels: dict[str, int], frames: int, elements: Sequence[str] = ("x", "y", "z")
) -> np.ndarray:
    """Targets ``(frames, 6, 1 + elements, classes)`` of events in the full sphere, for models with a z element.

    Events without an azimuth, or without a distance where `elements` has one, are left out.
    """
    placed = []
    for event in events:
        if event.azimuth is None or (event.distance is None and "distance" in elements):
            continue
        place = dict(zip("xyz", unit_vector(event.azimuth, event.elevation or 0.0), strict=True))
        place["distance"] = event.distance or 0.0
        values = [1.0, *(place[name] for name in elements)]
        placed += [(frame, labels[event.label], values) for frame in active_frames(event, frames)]
    frame_index, classes, values_ = (np.array(part) for part in zip(*placed, strict=True)) if placed else (
        np.zeros(0, int), np.zeros(0, int), np.zeros((0, 1 + len(elements))))  # fmt: skip
    return _slots(frame_index, classes, values_, (frames, len(labels)))


# ---------------------------------------------------------------------------------------------------------------- loss

_PAIRS = ((0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0))  # which of two events each track takes
_TRIPLES = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def adpit_loss(output: Tensor, target: Tensor, distance_weight: float = 1.0) -> Tensor:
    """Auxiliary-duplicating permutation-invariant training (Shimada et al. 2022), with a distance element.

    `output` ``(batch, T, 3, elements, classes)`` as :class:`SELDHead` gives it, `target`
    ``(batch, T', 6, 1 + elements or more, classes)`` as :func:`adpit_labels` does (what follows the elements is not
    read), T ≤ T'. Per frame and class: the mean squared error of the best assignment, where one event is asked of all
    three tracks, one of two of two tracks, and silence is the zero vector. `distance_weight` scales the squared error
    of the distance (last of three or four elements): 1 is published, where metres outweigh unit vectors.
    """
    frames, tracks, elements = output.shape[1:4]
    if frames > target.shape[1] or tracks != TRACKS or target.shape[3] <= elements:
        expected = f"(batch, at most {target.shape[1]}, {TRACKS}, at most {target.shape[3] - 1}, classes)"
        raise ValueError(f"adpit_loss: expected output {expected}, found {tuple(output.shape)}")
    target = target[:, :frames]
    wanted = target[..., :1, :] * target[..., 1 : 1 + elements, :]  # (batch, T, 6, elements, classes)
    one, two, three = wanted[:, :, :1], wanted[:, :, 1:3], wanted[:, :, 3:6]
    weight = torch.ones(elements, 1, device=output.device)
    if distance_weight != 1.0:
        weight[-1] = distance_weight
    # The slots of the two other cases are empty, so that their sum is the case that applies.
    errors = [
        ((output - one - two[:, :, list(pair)] - three[:, :, list(triple)]).square() * weight).mean(dim=(2, 3))
        for pair, triple in zip(_PAIRS, _TRIPLES, strict=True)
    ]
    return torch.stack(errors).min(dim=0).values.mean()


# ------------------------------------------------------------------------------------------------------------ decoding


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found, one entry per frame and sound, ordered by frame and class."""

    frame: np.ndarray  # (n,) int
    label: np.ndarray  # (n,) int
    vector: np.ndarray  # (n, 2 or 3): x front, y left (, z up); its length is the activity
    distance: np.ndarray  # (n,) metres; NaN where the model has no distance

    @property
    def azimuth(self) -> np.ndarray:
        """Degrees in −180 to 180."""
        return np.degrees(np.arctan2(self.vector[:, 1], self.vector[:, 0]))

    @property
    def elevation(self) -> np.ndarray:
        """Degrees; 0 where the model has no z."""
        height = self.vector[:, 2] if self.vector.shape[1] == 3 else np.zeros(len(self.frame))
        return np.degrees(np.arctan2(height, np.hypot(self.vector[:, 0], self.vector[:, 1])))

    def rows(self) -> np.ndarray:
        """The DCASE table ``(n, 6)``: whole degrees and centimetres, source and onscreen 0."""
        zeros = np.zeros(len(self.frame))
        distance = np.round(np.nan_to_num(self.distance) * 100)
        return np.stack((self.frame, self.label, zeros, np.round(self.azimuth), distance, zeros), axis=1)


def decode(
    output: np.ndarray | Tensor,
    threshold: float | Sequence[float] | np.ndarray = 0.5,
    unify: float = UNIFY,
    elements: Sequence[str] = ELEMENTS,
) -> Detections:
    """Events of ``(frames, tracks, elements, classes)``: active tracks, those within `unify` degrees taken together.

    A track is active where its vector is longer than `threshold` (one number, or one per class). Two tracks that agree
    become their mean, which follows a third that does not; as soon as two pairs agree, all three become one (Shimada
    et al. 2022, §3.3). A single-track model has nothing to unify.
    """
    values = np.asarray(output.detach().float().cpu() if isinstance(output, Tensor) else output, dtype=np.float32)
    return decode_active(values, lengths(values, elements) > np.asarray(threshold, dtype=np.float32), unify, elements)


def lengths(values: np.ndarray, elements: Sequence[str]) -> np.ndarray:
    """``(frames, tracks, elements, classes)`` → length of each track's vector ``(frames, tracks, classes)``."""
    return np.sqrt(np.square(_vectors(values, elements)).sum(axis=-1))


def _vectors(values: np.ndarray, elements: Sequence[str]) -> np.ndarray:
    """Without the distance, components last: ``(frames, tracks, classes, 2 or 3)``."""
    return np.moveaxis(values[:, :, [index for index, name in enumerate(elements) if name != "distance"]], 2, -1)


def decode_active(values: np.ndarray, active: np.ndarray, unify: float, elements: Sequence[str]) -> Detections:
    """As :func:`decode`, of the tracks that are `active`: ``(frames, tracks, classes)`` bool."""
    vector, tracks = _vectors(values, elements), values.shape[1]
    metres = np.full(vector.shape[:-1], np.nan, dtype=np.float32)
    if "distance" in elements:
        metres = np.maximum(values[:, :, list(elements).index("distance")], 0.0)
    joined = np.zeros_like(active)  # tracks that are one event with another
    if tracks == TRACKS:
        similar = _similar(vector, active, unify)
        joined = similar | np.roll(similar, 1, axis=1)
    # What stands in a cell: tracks that are events by themselves, in their order, and behind them the joined ones.
    events = np.concatenate((active & ~joined, joined.any(axis=1, keepdims=True)), axis=1)
    frame, label, slot = np.nonzero(events.transpose(0, 2, 1))
    track = np.minimum(slot, tracks - 1)
    place, distance = vector[frame, track, label], metres[frame, track, label]
    several = np.flatnonzero(slot == tracks)
    cell = frame[several], slice(None), label[several]
    place[several] = _mean(np.moveaxis(vector, 1, 2)[cell[0], cell[2]], joined[cell])
    distance[several] = _mean(metres[cell][..., None], joined[cell])[:, 0]
    return Detections(frame, label, place, distance)


def _mean(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """``(n, tracks, d)`` → ``(n, d)`` over the `members` ``(n, tracks)``; −0 is what changes no number."""
    total = np.where(members[..., None], values, np.float32(-0.0)).sum(axis=1)
    return total / members.sum(axis=1, keepdims=True).astype(np.float32)


def _similar(vector: np.ndarray, active: np.ndarray, unify: float) -> np.ndarray:
    """Which pairs of tracks (0, 1), (1, 2), (2, 0) are both active and close: ``(frames, 3, classes)``."""
    unit = vector / np.sqrt(np.square(vector).sum(axis=-1, keepdims=True) + 1e-10)
    following = np.roll(unit, -1, axis=1)
    angle = np.degrees(np.arccos(np.clip((unit * following).sum(axis=-1), -1.0, 1.0)))
    return active & np.roll(active, -1, axis=1) & (angle < unify)


def join_events(found: Detections, labels: Sequence[str], join_degrees: float = 30.0) -> list[dict[str, Any]]:
    """Detections of consecutive frames as events: label, onset and offset in seconds, median azimuth, … , distance, and
    mean activity (0 to 1).

    A detection continues the nearest event of its class that was there one frame before, within `join_degrees`.
    """
    azimuth, elevation = found.azimuth, found.elevation
    open_events: list[list[int]] = []
    closed: list[list[int]] = []
    for frame in np.unique(found.frame).tolist():
        alive = [event for event in open_events if found.frame[event[-1]] == frame - 1]
        closed += [event for event in open_events if found.frame[event[-1]] != frame - 1]
        open_events, now = [], np.flatnonzero(found.frame == frame).tolist()
        pairs = sorted(
            (gap, index, number)
            for index in now
            for number, event in enumerate(alive)
            if found.label[event[-1]] == found.label[index]
            and (gap := _gap(azimuth[event[-1]], azimuth[index])) <= join_degrees
        )
        taken: set[int] = set()
        placed: set[int] = set()
        for _, index, number in pairs:
            if index not in placed and number not in taken:
                open_events.append([*alive[number], index])
                taken.add(number)
                placed.add(index)
        closed += [event for number, event in enumerate(alive) if number not in taken]
        open_events += [[index] for index in now if index not in placed]
    closed += open_events
    joined = [_as_event(found, members, azimuth, elevation, labels) for members in closed]
    return sorted(joined, key=lambda event: (event["onset"], event["label"], event["azimuth"]))


def _gap(first: float, second: float) -> float:
    return float(abs((first - second + 180) % 360 - 180))


def _as_event(
    found: Detections, members: list[int], azimuth: np.ndarray, elevation: np.ndarray, labels: Sequence[str]
) -> dict[str, Any]:
    mean = found.vector[members].mean(axis=0)
    event: dict[str, Any] = {
        "label": labels[int(found.label[members[0]])],
        "onset": round(float(found.frame[members[0]]) * FRAME_SECONDS, 3),
        "offset": round(float(found.frame[members[-1]] + 1) * FRAME_SECONDS, 3),
        "azimuth": round(math.degrees(math.atan2(mean[1], mean[0])), 1),
    }
    if found.vector.shape[1] == 3:
        event["elevation"] = round(float(np.median(elevation[members])), 1)
    if not np.isnan(found.distance[members]).any():
        event["distance"] = round(float(np.median(found.distance[members])), 2)
    activity = np.linalg.norm(found.vector[members], axis=1).mean()
    return event | {"activity": round(min(1.0, float(activity)), 4)}


# ----------------------------------------------------------------------------------------------------------- inference


def window_starts(frames: int, window: int) -> list[int]:
    """First label frames of windows that overlap by half and cover `frames`; the last one may reach beyond the end."""
    step = max(1, window // 2)
    return [0] if frames <= window else [*range(0, frames - window, step), frames - window]


@torch.inference_mode()
def locate(network: SELDNetwork, samples: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Predictions for a recording of any length: ``(channels, time)`` → ``(frames, tracks, elements, classes)``.

    Windows overlap by half, and each frame is taken from the window in whose middle it lies best. (Averaging would mix
    tracks, which two windows may number differently.) The samples must have the encoder's rate and channels.
    """
    encoder, window = network.encoder, network.head.frames
    per_frame = round(encoder.sample_rate * FRAME_SECONDS)
    if samples.shape[1] < 1:
        raise AudioError(describe("recording", "at least one sample", "none"))
    frames = -(-samples.shape[1] // per_frame)
    starts = window_starts(frames, window)
    output = np.zeros((frames, network.head.tracks, len(network.head.elements), network.head.num_classes), np.float32)
    edge = np.full(frames, -1)  # how far each frame is from the edge of the window it was taken from
    device = next(network.parameters()).device
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        clips = [samples[:, start * per_frame : start * per_frame + encoder.window_samples] for start in batch]
        lengths = torch.tensor([clip.shape[1] for clip in clips])
        padded = np.stack([np.pad(clip, ((0, 0), (0, encoder.window_samples - clip.shape[1]))) for clip in clips])
        predicted = network(torch.from_numpy(padded).float().to(device), lengths.to(device)).cpu().numpy()
        for start, values in zip(batch, predicted, strict=True):
            _take(output, edge, start, values)
    return output


def _take(output: np.ndarray, edge: np.ndarray, start: int, values: np.ndarray) -> None:
    count = min(len(values), len(output) - start)
    inside = np.minimum(np.arange(len(values)), np.arange(len(values))[::-1])[:count]
    better = inside > edge[start : start + count]
    output[start : start + count][better] = values[:count][better]
    edge[start : start + count][better] = inside[better]
