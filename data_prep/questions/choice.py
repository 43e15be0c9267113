"""Choice questions, as MMAU (choices, category, difficulty) and DCASE 2025 task 5 ask them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from audio_llm.errors import ConfigError
from audio_llm.shards.schema import Event
from data_prep.questions.common import (
    EVENT,
    PHRASE,
    SCENE,
    SECTORS,
    SIDES,
    SPACE,
    TIME,
    WHERE,
    Draft,
    Kind,
    QuestionsConfig,
    Target,
    beyond,
    each,
    every_label,
    heard,
    labels_with,
    list_words,
    metres,
    nearer_or_farther,
    pick,
    sector_of,
    two_distances,
)
from data_prep.scenes.world import Wish, World


def _identity(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = target
    placed = world.scene(rng, [Wish(label)])
    question = pick(rng, "Which sound do you hear?", "What is the sound?")
    options = [label, *world.others(rng, [label], config.choices - 1)]
    return Draft(placed, question, label, f"I hear the {label}.", options) if placed else None


def _presence(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, answer = target
    count = 2 if rng.random() < config.second_event else 1
    others = world.others(rng, [label], count)
    labels = [label, *others[1:]] if answer == "yes" else others
    placed = world.scene(rng, [Wish(labels[int(index)]) for index in rng.permutation(count)])
    question = pick(rng, f"Is there the sound of the {label}?", f"Do you hear the {label}?")
    if placed is None:
        return None
    # Looking a word up is one step of attention; that two words are the same a small model hardly learns to tell. So
    # the conclusion looks the asked sound up in the caption.
    conclusion = found_or_not(label, world.events_of(placed))
    thinking = f"I hear {list_words(heard(placed))}."
    return Draft(placed, question, answer, thinking, ["yes", "no"], conclusion=conclusion)


def found_or_not(label: str, events: Sequence[Event]) -> str:
    """Where `label` is among `events`, or that it is not."""
    found = [WHERE[sector_of(event.azimuth or 0.0)] for event in events if event.label == label]
    return f"So the {label} {found[0] if found else 'not there'}."


def _side(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (side,) = target
    label, other = world.others(rng, [], 2)
    wishes = [Wish(label, ("side", side))] + ([Wish(other)] if rng.random() < config.second_event else [])
    placed = world.scene(rng, wishes)
    question = pick(rng, f"Is the {label} on the left or on the right?", f"On which side is the {label}?")
    return Draft(placed, question, side, f"I hear the {label} on the {side}.", list(SIDES)) if placed else None


def _direction(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (sector,) = target
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, ("sector", sector))])
    question = pick(rng, f"Where is the {label}?", f"From which direction does the {label} come?")
    return Draft(placed, question, sector, f"I hear the {label} {WHERE[sector]}.", list(SECTORS)) if placed else None


def _distance(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (near,) = target
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, ("near", near))])
    question = pick(rng, f"How far away is the {label}?", f"What is the distance of the {label}?")
    options = [metres(value) for value in config.metres]
    return (
        Draft(placed, question, metres(near), f"I hear the {label} about {metres(near)} away.", options)
        if placed
        else None
    )


def _order(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (which,) = target
    labels = world.others(rng, [], config.choices)
    heard, answer = labels[: min(3, config.choices - 1)], labels[0]
    after = [heard[1:][int(index)] for index in rng.permutation(len(heard) - 1)]
    sequence = [answer, *after] if which == "first" else [*after, answer]
    placed = world.scene(rng, [Wish(label) for label in sequence], timing="sequence")
    if placed is None:
        return None
    thinking = "I hear " + ", then ".join(f"the {label}" for label in sequence) + "."
    question = pick(rng, f"Which sound comes {which}?", f"Which of the sounds is the {which}?")
    return Draft(placed, question, answer, thinking, labels)


def _counting(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (count,) = target
    labels = world.others(rng, [], count)
    placed = world.scene(rng, [Wish(label) for label in labels], timing="sequence")
    if placed is None:
        return None
    question = pick(rng, "How many different sounds are there?", "How many sound sources do you hear?")
    return Draft(placed, question, str(count), f"I hear {list_words(heard(placed))}.", ["1", "2", "3"])


def _overlap(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (answer,) = target
    first, second = world.others(rng, [], 2)
    asked = (first, second) if rng.random() < 0.5 else (second, first)
    placed = world.scene(rng, [Wish(first), Wish(second)], timing="overlap" if answer == "yes" else "sequence")
    question = f"Do the {asked[0]} and the {asked[1]} sound at the same time?"
    if placed is None:
        return None
    early, late = heard(placed)
    link = "while" if answer == "yes" else "before"
    thinking = f"I hear the {early} {link} the {late}."
    return Draft(placed, question, answer, thinking, ["yes", "no"])


def _duration(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    """Which of two sounds is longer. Only classes with recordings long enough for either answer are asked about."""
    (which,) = target
    ratio = world.margins.longer
    longest = min(world.events.seconds[1], (world.seconds - world.events.gap) / (1 + 1 / ratio))
    long, short = (0.85 * longest, longest), (0.3 * longest, 0.85 * longest / ratio)
    able = [label for label in world.labels if world.longest[label] >= long[0]]
    if len(able) < 2:
        raise ConfigError("questions: 'duration' needs two classes with long recordings; take it out of the mix.")
    first, second = (able[int(index)] for index in rng.permutation(len(able))[:2])
    answer = first if which == "first" else second
    lengths = [long, short] if which == "first" else [short, long]
    placed = world.scene(rng, [Wish(first), Wish(second)], lengths=lengths)
    if placed is None:
        return None
    question = pick(rng, f"Which lasts longer, the {first} or the {second}?", f"Is the {first} or the {second} longer?")
    seconds = {item.clip.label: item.seconds for item in placed}
    thinking = f"The {first} lasts {seconds[first]:.1f} s, the {second} {seconds[second]:.1f} s."
    return Draft(placed, question, answer, thinking, [first, second])


def _relation(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    """Which side of Y is X on: source to source, axes of the listener, as in SpatialSoundQA."""
    (side,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=beyond(world, side))
    question = pick(
        rng, f"On which side of the {second} is the {first}?", f"Is the {first} left or right of the {second}?"
    )
    return (
        Draft(placed, question, side, f"The {first} is {PHRASE[side]} the {second}.", list(SIDES)) if placed else None
    )


def _nearer(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (which,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=nearer_or_farther(world, nearer=which == "first"))
    question = pick(rng, f"Which is nearer, the {first} or the {second}?", f"Is the {first} or the {second} closer?")
    if placed is None:
        return None
    answer = first if which == "first" else second
    return Draft(placed, question, answer, two_distances(world, placed), [first, second])


KINDS = (
    Kind("identity", every_label, _identity, None, EVENT, "easy", "audio tagging", "Information Extraction"),
    Kind(
        "presence", labels_with("yes", "no"), _presence, 2, EVENT, "easy", "sound detection", "Information Extraction"
    ),
    Kind("side", each(*SIDES), _side, 2, SPACE, "easy"),
    Kind("direction", each(*SECTORS), _direction, 4, SPACE, "medium"),
    Kind("distance", lambda world, config: [(value,) for value in config.metres], _distance, 0, SPACE, "medium"),
    Kind("order", each("first", "last"), _order, None, TIME, "medium", "audio detection"),
    Kind("counting", each(1, 2, 3), _counting, 3, TIME, "medium", "sound counting"),
    Kind("overlap", each("yes", "no"), _overlap, 2, TIME, "medium", "audio detection"),
    Kind("duration", each("first", "second"), _duration, 2, TIME, "hard", "apply_duration"),
    Kind("relation", each(*SIDES), _relation, 2, SCENE, "hard"),
    Kind("nearer", each("first", "second"), _nearer, 2, SCENE, "hard"),
)
