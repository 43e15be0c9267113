"""Open questions: the nine types of SpatialSoundQA (Zheng et al. 2024, BAT) with their exact answer grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np

from data_prep.questions.common import (
    AXIS,
    EVENT,
    OCTANTS,
    PHRASE,
    SCENE,
    SPACE,
    Draft,
    Kind,
    QuestionsConfig,
    Target,
    beyond,
    each,
    every_label,
    half_metres,
    labels_with,
    metres,
    mostly,
    nearer_or_farther,
    pick,
    separation,
    steps,
    two_distances,
    where_is,
)
from data_prep.scenes.world import Placed, Region, Wish, World

OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front", "above": "below", "below": "above"}
RELATIONS = {
    **{word: f"{PHRASE[word]} the other" for word in AXIS},
    "closer": "closer to you",
    "farther": "farther from you",
}


def _doa_region(target: Target) -> Region:
    return ("all", ("octant", *target[:3]), ("step", target[3]))


def _doa_answer(target: Target) -> str:
    return f"{', '.join(target[:3])}; {half_metres(target[3])}"


def _classification(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = target
    placed = world.scene(rng, [Wish(label)])
    question = pick(rng, "Identify the sound events in the audio clip.", "What sound events can be detected?")
    return Draft(placed, question, label, f"I hear the {label}.") if placed else None


def _doa(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, _doa_region(target))])
    question = f"In which direction and how far away is the source of the {label}?"
    return Draft(placed, question, _doa_answer(target), _doa_thinking(label, target)) if placed else None


def _doa_thinking(label: str, target: Target) -> str:
    return f"I hear the {label} {', '.join(target[:3])}, about {metres(target[3])} away."


def _single_classification(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (label,) = target
    (other,) = world.others(rng, [label], 1)
    octant = OCTANTS[int(rng.integers(len(OCTANTS)))]
    opposite = tuple({"left": "right", "right": "left", "front": "behind", "behind": "front"}.get(w, w) for w in octant)
    near = steps(config)[int(rng.integers(len(steps(config))))]
    regions = ("all", ("octant", *octant), ("step", near)), ("octant", *opposite)
    placed = world.scene(rng, [Wish(label, regions[0]), Wish(other, regions[1])])
    place = f"{', '.join(octant)}, about {near:g} meters away"
    question = f"Identify the sound events coming from the {place}."
    return Draft(placed, question, label, f"The {label} comes from there, the {other} does not.") if placed else None


def _single_doa(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, other = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(label, _doa_region(target)), Wish(other)])
    question = f"Where is the source of the {label}, and at what distance?"
    return Draft(placed, question, _doa_answer(target), _doa_thinking(label, target)) if placed else None


def _mixup_direction(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    word, answer = target
    first, second = world.others(rng, [], 2)
    truth = word if answer == "Yes" else OPPOSITE[word]
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=beyond(world, truth))
    question = f"Is the sound of the {first} {PHRASE[word]} the sound of the {second}?"
    return Draft(placed, question, answer, f"The {first} is {PHRASE[truth]} the {second}.") if placed else None


def _mixup_distance(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    word, answer = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(
        rng, [Wish(first), Wish(second)], pair=nearer_or_farther(world, nearer=(word == "closer") == (answer == "Yes"))
    )
    question = f"Is the sound of the {first} {word} than the sound of the {second}?"
    return Draft(placed, question, answer, two_distances(world, placed)) if placed else None


def _nonbinary_distance(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (apart,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=separation(world, apart))
    question = f"What is the distance between the {first} and the {second}?"
    return Draft(placed, question, half_metres(apart), _two_places(world, placed)) if placed else None


def _nonbinary_source(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, relation = target
    (other,) = world.others(rng, [label], 1)
    pair = beyond(world, relation) if relation in AXIS else nearer_or_farther(world, nearer=relation == "closer")
    placed = world.scene(rng, [Wish(label), Wish(other)], pair=pair)
    question = f"Which sound source is {RELATIONS[relation]}?"
    return (
        Draft(placed, question, label, f"The {label} is {RELATIONS[relation]}, the {other} is not.") if placed else None
    )


def _nonbinary_direction(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (word,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=mostly(world, word))
    question = f"On which side of the {second} is the {first}?"
    return Draft(placed, question, word, f"The {first} is {PHRASE[word]} the {second}.") if placed else None


def _two_places(world: World, placed: Sequence[Placed]) -> str:
    first, second = placed[:2]
    return f"The {first.clip.label} is {where_is(world, first)}, the {second.clip.label} {where_is(world, second)}."


def _octants(world: World, config: QuestionsConfig) -> list[Target]:
    return [(*octant, step) for octant in OCTANTS for step in steps(config)]


def _pairs(words: Sequence[str]) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(word, answer) for word in words for answer in ("Yes", "No")]


KINDS = (
    Kind("CLASSIFICATION", every_label, _classification, 0, EVENT, "easy"),
    Kind("DOA", _octants, _doa, 0, SPACE, "medium"),
    Kind("MIXUP_SINGLE_CLASSIFICATION", every_label, _single_classification, 0, SPACE, "hard"),
    Kind("MIXUP_SINGLE_DOA", _octants, _single_doa, 0, SPACE, "hard"),
    Kind("MIXUP_DIRECTION", _pairs(tuple(AXIS)), _mixup_direction, 0, SCENE, "hard", answer=itemgetter(1)),
    Kind("MIXUP_DISTANCE_BOTH", _pairs(("closer", "farther")), _mixup_distance, 0, SCENE, "hard", answer=itemgetter(1)),
    Kind(
        "MIXUP_NONBINARY_DISTANCE",
        lambda world, config: [(step,) for step in steps(config)],
        _nonbinary_distance,
        0,
        SCENE,
        "hard",
    ),
    Kind("MIXUP_NONBINARY_SOURCE", labels_with(*RELATIONS), _nonbinary_source, 0, SCENE, "hard", answer=itemgetter(0)),
    Kind("MIXUP_NONBINARY_DIRECTION", each(*AXIS), _nonbinary_direction, 0, SCENE, "hard"),
)
