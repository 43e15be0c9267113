"""What the answer to a question is in any scene: the drafts say it of the scene they draw, this says it of others.

Every answer keeps the margins of the world that the scene stands in. Where a scene lies nearer to a border than that,
or lacks what is asked about, the question has no answer in it (None).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.questions.common import (
    AXIS,
    OCTANTS,
    SECTORS,
    SIDES,
    QuestionsConfig,
    Target,
    beyond,
    half_metres,
    mostly,
    nearer_or_farther,
    separation,
    steps,
)
from data_prep.questions.common import metres as in_metres
from data_prep.scenes.world import Placed, Region, World


@dataclass(frozen=True)
class Asked:
    """A question about a scene: its type, its target as it was dealt, the labels of the scene that it was drawn with
    in the draft's order (the first are those that its words name), and its options."""

    kind: str
    target: Target
    labels: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Events and the world they are placed in."""

    placed: Sequence[Placed]
    world: World

    def find(self, label: str) -> Placed | None:
        """The one event of `label`."""
        found = [item for item in self.placed if item.clip.label == label]
        return found[0] if len(found) == 1 else None

    def lies(self, item: Placed, region: Region) -> bool:
        return bool(self.world.mask(region)[item.source])

    def fits(self, pair: Callable[[int, np.ndarray], np.ndarray], first: Placed, second: Placed) -> bool:
        return bool(pair(first.source, np.array([second.source]))[0])


def answer_of(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    """The answer to `asked` in `scene`, one of the options where there are some; None where it has none."""
    rule = RULES.get(asked.kind)
    answer = rule(asked, scene, config) if rule else None
    return None if asked.options and answer not in asked.options else answer


Rule = Callable[[Asked, Scene, QuestionsConfig], "str | None"]


def _only(found: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else None


def _lone_label(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    return _only([item.clip.label for item in scene.placed])


def _presence(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    return "yes" if any(item.clip.label == asked.target[0] for item in scene.placed) else "no"


def _place(words: Sequence[str], region: str) -> Rule:
    """Which of `words` says where the first event of the question is."""

    def rule(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
        item = scene.find(asked.labels[0])
        return _only([word for word in words if scene.lies(item, (region, word))]) if item else None

    return rule


def _distance(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    item = scene.find(asked.labels[0])
    return _only([in_metres(near) for near in config.metres if scene.lies(item, ("near", near))]) if item else None


def _order(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    events = sorted(scene.placed, key=lambda item: item.onset)
    follows = (a.onset + a.seconds <= b.onset for a, b in zip(events, events[1:], strict=False))
    return events[0 if asked.target[0] == "first" else -1].clip.label if all(follows) and len(events) > 1 else None


def _counting(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    return str(len({item.clip.label for item in scene.placed}))


def _two(asked: Asked, scene: Scene) -> tuple[Placed, Placed] | None:
    first, second = (scene.find(label) for label in asked.labels[:2])
    return (first, second) if first and second else None


def _overlap(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    pair = _two(asked, scene)
    if pair is None:
        return None
    both = min(item.onset + item.seconds for item in pair) - max(item.onset for item in pair)
    timing = scene.world.events
    if both >= min(timing.overlap, 0.8 * min(item.seconds for item in pair)) - 2e-3:  # times are rounded to 1 ms
        return "yes"
    return "no" if -both >= timing.gap - 2e-3 else None


def _duration(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    pair = _two(asked, scene)
    if pair is None:
        return None
    short, long = sorted(pair, key=lambda item: item.seconds)
    return long.clip.label if long.seconds >= (scene.world.margins.longer - 0.01) * short.seconds else None


def _side_of_other(words: Sequence[str]) -> Rule:
    def rule(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
        pair = _two(asked, scene)
        return _only([word for word in words if scene.fits(beyond(scene.world, word), *pair)]) if pair else None

    return rule


def _nearer(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    pair = _two(asked, scene)
    if pair is None:
        return None
    nearer = [scene.fits(nearer_or_farther(scene.world, nearer=value), *pair) for value in (True, False)]
    return _only([item.clip.label for item, fits in zip(pair, nearer, strict=True) if fits])


def _octant_and_distance(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    item = scene.find(asked.labels[0])
    if item is None:
        return None
    octant = [octant for octant in OCTANTS if scene.lies(item, ("octant", *octant))]
    step = [step for step in steps(config) if scene.lies(item, ("step", step))]
    return f"{', '.join(octant[0])}; {half_metres(step[0])}" if len(octant) == len(step) == 1 else None


def _yes_no(asked: Asked, scene: Scene, fits: Callable[[str], Callable[[int, np.ndarray], np.ndarray]]) -> str | None:
    """Whether the word of the target says how the first event lies to the second; its opposite is "No"."""
    pair, word = _two(asked, scene), asked.target[0]
    if pair is None:
        return None
    opposite = dict(zip(_WORDS, _OPPOSITES, strict=True))[word]
    found = [name for name, one in (("Yes", word), ("No", opposite)) if scene.fits(fits(one), *pair)]
    return _only(found)


_WORDS = (*AXIS, "closer", "farther")
_OPPOSITES = ("right", "left", "behind", "front", "below", "above", "farther", "closer")


def _relation_of(world: World, word: str) -> Callable[[int, np.ndarray], np.ndarray]:
    return beyond(world, word) if word in AXIS else nearer_or_farther(world, nearer=word == "closer")


def _compared(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    return _yes_no(asked, scene, lambda word: _relation_of(scene.world, word))


def _apart(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    pair = _two(asked, scene)
    if pair is None:
        return None
    return _only([half_metres(step) for step in steps(config) if scene.fits(separation(scene.world, step), *pair)])


def _which_source(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    if len(scene.placed) != 2:
        return None
    fits = _relation_of(scene.world, asked.target[1])
    both = (scene.placed, scene.placed[::-1])
    return _only([first.clip.label for first, second in both if scene.fits(fits, first, second)])


def _mostly_where(asked: Asked, scene: Scene, config: QuestionsConfig) -> str | None:
    pair = _two(asked, scene)
    return _only([word for word in AXIS if scene.fits(mostly(scene.world, word), *pair)]) if pair else None


RULES: dict[str, Rule] = {
    "identity": _lone_label,
    "presence": _presence,
    "side": _place(SIDES, "side"),
    "direction": _place(SECTORS, "sector"),
    "distance": _distance,
    "order": _order,
    "counting": _counting,
    "overlap": _overlap,
    "duration": _duration,
    "relation": _side_of_other(SIDES),
    "nearer": _nearer,
    "CLASSIFICATION": _lone_label,
    "DOA": _octant_and_distance,
    "MIXUP_SINGLE_DOA": _octant_and_distance,
    "MIXUP_DIRECTION": _compared,
    "MIXUP_DISTANCE_BOTH": _compared,
    "MIXUP_NONBINARY_DISTANCE": _apart,
    "MIXUP_NONBINARY_SOURCE": _which_source,
    "MIXUP_NONBINARY_DIRECTION": _mostly_where,
}
