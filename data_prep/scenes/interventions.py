"""One cause of a scene changed and nothing else, with the answer that must follow and the clauses that must change.

========== ========================================================
kind       what is changed
========== ========================================================
remove     one of several events is not there
replace    one event is a recording of another class: same place, same time
azimuth    one event comes from another of front, left, behind, right
elevation  one event comes from above in place of below, or back
distance   one event comes from farther or nearer in the same direction
mirror     left and right of the whole scene, its room and noise
shift      one event begins earlier or later
swap       two events exchange their turns
room       another room of the split, all directions and distances kept
========== ========================================================

:data:`MATTERS` is the table of the questions whose answer each kind can change; of all others the answer must stay. An
intervention is made only where :mod:`data_prep.questions.truth` has an answer to the question before and after it. What
is not changed is the same to the last bit before the sum: recordings and their cuts, gains, responses, noise. A moved
event keeps the draw of its late reverberation.

A clause is what reasoning says of one event: its ``label``, its ``side`` (azimuth, degrees), ``height`` (elevation,
degrees), ``distance`` (metres), ``onset`` (seconds), or in which ``order`` two events come. It has the labels of its
event before and after, and the truth ``was`` and ``is``. Where the truth lies so near to the border between two words
that either may be said, or changes within what one word says, there is no clause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import Waveform, swap_channels
from audio_llm.errors import ConfigError, nearest
from data_prep.questions.common import QuestionsConfig, sector_of
from data_prep.questions.truth import RULES, Asked, Scene, answer_of
from data_prep.scenes import render, rooms
from data_prep.scenes.receivers import Head
from data_prep.scenes.rooms import seeded
from data_prep.scenes.world import Margins, Placed, World, cut

_PLACED = frozenset(
    "relation DOA MIXUP_SINGLE_DOA MIXUP_DIRECTION MIXUP_NONBINARY_SOURCE MIXUP_NONBINARY_DIRECTION".split()
)
MATTERS: dict[str, frozenset[str]] = {  # kind → types of questions whose answer it can change
    "remove": frozenset(("presence", "counting", "order")),
    "replace": frozenset(("identity", "presence", "order", "CLASSIFICATION", "MIXUP_NONBINARY_SOURCE")),
    "azimuth": _PLACED | {"side", "direction", "MIXUP_NONBINARY_DISTANCE"},
    "elevation": _PLACED | {"MIXUP_NONBINARY_DISTANCE"},
    "distance": _PLACED | {"distance", "nearer", "MIXUP_DISTANCE_BOTH", "MIXUP_NONBINARY_DISTANCE"},
    "mirror": _PLACED | {"side", "direction"},
    "shift": frozenset(("order", "overlap")),
    "swap": frozenset(("order",)),
    "room": frozenset(),
}
Clause = dict[str, Any]  # as ``meta.counterfactual`` has it
KINDS = tuple(MATTERS)
TRIES = 40  # draws of one intervention, half of them for a change of the answer alone or for none
CLEAR_AZIMUTH = 10.0  # degrees from the diagonals between front, left, behind and right
CLEAR_DISTANCE = 1.1  # ratio to the border between two distances that are asked for
TURN, RISE, AWAY = 60.0, 15.0, 1.5  # least change: degrees, degrees, ratio
_DEAF = {"mono": {"azimuth", "elevation", "mirror"}, "stereo": {"elevation"}}  # what a layout does not carry


@dataclass(frozen=True)
class CounterfactualConfig:
    """Pairs of scenes: so many interventions per scene, of these kinds in turn."""

    per_sample: int = 2  # interventions on a scene, fewer where fewer apply
    kinds: list[str] | None = (
        None  # of remove, replace, azimuth, elevation, distance, mirror, shift, swap, room; null: all
    )

    def check(self, where: str) -> None:
        """Raise :class:`ConfigError` for a kind that there is not."""
        if self.per_sample < 1:
            raise ConfigError(f"{where}.per_sample: expected 1 or more, found {self.per_sample}.")
        for kind in self.kinds or ():
            if kind not in KINDS:
                known = f"expected some of {', '.join(KINDS)}"
                raise ConfigError(f"{where}.kinds: {known}, found '{kind}'{nearest(kind, KINDS)}.")


@dataclass(frozen=True)
class Staged:
    """A scene with a place of its own for every event: event i comes from source i of `world`, a world of one listener.

    `origin[i]` is the number of the event in the scene before. `changed` are the events that do not sound as before.
    """

    placed: tuple[Placed, ...]
    world: World
    origin: tuple[int, ...]
    changed: frozenset[int] = frozenset()
    mirrored: bool = False

    @property
    def scene(self) -> Scene:
        return Scene(self.placed, self.world)


@dataclass(frozen=True)
class Intervention:
    """What was changed, and what must follow from it."""

    kind: str
    after: Staged
    answer: str
    changes: list[Clause]
    keeps: list[Clause]

    def meta(self, of: str) -> dict[str, Any]:
        """``meta.counterfactual`` of the sample; `of` is the key of the scene before."""
        return {"of": of, "kind": self.kind, "changes": self.changes, "keeps": self.keeps}


# ------------------------------------------------------------------------------------------------ stages


def stage_of(placed: Sequence[Placed], world: World) -> Staged:
    """The scene as it was drawn."""
    sources = [item.source for item in placed]
    room, listener = listener_of(world, sources[0])
    places = world.azimuth[sources], world.elevation[sources], world.distance[sources]
    return _stage(placed, range(len(placed)), world, room, listener, *places)


def _stage(
    placed: Sequence[Placed],
    origin: Sequence[int],
    world: World,
    room: rooms.Room,
    listener: rooms.Listener,
    azimuth: np.ndarray,
    elevation: np.ndarray,
    distance: np.ndarray,
    changed: Sequence[int] = (),
    mirrored: bool = False,
) -> Staged:
    turned = (np.asarray(azimuth) + 180) % 360 - 180
    here = replace(listener, azimuth=turned, elevation=np.asarray(elevation), distance=np.asarray(distance))
    numbered = tuple(replace(item, source=number) for number, item in enumerate(placed))
    alone = World(
        [item.clip for item in placed], [replace(room, listeners=(here,))], world.seconds, world.events, world.margins
    )
    return Staged(numbered, alone, tuple(origin), frozenset(changed), mirrored)


def listener_of(world: World, source: int) -> tuple[rooms.Room, rooms.Listener]:
    """The room and the listener that a source of `world` is around."""
    group = int(world.group[source])
    return [(room, listener) for room in world.rooms for listener in room.listeners][group]


# ------------------------------------------------------------------------------------------------ what can be changed

Draw = Callable[["_Scene", np.random.Generator], "Staged | None"]


@dataclass(frozen=True)
class _Scene:
    """What interventions are drawn from."""

    staged: Staged
    world: World  # of the split
    asked: Asked
    rooms: rooms.RoomsConfig

    def change(self, *, changed: Sequence[int] = (), mirrored: bool = False, **parts: Any) -> Staged:
        """The scene with other `parts` of a stage."""
        before = self.staged.world
        (room,) = before.rooms
        usual: dict[str, Any] = {
            "placed": self.staged.placed,
            "origin": range(len(self.staged.placed)),
            "room": room,
            "listener": room.listeners[0],
            "azimuth": before.azimuth,
            "elevation": before.elevation,
            "distance": before.distance,
        }
        return _stage(world=self.world, changed=changed, mirrored=mirrored, **(usual | parts))

    def moved(self, number: int, axis: str, value: float) -> Staged | None:
        """Event `number` elsewhere; None where there is a wall."""
        values = np.array(getattr(self.staged.world, axis))
        values[number] = value
        moved: dict[str, Any] = {axis: values}
        after = self.change(changed=[number], **moved)
        (room,) = after.world.rooms
        places = (getattr(after.world, name)[number : number + 1] for name in ("azimuth", "elevation", "distance"))
        return after if rooms.fits_inside(room, room.listeners[0], *places) else None


def _remove(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    events = scene.staged.placed
    if len(events) < 2:
        return None
    gone = int(rng.integers(len(events)))
    left = [number for number in range(len(events)) if number != gone]
    before = scene.staged.world
    places: dict[str, Any] = {name: getattr(before, name)[left] for name in ("azimuth", "elevation", "distance")}
    return scene.change(placed=[events[number] for number in left], origin=left, **places)


def _replace(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    events, world = scene.staged.placed, scene.world
    number = int(rng.integers(len(events)))
    there = {item.clip.label for item in events}
    free = [label for label in world.labels if label not in there]
    wanted = [label for label in (*scene.asked.options, *map(str, scene.asked.target)) if label in free]
    pool = wanted if wanted and rng.random() < 0.5 else free
    item = events[number]
    clip = world.clip(rng, pool[int(rng.integers(len(pool)))], item.seconds) if pool else None
    if clip is None or clip.seconds < item.seconds:
        return None
    skip = float(rng.uniform(0, clip.seconds - item.seconds))
    if clip.loud:
        skip, length = cut(rng, clip, item.seconds)
        if abs(length - item.seconds) > 0.02:  # it would end earlier, too
            return None
    placed = list(events)
    placed[number] = replace(item, clip=clip, skip=round(skip, 3))
    return scene.change(placed=placed, changed=[number])


def _azimuth(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    number, before = int(rng.integers(len(scene.staged.placed))), scene.staged.world
    old, new = float(before.azimuth[number]), float(rng.uniform(-180, 180))
    far = abs((new - old + 180) % 360 - 180) >= TURN and sector_of(old) != sector_of(new)
    return scene.moved(number, "azimuth", new) if far and clear_side(old) and clear_side(new) else None


def _elevation(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    number, before = int(rng.integers(len(scene.staged.placed))), scene.staged.world
    old, new = float(before.elevation[number]), float(rng.uniform(*scene.rooms.elevation))
    margin = before.margins.elevation
    far = abs(new - old) >= RISE and old * new < 0 and min(abs(old), abs(new)) > margin
    return scene.moved(number, "elevation", new) if far else None


def _distance(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    number, before = int(rng.integers(len(scene.staged.placed))), scene.staged.world
    low, high = np.log(scene.rooms.distance)
    old, new = float(before.distance[number]), float(np.exp(rng.uniform(low, high)))
    return scene.moved(number, "distance", new) if abs(math.log(new / old)) >= math.log(AWAY) else None


def _mirror(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    return scene.change(azimuth=-scene.staged.world.azimuth, mirrored=True)


def _shift(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    placed, number = list(scene.staged.placed), int(rng.integers(len(scene.staged.placed)))
    item = placed[number]
    onset = round(float(rng.uniform(0, scene.world.seconds - item.seconds)), 3)
    if abs(onset - item.onset) < max(scene.world.margins.onset, 0.25):
        return None
    placed[number] = replace(item, onset=onset)
    return scene.change(placed=placed, changed=[number])


def _swap(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    placed = list(scene.staged.placed)
    if len(placed) < 2:
        return None
    early, late = sorted(rng.permutation(len(placed))[:2].tolist(), key=lambda number: placed[number].onset)
    first, second = placed[early], placed[late]
    end = max(first.onset + first.seconds, second.onset + second.seconds)
    if second.onset - first.onset < scene.world.margins.onset or end - first.seconds - first.onset < 0.25:
        return None
    placed[late] = replace(second, onset=first.onset)
    placed[early] = replace(first, onset=round(end - first.seconds, 3))
    return scene.change(placed=placed, changed=[early, late])


def _room(scene: _Scene, rng: np.random.Generator) -> Staged | None:
    (here,) = scene.staged.world.rooms
    others = [(room, one) for room in scene.world.rooms if room.name != here.name for one in room.listeners]
    places = scene.staged.world.azimuth, scene.staged.world.elevation, scene.staged.world.distance
    fitting = [(room, one) for room, one in others if rooms.fits_inside(room, one, *places)]
    if not fitting:
        return None
    room, listener = fitting[int(rng.integers(len(fitting)))]
    return scene.change(room=room, listener=listener, changed=range(len(scene.staged.placed)))


_DRAWS: dict[str, Draw] = {
    "remove": _remove,
    "replace": _replace,
    "azimuth": _azimuth,
    "elevation": _elevation,
    "distance": _distance,
    "mirror": _mirror,
    "shift": _shift,
    "swap": _swap,
    "room": _room,
}
_SELF = ("azimuth", "elevation", "distance", "mirror", "swap")  # kinds that are nothing without a clause that changes


def intervene(
    kind: str,
    placed: Sequence[Placed],
    world: World,
    asked: Asked,
    config: QuestionsConfig,
    room_config: rooms.RoomsConfig,
    layout: str,
    *seed: object,
) -> Intervention | None:
    """An intervention of `kind` on the scene `placed` of `world`; None where none is found.

    The seed decides whether one that changes the answer is looked for or one that keeps it; where there is none of
    these, the other is taken.
    """
    if kind in _DEAF.get(layout, ()) or asked.kind not in RULES:
        return None
    before = stage_of(placed, world)
    answer = answer_of(asked, before.scene, config)
    if answer is None:
        return None
    rng = seeded("counterfactual", kind, *seed)
    scene, second = _Scene(before, world, asked, room_config), None
    wanted = bool(rng.random() < 0.5) and asked.kind in MATTERS[kind]
    for _ in range(TRIES):
        after = _DRAWS[kind](scene, rng)
        told = answer_of(asked, after.scene, config) if after else None
        if after is None or told is None or (second and (told != answer) != wanted):
            continue
        changes, keeps = clauses(before, after, config)
        if kind in _SELF and not changes:
            continue
        found = Intervention(kind, after, told, changes, keeps)
        if (told != answer) == wanted:
            return found
        second = second or found
    return second


# ------------------------------------------------------------------------------------------------ clauses


def clear_side(azimuth: float) -> bool:
    """Whether one of front, left, behind and right alone can be said of an azimuth in degrees."""
    return abs((azimuth % 90) - 45) >= CLEAR_AZIMUTH


def near(distance: float, metres: Sequence[float]) -> float | None:
    """Which of `metres` a distance is nearest to, as a ratio; None where another is nearly as near."""
    ratios = sorted((abs(math.log(value / distance)), value) for value in metres)
    second = ratios[1][0] if len(ratios) > 1 else math.inf
    return ratios[0][1] if second - ratios[0][0] >= 2 * math.log(CLEAR_DISTANCE) else None


def clauses(
    before: Staged, after: Staged, config: QuestionsConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What reasoning must say otherwise after an intervention, and what it must go on saying."""
    found = list(_clauses(before, after, config))
    return [clause for clause, changed in found if changed], [clause for clause, changed in found if not changed]


def _word(name: str, value: float, margins: Margins, config: QuestionsConfig) -> str | float | None:
    """The word for a place; None where another would do as well."""
    if name == "side":
        return sector_of(value) if clear_side(value) else None
    if name == "height":
        return math.copysign(1, value) if abs(value) > margins.elevation else None
    return near(value, config.metres)


def _clauses(before: Staged, after: Staged, config: QuestionsConfig) -> Iterator[tuple[Clause, bool]]:
    places = {number: place for place, number in enumerate(after.origin)}
    margins = before.world.margins
    for number, item in enumerate(before.placed):
        place = places.get(number)
        then = after.placed[place] if place is not None else None
        labels = [item.clip.label, then.clip.label if then else None]
        yield {"clause": "label", "labels": labels, "was": labels[0], "is": labels[1]}, labels[0] != labels[1]
        if place is None or then is None:
            continue

        def clause(name: str, was: float, now: float, labels: list[str | None] = labels) -> Clause:
            return {"clause": name, "labels": labels, "was": round(float(was), 3), "is": round(float(now), 3)}

        pairs = {
            "side": (before.world.azimuth[number], after.world.azimuth[place]),
            "height": (before.world.elevation[number], after.world.elevation[place]),
            "distance": (before.world.distance[number], after.world.distance[place]),
        }
        for name, (was, now) in pairs.items():
            first, second = (_word(name, float(value), margins, config) for value in (was, now))
            if None not in (first, second) and (first != second or abs(was - now) < 1e-9):
                yield clause(name, was, now), first != second
        if item.onset == then.onset or abs(item.onset - then.onset) >= margins.onset:
            yield clause("onset", item.onset, then.onset), item.onset != then.onset
    for one, other in combinations(range(len(before.placed)), 2):
        if one not in places or other not in places:
            continue
        both = [(before.placed[one], before.placed[other]), (after.placed[places[one]], after.placed[places[other]])]
        leads = [round(second.onset - first.onset, 3) for first, second in both]  # above 0: the first comes first
        if min(map(abs, leads)) >= margins.onset:
            names = {"labels": [pair[0].clip.label for pair in both], "beside": [pair[1].clip.label for pair in both]}
            yield {"clause": "order", **names, "was": leads[0], "is": leads[1]}, leads[0] * leads[1] < 0


# ------------------------------------------------------------------------------------------------ sound


def render_after(
    placed: Sequence[Placed],
    world: World,
    found: Intervention,
    bank: Path,
    head: Head,
    room_config: rooms.RoomsConfig,
    config: render.AudioConfig,
    *seed: object,
) -> tuple[Waveform, dict[str, Any]]:
    """The scene `placed` after an intervention, and what was done; `seed` is that of the scene before.

    Where the scene before was scaled against clipping, this one is scaled alike; only where it would still clip, by
    more (``clip_gain_db`` in both says by how much).
    """
    responses = [render.response_at(bank, world, item.source) for item in placed]
    before, after = render.render_stems(placed, responses, head, config, *seed), found.after
    events = []
    for place, number in enumerate(after.origin):
        wet = before.events[number]
        if place in after.changed:
            moved = found.kind in ("azimuth", "elevation", "distance", "room")
            source = placed[number].source
            draw = world.places[source][1] % len(listener_of(world, source)[1].azimuth)
            response = response_of(after, place, head, room_config, config, draw) if moved else responses[number]
            wet = render.wet_event(after.placed[place], response, config, wet.gain)
        events.append(wet)
    stems = replace(before, events=events)
    mixed = stems.mixed()
    peak = max(float(np.abs(samples).max()) for samples in (mixed, before.mixed()))
    gain = min(1.0, render.PEAK / peak)
    waveform = Waveform((mixed * gain).astype(np.float32), config.sample_rate, config.layout)
    meta: dict[str, Any] = {"snr_db": round(stems.snr, 1)}
    if config.level_jitter_db:
        meta["level_db"] = [round(wet.gain, 2) for wet in events]
    if gain < 1:
        meta["clip_gain_db"] = round(20 * math.log10(gain), 2)
    return (swap_channels(waveform) if after.mirrored else waveform), meta


def response_of(
    after: Staged, place: int, head: Head, room_config: rooms.RoomsConfig, config: render.AudioConfig, draw: int
) -> np.ndarray:
    """The response (channels, time) float64 from the place of event `place`; `draw` names that of its late noise."""
    (room,) = after.world.rooms
    (listener,) = room.listeners
    here = slice(place, place + 1)
    one = replace(
        listener,
        azimuth=listener.azimuth[here],
        elevation=listener.elevation[here],
        distance=listener.distance[here],
    )
    (images,) = rooms.image_sources(room, one, room_config)
    found = rooms.response_of(room, one, images, 0, room_config, head, config.sample_rate, draw)
    return found.astype(np.float64)
