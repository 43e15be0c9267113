"""What all questions are made of: their configuration, drafts, words, and conditions on pairs of sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np

from data_prep.scenes.world import Placed, World

SIDES = ("left", "right")
SECTORS = ("front", "left", "behind", "right")
OCTANTS = tuple(product(("left", "right"), ("front", "behind"), ("above", "below")))
AXIS = {"left": (1, 1), "right": (1, -1), "front": (0, 1), "behind": (0, -1), "above": (2, 1), "below": (2, -1)}
PHRASE = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
    "above": "above",
    "below": "below",
}
# The groups of MMAU.
EVENT, TIME = "Sound-Based Event Recognition", "Temporal Event Reasoning"
SPACE, SCENE = "Spatial Reasoning", "Acoustic Scene Reasoning"


@dataclass(frozen=True)
class QuestionsConfig:
    """Which questions are asked, in which shares, and what their answers are drawn from.

    `choice` are shares of the kinds with options, `spatialsoundqa` those of SpatialSoundQA's kinds.
    """

    choice: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("identity", "presence", "side", "direction", "distance"), 1.0)
    )
    spatialsoundqa: dict[str, float] = field(default_factory=lambda: {"CLASSIFICATION": 1.0, "DOA": 1.0})
    choices: int = 4  # options of a question
    metres: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 7.0])  # distances that are asked for
    steps: tuple[float, float] = (1.0, 5.0)  # distances that SpatialSoundQA questions ask for, in half-metre steps
    thinking: Literal["question", "caption"] = "question"  # what the question asks, or the whole scene where that does
    second_event: float = 0.5  # share of presence, side and nearby questions with another sound in the scene


@dataclass
class Draft:
    """A question with its scene, before anything is rendered. `options` are all choices, `answer` among them."""

    placed: list[Placed]
    question: str
    answer: str
    thinking: str
    options: list[str] = field(default_factory=list)
    caption: str = ""  # the whole scene in words
    conclusion: str = ""  # the step from the caption to the answer, where the answer is not a part of the caption


Target = tuple[Any, ...]


@dataclass(frozen=True)
class Kind:
    """A type of question: the answers it is asked for, how a scene for one is drawn, and how others classify it."""

    name: str
    targets: Callable[[World, QuestionsConfig], list[Target]]
    draw: Callable[[np.random.Generator, World, QuestionsConfig, Target], Draft | None]
    positions: int | None  # number of choices; None = as configured, 0 = open question
    sub_category: str
    difficulty: str
    dcase_type: str = "sound detection"
    category: str = "Reasoning"
    answer: Callable[[Target], Any] = lambda target: target  # the part of a target that an open answer says


# ------------------------------------------------------------------------------------------------ words

WHERE = {"front": "in front", "behind": "behind", "left": "on the left", "right": "on the right"}


def sector_of(azimuth: float) -> str:
    """The nearest of front, left, behind and right."""
    return SECTORS[round((azimuth % 360) / 90) % 4]


def octant_of(azimuth: float) -> str:
    """The nearest of eight directions: ``front``, ``front left``, ``left``, ``behind left``, ..."""
    eight = ("front", "front left", "left", "behind left", "behind", "behind right", "right", "front right")
    return eight[round((azimuth % 360) / 45) % 8]


def metres(distance: float) -> str:
    """``2 m``, ``0.5 m``: two digits are enough to be read aloud."""
    return f"{distance:g} m"


def half_metres(distance: float) -> str:
    """SpatialSoundQA's distance: half-metre steps without a trailing zero, ``3.5m``."""
    return f"{round(2 * distance) / 2:g}m"


def list_words(labels: Sequence[str]) -> str:
    words = [f"the {label}" for label in labels]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def pick(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def where_is(world: World, placed: Placed) -> str:
    return WHERE[sector_of(float(world.azimuth[placed.source]))]


def heard(placed: Sequence[Placed]) -> list[str]:
    return [item.clip.label for item in sorted(placed, key=lambda item: item.onset)]


def two_distances(world: World, placed: Sequence[Placed]) -> str:
    a, b = (f"{world.distance[item.source]:.1f} m" for item in placed[:2])
    return f"The {placed[0].clip.label} is {a} away, the {placed[1].clip.label} {b}."


# ------------------------------------------------------------------------------------------------ what is asked for


def steps(config: QuestionsConfig) -> list[float]:
    low, high = config.steps
    return [step / 2 for step in range(round(2 * low), round(2 * high) + 1)]


def each(*values: Any) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(value,) for value in values]


def every_label(world: World, config: QuestionsConfig) -> list[Target]:
    return [(label,) for label in world.labels]


def labels_with(*values: Any) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(label, value) for label in world.labels for value in values]


# ------------------------------------------------------------------------------------------------ pairs of sources
# Asked of World.sources(first, candidates): the first wish is X, the second is Y.

Fits = Callable[[int, np.ndarray], np.ndarray]


def beyond(world: World, word: str) -> Fits:
    """X lies to the `word` of Y by at least the margin."""
    axis, sign = AXIS[word]
    return lambda x, ys: sign * (world.vectors[x, axis] - world.vectors[ys, axis]) > world.margins.apart


def nearer_or_farther(world: World, *, nearer: bool) -> Fits:
    margin = world.margins.nearer
    if nearer:
        return lambda x, ys: world.distance[ys] > margin * world.distance[x]
    return lambda x, ys: world.distance[x] > margin * world.distance[ys]


def mostly(world: World, word: str) -> Fits:
    """`word` is by far the largest part of the way from Y to X, so that one word says it."""
    axis, sign = AXIS[word]

    def fits(x: int, ys: np.ndarray) -> np.ndarray:
        way = world.vectors[x] - world.vectors[ys]
        others = np.abs(np.delete(way, axis, axis=1)).max(axis=1)
        return (sign * way[:, axis] > world.margins.apart) & (sign * way[:, axis] > 1.5 * others)

    return fits


def separation(world: World, metres_apart: float) -> Fits:
    """X and Y are so many metres apart."""

    def fits(x: int, ys: np.ndarray) -> np.ndarray:
        gap = np.linalg.norm(world.vectors[x] - world.vectors[ys], axis=1)
        return np.abs(gap - metres_apart) < 0.25 - world.margins.step

    return fits
