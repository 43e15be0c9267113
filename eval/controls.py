"""Controls: what a model answers when the sound is taken away, mirrored or exchanged, or the options are permuted.

Each control turns an item into another item whose right answer is known, or says that it does not apply.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from audio_llm.errors import ConfigError, nearest
from eval.benchmarks.base import Item

CONTROLS = ("silence", "swap", "other_audio", "shuffled_options", "text_only")
DEAF = ("silence", "other_audio", "text_only")  # with these the question can only be guessed
MIRROR = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SIDE_WORD = re.compile(r"\b(" + "|".join(sorted(MIRROR, key=len, reverse=True)) + r")(?=\b|-)", re.IGNORECASE)


def parse_controls(text: str) -> list[str]:
    """``"silence,swap"`` → names; ``all`` and ``none`` are understood. Raises :class:`ConfigError` with the nearest."""
    if text in ("", "none"):
        return []
    names = list(CONTROLS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTROLS:
            raise ConfigError(f"control '{name}': expected one of {', '.join(CONTROLS)}{nearest(name, CONTROLS)}.")
        if names.count(name) > 1:
            raise ConfigError(f"control '{name}': expected once, found {names.count(name)} times.")
    return names


# ------------------------------------------------------------------------------------------------- what is asked


def silence(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The same question; :func:`silent` makes the audio."""
    return item


def other_audio(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The same question; :func:`audio_of_others` says whose audio it gets."""
    return item


def text_only(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The same question, and no audio in the prompt at all."""
    return item


def swap(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The item as it is true once left and right are exchanged; None where its answer does not turn on the side.

    It applies to an answer that names a side (its mirror must be among the choices), and to "yes" to a question about
    one side of which the mirrored scene makes a "no". A "no" stays out: the mirrored scene may make it a "no" again.
    """
    events = [mirror_event(event) for event in item.events]
    mirrored = mirror_text(item.gold)
    if mirrored != item.gold:
        if item.choices and mirrored not in item.choices:
            return None
        return dataclasses.replace(item, gold=mirrored, events=events)
    if item.gold.casefold() == "yes" and len({word.casefold() for word in _SIDE_WORD.findall(item.question)}) == 1:
        no = next((choice for choice in item.choices if choice.casefold() == "no"), None if item.choices else "No")
        return dataclasses.replace(item, gold=no, events=events) if no else None
    return None


def shuffled_options(item: Item, seed: int, sample: int = 0) -> Item | None:
    """The item with its options in another order, drawn by the seed and the item's id: the `sample`-th of all orders
    but its own, each order once; None where there are not so many."""
    own = tuple(item.choices)
    seen: list[tuple[str, ...]] = []
    generator = np.random.default_rng(item_seed(seed, item.id, "shuffled_options"))
    orders = _orders(item.choices)
    while len(seen) < min(sample + 1, orders - 1):
        order = tuple(item.choices[index] for index in generator.permutation(len(own)))
        if order != own and order not in seen:
            seen.append(order)
    return dataclasses.replace(item, choices=list(seen[sample])) if sample < len(seen) else None


def _orders(choices: Sequence[str]) -> int:
    """Number of different orders of `choices`, equal ones exchanged counting once."""
    return math.factorial(len(choices)) // math.prod(math.factorial(count) for count in Counter(choices).values())


QUESTIONS: dict[str, Callable[[Item, int, int], Item | None]] = {
    "": lambda item, seed, sample: item,
    "silence": silence,
    "swap": swap,
    "other_audio": other_audio,
    "shuffled_options": shuffled_options,
    "text_only": text_only,
}


def mirror_text(text: str) -> str:
    """`text` with every left turned into right and back, capitals kept."""

    def turn(match: re.Match[str]) -> str:
        word = match[0]
        other = MIRROR[word.casefold()]
        return other.capitalize() if word[0].isupper() else other

    return _SIDE_WORD.sub(turn, text)


def mirror_event(event: dict[str, Any]) -> dict[str, Any]:
    """A scene event seen in a mirror: the azimuth (degrees, counter-clockwise, 0 in front) changes its sign."""
    return {**event, "azimuth": -event["azimuth"]} if event.get("azimuth") is not None else dict(event)


# -------------------------------------------------------------------------------------------------- what is heard


def audio_of_others(clips: Sequence[str], seed: int) -> list[int | None]:
    """For every item the index of another item whose clip it hears instead: seeded, and never its own clip.

    A rotation of a shuffled order, by the first step that gives every item a foreign clip; where one clip makes up more
    than half of the items no such step exists, and the items left with their own clip get None.
    """
    count = len(clips)
    order = np.random.default_rng(seed).permutation(count)
    named = np.unique(np.asarray(clips, dtype=str), return_inverse=True)[1][order] if count else np.zeros(0, int)
    best, fewest = 0, count + 1
    for step in range(1, count):
        same = int((np.roll(named, -step) == named).sum())
        if same < fewest:
            best, fewest = step, same
        if same == 0:
            break
    partner: list[int | None] = [None] * count
    for place, index in enumerate(order):
        other = int(order[(place + best) % count])
        partner[int(index)] = other if clips[other] != clips[int(index)] else None
    return partner


def item_seed(seed: int, *parts: object) -> int:
    """A 31-bit seed that depends on the run's seed and on the item alone, never on batches or on resuming."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
