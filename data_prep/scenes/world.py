"""Which scenes are possible: sounds that may be played, places they may come from, and times that fit.

A `World` holds one split. It draws events that meet a question's conditions without rendering a sample, so the same
code writes text-only corpora (no audio at all) and the plans that the renderer carries out.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_llm.errors import ConfigError
from audio_llm.shards.schema import Event
from data_prep.scenes.receivers import unit_vectors
from data_prep.scenes.rooms import Room
from data_prep.sounds import Clip, trimmed

Array = np.ndarray
Pair = Callable[[int, Array], Array]  # (index of the first source, indices of candidates) -> which candidates fit
Region = tuple[Any, ...]  # its kind and what that needs: ("side", "left"), or several: ("all", region, region)


@dataclass(frozen=True)
class EventsConfig:
    """How long events are (seconds), and when."""

    seconds: tuple[float, float] = (0.8, 2.0)  # of an event, [least, most]
    gap: float = 0.15  # between events that follow each other
    overlap: float = 0.3  # shortest overlap where two events shall sound together
    overlap_share: float = 0.5  # share of free two-event scenes that overlap


@dataclass(frozen=True)
class Margins:
    """How far from doubt the truth of a question must be. What lies nearer to a border is not asked about."""

    side: float = 25.0  # degrees of azimuth from the median plane, for left or right
    sector: float = 23.0  # degrees from the diagonal between two of front, left, behind, right
    axis: float = 10.0  # degrees from each plane, for left/right and front/behind of an octant
    elevation: float = 5.0  # degrees from the horizon, for above or below
    distance: float = 0.12  # relative: "2 m" is 1.76 to 2.24 m
    step: float = 0.1  # metres from the border between two half-metre steps
    nearer: float = 1.4  # ratio of two distances that are compared
    apart: float = 0.5  # metres between two sources along an axis that they are compared on
    onset: float = 0.25  # seconds between onsets that are compared
    longer: float = 1.5  # ratio of two durations that are compared


@dataclass(frozen=True)
class Placed:
    """One event of a scene: what, when, from which response (an index into the world's sources)."""

    clip: Clip
    source: int
    onset: float
    seconds: float
    skip: float  # seconds into the clip's audible part where the event starts


@dataclass(frozen=True)
class Wish:
    """What a question needs of one event: its class and a `region` key such as ``("side", "left")``."""

    label: str
    region: Region = ("any",)


SHORTEST = 0.1  # seconds that an event of a recording with pauses lasts at least
CUTS = 20  # drawn before a recording is given up


def cut(rng: np.random.Generator, clip: Clip, seconds: float) -> tuple[float, float]:
    """A place in `clip` and the length there: drawn uniformly, then trimmed to what is loud, so that an event is heard
    from its onset to its offset. Where a cut would keep under half of its length another is drawn."""
    best = (0.0, 0.0)
    for _ in range(CUTS):
        found = trimmed(clip, float(rng.uniform(0, clip.seconds - seconds)), seconds)
        best = max(best, found, key=lambda pair: pair[1])
        if found[1] >= 0.5 * seconds:
            return found
    return best


class World:
    """The sounds and places of one split. Sources are numbered through all rooms; a scene keeps to one listener.

    Arrays ``azimuth, elevation, distance`` (degrees, metres) and ``vectors`` (n, 3) describe the sources in the
    listener's frame; ``group`` says which room and listener they belong to.
    """

    def __init__(
        self, clips: Sequence[Clip], rooms: Sequence[Room], seconds: float, events: EventsConfig, margins: Margins
    ) -> None:
        self.seconds, self.events, self.margins = seconds, events, margins
        self.by_label: dict[str, list[Clip]] = defaultdict(list)
        for clip in clips:
            self.by_label[clip.label].append(clip)
        self.labels = sorted(self.by_label)
        self._long_enough: dict[tuple[str, float], list[Clip]] = {}
        self.longest = {label: max(clip.seconds for clip in found) for label, found in self.by_label.items()}
        if not self.labels:
            raise ConfigError("sounds: no class is left with recordings in every split; add recordings.")
        self._lay_out(rooms)

    def elsewhere(self, rooms: Sequence[Room]) -> World:
        """The same sounds in other `rooms`."""
        other = copy.copy(self)
        other._lay_out(rooms)
        return other

    def _lay_out(self, rooms: Sequence[Room]) -> None:
        self.rooms = rooms
        listeners = [(room, number, listener) for room in rooms for number, listener in enumerate(room.listeners)]
        self.azimuth = np.concatenate([listener.azimuth for _, _, listener in listeners])
        self.elevation = np.concatenate([listener.elevation for _, _, listener in listeners])
        self.distance = np.concatenate([listener.distance for _, _, listener in listeners])
        self.vectors = unit_vectors(self.azimuth, self.elevation) * self.distance[:, None]
        counts = [len(listener.azimuth) for _, _, listener in listeners]
        self.group = np.repeat(np.arange(len(listeners)), counts)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.places = [(room.name, number * counts[0] + k) for room, number, _ in listeners for k in range(counts[0])]
        self._masks: dict[Region, Array] = {}
        self._indices: dict[Region, Array] = {}

    # -------------------------------------------------------------------------------------------- regions

    def mask(self, region: Region) -> Array:
        """Which sources lie in `region`, margins kept: (n,) bool."""
        if region not in self._masks:
            self._masks[region] = self._in_region(region)
        return self._masks[region]

    def _in_region(self, region: Region) -> Array:
        kind, *values = region
        margins, azimuth = self.margins, self.azimuth
        if kind == "any":
            return np.ones(len(azimuth), dtype=bool)
        if kind == "side":
            sign = 1 if values[0] == "left" else -1
            return (sign * azimuth > margins.side) & (sign * azimuth < 180 - margins.side)
        if kind == "sector":
            centre = {"front": 0, "left": 90, "behind": 180, "right": -90}[values[0]]
            return np.abs((azimuth - centre + 180) % 360 - 180) < 45 - margins.sector
        if kind == "near":
            return np.abs(self.distance / float(values[0]) - 1) < margins.distance
        if kind == "step":
            return np.abs(self.distance - float(values[0])) < 0.25 - margins.step
        if kind == "octant":
            return self._in_octant(*map(str, values))
        if kind == "all":
            return np.logical_and.reduce([self.mask(part) for part in values])
        raise ValueError(f"unknown region {region}")

    def _in_octant(self, side: str, depth: str, height: str) -> Array:
        azimuth, margin = self.azimuth, self.margins.axis
        lateral = (azimuth if side == "left" else -azimuth) % 360
        frontal = np.abs(azimuth) if depth == "front" else 180 - np.abs(azimuth)
        vertical = self.elevation if height == "above" else -self.elevation
        sided = (lateral > margin) & (lateral < 180 - margin)
        return sided & (frontal < 90 - margin) & (vertical > self.margins.elevation)

    def _members(self, region: Region) -> Array:
        if region not in self._indices:
            self._indices[region] = np.flatnonzero(self.mask(region))
        return self._indices[region]

    # -------------------------------------------------------------------------------------------- drawing

    def sources(
        self, rng: np.random.Generator, regions: Sequence[Region], pair: Pair | None = None
    ) -> list[int] | None:
        """One source per region, all around one listener and all different; `pair` relates the second to the first."""
        members = self._members(regions[0])
        for _ in range(80):
            if not len(members):
                return None
            first = int(members[rng.integers(len(members))])
            chosen = self._complete(rng, first, regions, pair)
            if chosen is not None:
                return chosen
        return None

    def _complete(
        self, rng: np.random.Generator, first: int, regions: Sequence[Region], pair: Pair | None
    ) -> list[int] | None:
        chosen = [first]
        start, stop = self._starts[self.group[first]], self._starts[self.group[first] + 1]
        for region in regions[1:]:
            candidates = start + np.flatnonzero(self.mask(region)[start:stop])
            if pair is not None and len(chosen) == 1:
                candidates = candidates[pair(first, candidates)]
            candidates = candidates[~np.isin(candidates, chosen)]
            if not len(candidates):
                return None
            chosen.append(int(candidates[rng.integers(len(candidates))]))
        return chosen

    def clip(self, rng: np.random.Generator, label: str, at_least: float = 0.0) -> Clip | None:
        """A clip of `label` that is audible for `at_least` seconds, uniformly.

        It never fails for some draws only: how often a class can be drawn must not depend on the answer asked for.
        """
        key = (label, round(at_least, 2))
        if key not in self._long_enough:
            self._long_enough[key] = [clip for clip in self.by_label[label] if clip.seconds >= key[1]]
        clips = self._long_enough[key]
        return clips[int(rng.integers(len(clips)))] if clips else None

    def others(self, rng: np.random.Generator, taken: Sequence[str], count: int) -> list[str]:
        """`count` different classes that are not in `taken`, uniformly. Raises :class:`ConfigError` with too few."""
        free = [label for label in self.labels if label not in taken]
        if len(free) < count:
            raise ConfigError(
                f"sounds: this question needs {len(taken) + count} classes, there are {len(self.labels)}."
            )
        return [free[int(index)] for index in rng.permutation(len(free))[:count]]

    def scene(
        self,
        rng: np.random.Generator,
        wishes: Sequence[Wish],
        *,
        pair: Pair | None = None,
        timing: str = "free",
        lengths: Sequence[tuple[float, float]] | None = None,
    ) -> list[Placed] | None:
        """Events that fulfil `wishes` in their order, or None when this draw found none.

        `timing`: ``free``, ``sequence`` (one after the other) or ``overlap``; `lengths` bounds each event's seconds.
        """
        sources = self.sources(rng, [wish.region for wish in wishes], pair)
        if sources is None:
            return None
        if timing == "free" and len(wishes) > 1:
            timing = "overlap" if rng.random() < self.events.overlap_share else "sequence"
        count = len(wishes)
        room = self.seconds - (count - 1) * self.events.gap
        ceiling = self.seconds if timing != "sequence" else room / count
        low, high = self.events.seconds
        bounds = lengths or [(min(low, 0.9 * ceiling), min(high, ceiling))] * count
        clips, seconds, skips = [], [], []
        for wish, (shortest, longest) in zip(wishes, bounds, strict=True):
            clip = self.clip(rng, wish.label, shortest if lengths else 0.0)
            if clip is None:
                return None
            skip, length = None, min(float(rng.uniform(shortest, longest)), clip.seconds)
            if clip.loud:
                skip, length = cut(rng, clip, length)
                if length < (shortest if lengths else SHORTEST):
                    return None
            clips.append(clip)
            seconds.append(length)
            skips.append(skip)
        onsets = self._onsets(rng, seconds, timing)
        if onsets is None:
            return None
        return [
            Placed(
                clip,
                source,
                round(onset, 3),
                round(length, 3),
                round(float(rng.uniform(0, clip.seconds - length)) if skip is None else skip, 3),
            )
            for clip, source, onset, length, skip in zip(clips, sources, onsets, seconds, skips, strict=True)
        ]

    def _onsets(self, rng: np.random.Generator, seconds: list[float], timing: str) -> list[float] | None:
        if timing == "sequence":
            slack = self.seconds - sum(seconds) - (len(seconds) - 1) * self.events.gap
            if slack < -1e-9:
                return None
            cuts = np.sort(rng.uniform(0, max(slack, 0.0), len(seconds)))
            starts = np.concatenate([[0], np.cumsum(np.array(seconds[:-1]) + self.events.gap)])
            return [float(value) for value in starts + cuts]
        if timing == "free" or len(seconds) == 1:
            return [float(rng.uniform(0, self.seconds - length)) for length in seconds]
        share = min(self.events.overlap, 0.8 * min(seconds))
        first = float(rng.uniform(0, self.seconds - seconds[0]))
        onsets = [first]
        for length in seconds[1:]:
            low = max(0.0, first + share - length)
            high = min(self.seconds - length, first + seconds[0] - share)
            if low > high:
                return None
            onsets.append(float(rng.uniform(low, high)))
        return onsets

    def events_of(self, placed: Sequence[Placed]) -> list[Event]:
        """The ground truth in order of onset: dry onset and offset, direction and distance of the source."""
        found = [
            Event(
                label=item.clip.label,
                onset=round(item.onset, 3),
                offset=round(item.onset + item.seconds, 3),
                azimuth=round(float(self.azimuth[item.source]), 2),
                elevation=round(float(self.elevation[item.source]), 2),
                distance=round(float(self.distance[item.source]), 3),
            )
            for item in placed
        ]
        return sorted(found, key=lambda event: (event.onset, event.label))
