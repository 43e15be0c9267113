"""Questions about scenes whose answers follow from the ground truth, written so that the words alone give nothing away.

The answer is chosen first, from a list in which every answer (and every position among the choices) stands equally
often; then a scene is drawn in which it is true. So P(answer | question, choices) is uniform by construction, and
:mod:`data_prep.text_check` measures that it is.

Choice questions follow MMAU (choices, category, difficulty) and DCASE 2025 task 5; open questions the nine types of
SpatialSoundQA (Zheng et al. 2024, BAT) with their exact answer grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np

from audio_llm.errors import ConfigError, nearest
from audio_llm.shards.schema import Event, Sample, Source
from data_prep.scenes.rooms import seeded
from data_prep.scenes.world import Placed, Wish, World

SIDES = ("left", "right")
SECTORS = ("front", "left", "behind", "right")
OCTANTS = tuple(product(("left", "right"), ("front", "behind"), ("above", "below")))
AXIS = {"left": (1, 1), "right": (1, -1), "front": (0, 1), "behind": (0, -1), "above": (2, 1), "below": (2, -1)}
FORMATS = ("mmau", "dcase_aqa", "spatialsoundqa")
# Types whose answer the description of the scene contains.
DESCRIBED = ("identity", "presence", "side", "direction", "distance", "CLASSIFICATION")
TRIES = 400  # draws of a scene before a target counts as impossible in this world


@dataclass(frozen=True)
class QuestionsConfig:
    """Which questions are asked, in which shares, and what their answers are drawn from."""

    choice: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("identity", "presence", "side", "direction", "distance"), 1.0)
    )
    spatialsoundqa: dict[str, float] = field(default_factory=lambda: {"CLASSIFICATION": 1.0, "DOA": 1.0})
    choices: int = 4
    metres: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 7.0])
    steps: tuple[float, float] = (1.0, 5.0)  # distances that SpatialSoundQA questions ask for, in half-metre steps
    second_event: float = 0.5  # share of presence, side and nearby questions with another sound in the scene
    describe_scene: bool = False  # simple questions: the thinking says what, where and how far of every event


@dataclass
class Draft:
    """A question with its scene, before anything is rendered. `options` are all choices, `answer` among them."""

    placed: list[Placed]
    question: str
    answer: str
    thinking: str
    options: list[str] = field(default_factory=list)


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


def _list_words(labels: Sequence[str]) -> str:
    words = [f"the {label}" for label in labels]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _pick(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def _where(world: World, placed: Placed) -> str:
    return WHERE[sector_of(float(world.azimuth[placed.source]))]


def describe_scene(events: Sequence[Event], distances: Sequence[float]) -> str:
    """Every event in order of onset, its distance rounded (as a ratio) to one of `distances`:
    ``dog on the left, 2.5 m; rain behind, 1 m.``"""

    def words(event: Event) -> str:
        near = min(distances, key=lambda value: abs(np.log(value / (event.distance or value))))
        return f"{event.label} {WHERE[sector_of(event.azimuth or 0.0)]}, {metres(near)}"

    return "; ".join(words(event) for event in sorted(events, key=lambda event: event.onset or 0.0)) + "."


def _heard(placed: Sequence[Placed]) -> list[str]:
    return [item.clip.label for item in sorted(placed, key=lambda item: item.onset)]


# ------------------------------------------------------------------------------------------------ choice questions


def _identity(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = target
    placed = world.scene(rng, [Wish(label)])
    question = _pick(rng, "Which sound do you hear?", "What is the sound?")
    options = [label, *world.others(rng, [label], config.choices - 1)]
    return placed and Draft(placed, question, label, f"I hear the {label}.", options)


def _presence(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, answer = target
    count = 2 if rng.random() < config.second_event else 1
    others = world.others(rng, [label], count)
    labels = [label, *others[1:]] if answer == "yes" else others
    placed = world.scene(rng, [Wish(labels[int(index)]) for index in rng.permutation(count)])
    question = _pick(rng, f"Is there the sound of the {label}?", f"Do you hear the {label}?")
    if placed is None:
        return None
    return Draft(placed, question, answer, f"I hear {_list_words(_heard(placed))}.", ["yes", "no"])


def _side(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (side,) = target
    label, other = world.others(rng, [], 2)
    wishes = [Wish(label, ("side", side))] + ([Wish(other)] if rng.random() < config.second_event else [])
    placed = world.scene(rng, wishes)
    question = _pick(rng, f"Is the {label} on the left or on the right?", f"On which side is the {label}?")
    return placed and Draft(placed, question, side, f"I hear the {label} on the {side}.", list(SIDES))


def _direction(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (sector,) = target
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, ("sector", sector))])
    question = _pick(rng, f"Where is the {label}?", f"From which direction does the {label} come?")
    return placed and Draft(placed, question, sector, f"I hear the {label} {WHERE[sector]}.", list(SECTORS))


def _distance(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (near,) = target
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, ("near", near))])
    question = _pick(rng, f"How far away is the {label}?", f"What is the distance of the {label}?")
    options = [metres(value) for value in config.metres]
    return placed and Draft(placed, question, metres(near), f"I hear the {label} about {metres(near)} away.", options)


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
    question = _pick(rng, f"Which sound comes {which}?", f"Which of the sounds is the {which}?")
    return Draft(placed, question, answer, thinking, labels)


def _counting(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (count,) = target
    labels = world.others(rng, [], count)
    placed = world.scene(rng, [Wish(label) for label in labels], timing="sequence")
    if placed is None:
        return None
    question = _pick(rng, "How many different sounds are there?", "How many sound sources do you hear?")
    return Draft(placed, question, str(count), f"I hear {_list_words(_heard(placed))}.", ["1", "2", "3"])


def _overlap(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (answer,) = target
    first, second = world.others(rng, [], 2)
    asked = (first, second) if rng.random() < 0.5 else (second, first)
    placed = world.scene(rng, [Wish(first), Wish(second)], timing="overlap" if answer == "yes" else "sequence")
    question = f"Do the {asked[0]} and the {asked[1]} sound at the same time?"
    if placed is None:
        return None
    early, late = _heard(placed)
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
    question = _pick(
        rng, f"Which lasts longer, the {first} or the {second}?", f"Is the {first} or the {second} longer?"
    )
    seconds = {item.clip.label: item.seconds for item in placed}
    thinking = f"The {first} lasts {seconds[first]:.1f} s, the {second} {seconds[second]:.1f} s."
    return Draft(placed, question, answer, thinking, [first, second])


def _relation(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    """Which side of Y is X on: source to source, axes of the listener, as in SpatialSoundQA."""
    (side,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=_beyond(world, side))
    question = _pick(
        rng, f"On which side of the {second} is the {first}?", f"Is the {first} left or right of the {second}?"
    )
    return placed and Draft(placed, question, side, f"The {first} is {PHRASE[side]} the {second}.", list(SIDES))


def _nearer(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (which,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=_ratio(world, nearer=which == "first"))
    question = _pick(rng, f"Which is nearer, the {first} or the {second}?", f"Is the {first} or the {second} closer?")
    if placed is None:
        return None
    answer = first if which == "first" else second
    return Draft(placed, question, answer, _two_distances(world, placed), [first, second])


def _two_places(world: World, placed: Sequence[Placed]) -> str:
    first, second = placed[:2]
    return f"The {first.clip.label} is {_where(world, first)}, the {second.clip.label} {_where(world, second)}."


def _two_distances(world: World, placed: Sequence[Placed]) -> str:
    a, b = (f"{world.distance[item.source]:.1f} m" for item in placed[:2])
    return f"The {placed[0].clip.label} is {a} away, the {placed[1].clip.label} {b}."


# Pairs are asked of World.sources(first, candidates): the first wish is X, the second is Y.


def _beyond(world: World, word: str) -> Callable[[int, np.ndarray], np.ndarray]:
    """X lies to the `word` of Y by at least the margin."""
    axis, sign = AXIS[word]
    return lambda x, ys: sign * (world.vectors[x, axis] - world.vectors[ys, axis]) > world.margins.apart


def _mostly(world: World, word: str) -> Callable[[int, np.ndarray], np.ndarray]:
    """`word` is by far the largest part of the way from Y to X, so that one word says it."""
    axis, sign = AXIS[word]

    def fits(x: int, ys: np.ndarray) -> np.ndarray:
        way = world.vectors[x] - world.vectors[ys]
        others = np.abs(np.delete(way, axis, axis=1)).max(axis=1)
        return (sign * way[:, axis] > world.margins.apart) & (sign * way[:, axis] > 1.5 * others)

    return fits


def _ratio(world: World, *, nearer: bool) -> Callable[[int, np.ndarray], np.ndarray]:
    margin = world.margins.nearer
    if nearer:
        return lambda x, ys: world.distance[ys] > margin * world.distance[x]
    return lambda x, ys: world.distance[x] > margin * world.distance[ys]


def _separation(world: World, metres_apart: float) -> Callable[[int, np.ndarray], np.ndarray]:
    def fits(x: int, ys: np.ndarray) -> np.ndarray:
        gap = np.linalg.norm(world.vectors[x] - world.vectors[ys], axis=1)
        return np.abs(gap - metres_apart) < 0.25 - world.margins.step

    return fits


# ------------------------------------------------------------------------------------------------ SpatialSoundQA


def _doa_region(target: Target) -> tuple[object, ...]:
    return ("all", ("octant", *target[:3]), ("step", target[3]))


def _doa_answer(target: Target) -> str:
    return f"{', '.join(target[:3])}; {half_metres(target[3])}"


def _classification(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = target
    placed = world.scene(rng, [Wish(label)])
    question = _pick(rng, "Identify the sound events in the audio clip.", "What sound events can be detected?")
    return placed and Draft(placed, question, label, f"I hear the {label}.")


def _doa(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = world.others(rng, [], 1)
    placed = world.scene(rng, [Wish(label, _doa_region(target))])
    question = f"In which direction and how far away is the source of the {label}?"
    return placed and Draft(placed, question, _doa_answer(target), _doa_thinking(label, target))


def _doa_thinking(label: str, target: Target) -> str:
    return f"I hear the {label} {', '.join(target[:3])}, about {metres(target[3])} away."


def _single_classification(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (label,) = target
    (other,) = world.others(rng, [label], 1)
    octant = OCTANTS[int(rng.integers(len(OCTANTS)))]
    opposite = tuple({"left": "right", "right": "left", "front": "behind", "behind": "front"}.get(w, w) for w in octant)
    near = _steps(config)[int(rng.integers(len(_steps(config))))]
    regions = ("all", ("octant", *octant), ("step", near)), ("octant", *opposite)
    placed = world.scene(rng, [Wish(label, regions[0]), Wish(other, regions[1])])
    place = f"{', '.join(octant)}, about {near:g} meters away"
    question = f"Identify the sound events coming from the {place}."
    return placed and Draft(placed, question, label, f"The {label} comes from there, the {other} does not.")


def _single_doa(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, other = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(label, _doa_region(target)), Wish(other)])
    question = f"Where is the source of the {label}, and at what distance?"
    return placed and Draft(placed, question, _doa_answer(target), _doa_thinking(label, target))


OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front", "above": "below", "below": "above"}
PHRASE = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
    "above": "above",
    "below": "below",
}


def _mixup_direction(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    word, answer = target
    first, second = world.others(rng, [], 2)
    truth = word if answer == "Yes" else OPPOSITE[word]
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=_beyond(world, truth))
    question = f"Is the sound of the {first} {PHRASE[word]} the sound of the {second}?"
    return placed and Draft(placed, question, answer, f"The {first} is {PHRASE[truth]} the {second}.")


def _mixup_distance(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    word, answer = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(
        rng, [Wish(first), Wish(second)], pair=_ratio(world, nearer=(word == "closer") == (answer == "Yes"))
    )
    question = f"Is the sound of the {first} {word} than the sound of the {second}?"
    return placed and Draft(placed, question, answer, _two_distances(world, placed))


def _nonbinary_distance(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (apart,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=_separation(world, apart))
    question = f"What is the distance between the {first} and the {second}?"
    return placed and Draft(placed, question, half_metres(apart), _two_places(world, placed))


RELATIONS = {
    **{word: f"{PHRASE[word]} the other" for word in AXIS},
    "closer": "closer to you",
    "farther": "farther from you",
}


def _nonbinary_source(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    label, relation = target
    (other,) = world.others(rng, [label], 1)
    pair = _beyond(world, relation) if relation in AXIS else _ratio(world, nearer=relation == "closer")
    placed = world.scene(rng, [Wish(label), Wish(other)], pair=pair)
    question = f"Which sound source is {RELATIONS[relation]}?"
    return placed and Draft(placed, question, label, f"The {label} is {RELATIONS[relation]}, the {other} is not.")


def _nonbinary_direction(
    rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target
) -> Draft | None:
    (word,) = target
    first, second = world.others(rng, [], 2)
    placed = world.scene(rng, [Wish(first), Wish(second)], pair=_mostly(world, word))
    question = f"On which side of the {second} is the {first}?"
    return placed and Draft(placed, question, word, f"The {first} is {PHRASE[word]} the {second}.")


# ------------------------------------------------------------------------------------------------ the table of kinds


def _steps(config: QuestionsConfig) -> list[float]:
    low, high = config.steps
    return [step / 2 for step in range(round(2 * low), round(2 * high) + 1)]


def _each(*values: Any) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(value,) for value in values]


def _labels(world: World, config: QuestionsConfig) -> list[Target]:
    return [(label,) for label in world.labels]


def _labels_with(*values: Any) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(label, value) for label in world.labels for value in values]


def _octants(world: World, config: QuestionsConfig) -> list[Target]:
    return [(*octant, step) for octant in OCTANTS for step in _steps(config)]


def _pairs(words: Sequence[str]) -> Callable[[World, QuestionsConfig], list[Target]]:
    return lambda world, config: [(word, answer) for word in words for answer in ("Yes", "No")]


_EVENT, _TIME = "Sound-Based Event Recognition", "Temporal Event Reasoning"
_SPACE, _SCENE = "Spatial Reasoning", "Acoustic Scene Reasoning"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("identity", _labels, _identity, None, _EVENT, "easy", "audio tagging", "Information Extraction"),
        Kind(
            "presence",
            _labels_with("yes", "no"),
            _presence,
            2,
            _EVENT,
            "easy",
            "sound detection",
            "Information Extraction",
        ),
        Kind("side", _each(*SIDES), _side, 2, _SPACE, "easy"),
        Kind("direction", _each(*SECTORS), _direction, 4, _SPACE, "medium"),
        Kind("distance", lambda world, config: [(value,) for value in config.metres], _distance, 0, _SPACE, "medium"),
        Kind("order", _each("first", "last"), _order, None, _TIME, "medium", "audio detection"),
        Kind("counting", _each(1, 2, 3), _counting, 3, _TIME, "medium", "sound counting"),
        Kind("overlap", _each("yes", "no"), _overlap, 2, _TIME, "medium", "audio detection"),
        Kind("duration", _each("first", "second"), _duration, 2, _TIME, "hard", "apply_duration"),
        Kind("relation", _each(*SIDES), _relation, 2, _SCENE, "hard"),
        Kind("nearer", _each("first", "second"), _nearer, 2, _SCENE, "hard"),
        Kind("CLASSIFICATION", _labels, _classification, 0, _EVENT, "easy"),
        Kind("DOA", _octants, _doa, 0, _SPACE, "medium"),
        Kind("MIXUP_SINGLE_CLASSIFICATION", _labels, _single_classification, 0, _SPACE, "hard"),
        Kind("MIXUP_SINGLE_DOA", _octants, _single_doa, 0, _SPACE, "hard"),
        Kind("MIXUP_DIRECTION", _pairs(tuple(AXIS)), _mixup_direction, 0, _SCENE, "hard", answer=itemgetter(1)),
        Kind(
            "MIXUP_DISTANCE_BOTH",
            _pairs(("closer", "farther")),
            _mixup_distance,
            0,
            _SCENE,
            "hard",
            answer=itemgetter(1),
        ),
        Kind(
            "MIXUP_NONBINARY_DISTANCE",
            lambda world, config: [(step,) for step in _steps(config)],
            _nonbinary_distance,
            0,
            _SCENE,
            "hard",
        ),
        Kind(
            "MIXUP_NONBINARY_SOURCE",
            _labels_with(*RELATIONS),
            _nonbinary_source,
            0,
            _SCENE,
            "hard",
            answer=itemgetter(0),
        ),
        Kind("MIXUP_NONBINARY_DIRECTION", _each(*AXIS), _nonbinary_direction, 0, _SCENE, "hard"),
    )
}
CHOICE_KINDS = tuple(name for name in KINDS if not name.isupper())
OPEN_KINDS = tuple(name for name in KINDS if name.isupper())


def choice_count(kind: Kind, config: QuestionsConfig) -> int:
    """How many choices a question of `kind` has; 0 for an open one."""
    if kind.name == "distance":
        return len(config.metres)
    return config.choices if kind.positions is None else kind.positions


def check_config(config: QuestionsConfig) -> None:
    """Raise :class:`ConfigError` for a type of question that there is not, or a mix without weight."""
    for name, mix, known in (
        ("choice", config.choice, CHOICE_KINDS),
        ("spatialsoundqa", config.spatialsoundqa, OPEN_KINDS),
    ):
        for kind, weight in mix.items():
            if kind not in known:
                raise ConfigError(
                    f"questions.{name}: no type '{kind}'{nearest(kind, known)}. Known types: {', '.join(known)}."
                )
            if not isinstance(weight, (int, float)) or weight < 0:
                raise ConfigError(f"questions.{name}.{kind}: expected a weight of 0 or more, found {weight!r}.")
    if config.choices < 2 or len(set(config.metres)) < 2:
        raise ConfigError("questions: expected at least two choices and two values of metres.")


# ------------------------------------------------------------------------------------------------ the plan of a subset


@dataclass(frozen=True)
class Ask:
    """Item `index` of a subset: type, format, the answer it must have, the answer's place among the choices, chance."""

    index: int
    kind: str
    format: str
    target: Target
    position: int | None
    chance: float = 0.0


def plan(config: QuestionsConfig, world: World, formats: dict[str, float], count: int, *seed: object) -> list[Ask]:
    """`count` items with exact shares of formats and types; within a type every (answer, position) equally often.

    Shares are rounded by largest remainder; each type deals its (answer, position) pairs in shuffled rounds, so
    counts differ by at most one.
    """
    rng = seeded("plan", *seed)
    wanted: list[tuple[str, str]] = []
    for name, number in _shares(formats, count).items():
        mix = config.spatialsoundqa if name == "spatialsoundqa" else config.choice
        wanted += [(kind, name) for kind, times in _shares(mix, number).items() for _ in range(times)]
    decks = {kind: _deal(config, world, kind, rng) for kind in sorted({kind for kind, _ in wanted})}
    order = rng.permutation(len(wanted))
    asks = []
    for index, which in enumerate(order):
        kind, name = wanted[int(which)]
        asks.append(Ask(index, kind, name, *next(decks[kind])))
    return asks


def _shares(weights: dict[str, float], count: int) -> dict[str, int]:
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError(f"questions: the shares {weights} add up to nothing.")
    exact = {name: weight / total * count for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: shares[name] - exact[name])[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def possible_targets(config: QuestionsConfig, world: World, name: str) -> list[Target]:
    """The answers of type `name` for which this world has a scene (a small bank may lack, say, 7 m)."""
    kind = KINDS[name]
    found = [
        target
        for target in kind.targets(world, config)
        if _try(kind, world, config, target, "probe", name, target) is not None
    ]
    if not found:
        raise ConfigError(
            f"questions: no scene of this recipe fits any question of type '{name}'; widen rooms or margins."
        )
    return found


def _deal(
    config: QuestionsConfig, world: World, name: str, rng: np.random.Generator
) -> Iterator[tuple[Target, int | None, float]]:
    """(target, position, chance) for ever, in shuffled rounds of all pairs."""
    kind, targets = KINDS[name], possible_targets(config, world, name)
    choices = choice_count(kind, config)
    chance = 1 / (choices or len({kind.answer(target) for target in targets}))
    deck = [(target, position) for target in targets for position in (range(choices) if choices else (None,))]
    while True:
        for index in rng.permutation(len(deck)):
            yield (*deck[int(index)], chance)


def _try(kind: Kind, world: World, config: QuestionsConfig, target: Target, *seed: object) -> Draft | None:
    rng = seeded(*seed)
    for _ in range(TRIES):
        draft = kind.draw(rng, world, config, target)
        if draft:
            return draft
    return None


def draft_of(ask: Ask, world: World, config: QuestionsConfig, *seed: object) -> tuple[Draft, list[str]]:
    """The question and scene of `ask` with its choices in order. Depends on `ask` and `seed` alone."""
    draft = _try(KINDS[ask.kind], world, config, ask.target, "draft", *seed, ask.index)
    if draft is None:
        raise ConfigError(
            f"questions: no scene found for '{ask.kind}' with answer {ask.target}; widen rooms or margins."
        )
    if config.describe_scene and ask.kind in DESCRIBED:
        draft.thinking = describe_scene(world.events_of(draft.placed), config.metres)
    if ask.position is None:
        return draft, []
    rng = seeded("choices", *seed, ask.index)
    rest = [option for option in draft.options if option != draft.answer]
    choices = [rest[int(index)] for index in rng.permutation(len(rest))]
    choices.insert(ask.position, draft.answer)
    return draft, choices


def sample_of(
    ask: Ask,
    draft: Draft,
    choices: list[str],
    world: World,
    *,
    key: str,
    dataset: str,
    split: str,
    licence: str | None = None,
) -> Sample:
    """The :class:`Sample` of a question, without audio."""
    events = world.events_of(draft.placed)
    kind = KINDS[ask.kind]
    recordings = sorted({item.clip.recording for item in draft.placed})
    room = world.places[draft.placed[0].source][0]
    return Sample(
        id=key,
        task="choice" if choices else "open",
        question=draft.question,
        choices=choices,
        answer=draft.answer,
        thinking=draft.thinking,
        semantic_elements=semantic_elements(events),
        events=events,
        source=Source(dataset, split, recordings[0], licence),
        meta={
            "question_type": ask.kind,
            "format": ask.format,
            "category": kind.category,
            "sub_category": kind.sub_category,
            "difficulty": kind.difficulty,
            "chance": round(ask.chance, 4),
            "room": room,
            "recordings": recordings,
        },
    )


def semantic_elements(events: Sequence[Event]) -> dict[str, Any]:
    """What and where in a few words, in order of onset: the groups of AudSemThinker that a scene can fill."""
    return {
        "what": [event.label for event in events],
        "where": [octant_of(event.azimuth or 0.0) for event in events],
    }


# ------------------------------------------------------------------------------------------------ records of others


def mmau_record(sample: Sample) -> dict[str, Any]:
    """A choice question as an item of MMAU's JSON."""
    meta = sample.meta
    return {
        "id": sample.id,
        "audio_id": f"./audio/{sample.id}.wav",
        "question": sample.question,
        "choices": sample.choices,
        "answer": sample.answer,
        "dataset": sample.source.dataset if sample.source else None,
        "task": "sound",
        "split": sample.source.split if sample.source else None,
        "category": meta["category"],
        "sub-category": meta["sub_category"],
        "difficulty": meta["difficulty"],
    }


def dcase_record(sample: Sample) -> dict[str, Any]:
    """A choice question as DCASE 2025 task 5 has it: choices ``A. text``, the answer one of them verbatim."""
    choices = [f"{chr(65 + index)}. {choice}" for index, choice in enumerate(sample.choices)]
    return {
        "id": sample.id,
        "audio_url": f"../audio/{sample.id}.wav",
        "question": sample.question,
        "choice": choices,
        "answer": choices[sample.choices.index(sample.answer or "")],
        "question_type": KINDS[sample.meta["question_type"]].dcase_type,
    }


def spatialsoundqa_record(sample: Sample, number: int) -> dict[str, Any]:
    """An open question as an item of SpatialSoundQA's ``{"data": […]}``; two-source items name both responses."""
    sources = sample.meta.get("sources", [])
    record: dict[str, Any] = {"audio_id": None, "reverb_id": None, "audio_id2": None, "reverb_id2": None}
    for suffix, source in zip(("", "2"), sources, strict=False):
        record |= {f"audio_id{suffix}": source["clip"], f"reverb_id{suffix}": source["response"]}
    return {
        **record,
        "question_id": number,
        "question_type": sample.meta["question_type"],
        "question": sample.question,
        "answer": sample.answer,
    }
