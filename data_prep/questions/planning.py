"""Which questions a subset gets, and each question with its scene as a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from audio_llm.errors import ConfigError, nearest
from audio_llm.shards.schema import Event, Sample, Source
from data_prep.questions.caption import KINDS as CAPTIONS
from data_prep.questions.caption import describe_scene
from data_prep.questions.choice import KINDS as CHOICES
from data_prep.questions.choice import found_or_not
from data_prep.questions.common import Draft, Kind, QuestionsConfig, Target, octant_of
from data_prep.questions.spatialsoundqa import KINDS as SPATIALSOUNDQA
from data_prep.scenes.rooms import seeded
from data_prep.scenes.world import Placed, World

FORMATS = ("mmau", "dcase_aqa", "spatialsoundqa", "caption")
# Types whose answer follows from the caption of the scene.
CAPTIONED = ("identity", "presence", "side", "direction", "distance", "CLASSIFICATION")
TRIES = 400  # draws of a scene before a target counts as impossible in this world
KINDS: dict[str, Kind] = {kind.name: kind for kind in (*CHOICES, *SPATIALSOUNDQA, *CAPTIONS)}
CHOICE_KINDS = tuple(kind.name for kind in CHOICES)
OPEN_KINDS = tuple(kind.name for kind in SPATIALSOUNDQA)


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

    def key(self, subset: str) -> str:
        """The key of its sample."""
        return f"{subset}-{self.index:06d}"


def plan(config: QuestionsConfig, world: World, formats: dict[str, float], count: int, *seed: object) -> list[Ask]:
    """`count` items with exact shares of formats and types; within a type every (answer, position) equally often.

    Shares are rounded by largest remainder; each type deals its (answer, position) pairs in shuffled rounds, so
    counts differ by at most one.
    """
    rng = seeded("plan", *seed)
    wanted: list[tuple[str, str]] = []
    for name, number in _shares(formats, count).items():
        mix = mix_of(config, name)
        wanted += [(kind, name) for kind, times in _shares(mix, number).items() for _ in range(times)]
    decks = {kind: _deal(config, world, kind, rng) for kind in sorted({kind for kind, _ in wanted})}
    order = rng.permutation(len(wanted))
    asks = []
    for index, which in enumerate(order):
        kind, name = wanted[int(which)]
        asks.append(Ask(index, kind, name, *next(decks[kind])))
    return asks


def mix_of(config: QuestionsConfig, name: str) -> dict[str, float]:
    """The weights of the types that questions of format `name` are of."""
    return {"spatialsoundqa": config.spatialsoundqa, "caption": {"caption": 1.0}}.get(name, config.choice)


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


def deck_of(config: QuestionsConfig, world: World, name: str) -> tuple[list[tuple[Target, int | None]], float]:
    """All (answer, position among the choices) of type `name`, which are asked equally often, and its chance level."""
    kind, targets = KINDS[name], possible_targets(config, world, name)
    choices = choice_count(kind, config)
    chance = 1 / (choices or len({kind.answer(target) for target in targets}))
    return [(target, position) for target in targets for position in (range(choices) if choices else (None,))], chance


def _deal(
    config: QuestionsConfig, world: World, name: str, rng: np.random.Generator
) -> Iterator[tuple[Target, int | None, float]]:
    """(target, position, chance) for ever, in shuffled rounds of all pairs."""
    deck, chance = deck_of(config, world, name)
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
    draft.caption = describe_scene(world.events_of(draft.placed), config.metres)
    if config.thinking == "caption" and ask.kind in CAPTIONED:
        draft.thinking = f"{draft.caption} {draft.conclusion}".rstrip()
    if ask.position is None:
        return draft, []
    rng = seeded("choices", *seed, ask.index)
    rest = [option for option in draft.options if option != draft.answer]
    choices = [rest[int(index)] for index in rng.permutation(len(rest))]
    choices.insert(ask.position, draft.answer)
    return draft, choices


def after(ask: Ask, draft: Draft, placed: list[Placed], answer: str, world: World, config: QuestionsConfig) -> Draft:
    """The same question about the events `placed` of `world`, to which `answer` is the answer. Its thinking is the
    scene's caption where that is what the recipe's questions think; else there is none."""
    events = world.events_of(placed)
    caption = describe_scene(events, config.metres)
    conclusion = found_or_not(ask.target[0], events) if ask.kind == "presence" else ""
    thinking = f"{caption} {conclusion}".rstrip() if config.thinking == "caption" and ask.kind in CAPTIONED else ""
    return replace(draft, placed=placed, answer=answer, caption=caption, conclusion=conclusion, thinking=thinking)


def sample_of(ask: Ask, draft: Draft, choices: list[str], world: World, key: str, source: Source) -> Sample:
    """The :class:`Sample` of a question, without audio; `source` with the first recording as its clip."""
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
        thinking=draft.thinking or None,
        semantic_elements=semantic_elements(events),
        events=events,
        source=replace(source, clip=recordings[0]),
        meta={
            "question_type": ask.kind,
            "format": ask.format,
            "category": kind.category,
            "sub_category": kind.sub_category,
            "difficulty": kind.difficulty,
            "chance": round(ask.chance, 4),
            "caption": draft.caption,
            "room": room,
            "recordings": recordings,
        },
    )


def semantic_elements(events: Sequence[Event]) -> dict[str, Any]:
    """What and where in a few words, in order of onset: the groups of AudSemThinker that a scene can fill."""
    return {"what": [event.label for event in events], "where": [octant_of(event.azimuth or 0.0) for event in events]}
