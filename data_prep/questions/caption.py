"""Captions: the whole scene in words. They teach a projector what, where and how far from every clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from audio_llm.shards.schema import Event
from data_prep.questions.common import (
    EVENT,
    WHERE,
    Draft,
    Kind,
    QuestionsConfig,
    Target,
    every_label,
    metres,
    pick,
    sector_of,
)
from data_prep.scenes.world import Wish, World


def describe_scene(events: Sequence[Event], distances: Sequence[float]) -> str:
    """Every event in order of onset, its distance rounded (as a ratio) to one of `distances`:
    ``the dog on the left, 2.5 m; the rain behind, 1 m.``

    The article is there for the tokenizer: after it a label is the same token here as in a question."""

    def words(event: Event) -> str:
        near = min(distances, key=lambda value: abs(np.log(value / (event.distance or value))))
        return f"the {event.label} {WHERE[sector_of(event.azimuth or 0.0)]}, {metres(near)}"

    return "; ".join(words(event) for event in sorted(events, key=lambda event: event.onset or 0.0)) + "."


def _caption(rng: np.random.Generator, world: World, config: QuestionsConfig, target: Target) -> Draft | None:
    (label,) = target
    second = [Wish(other) for other in world.others(rng, [label], 1) if rng.random() < config.second_event]
    placed = world.scene(rng, [Wish(label), *second])
    if placed is None:
        return None
    question = pick(rng, "Describe the scene.", "What do you hear, and where?")
    return Draft(placed, question, describe_scene(world.events_of(placed), config.metres), "")


KINDS = (Kind("caption", every_label, _caption, 0, EVENT, "easy"),)
