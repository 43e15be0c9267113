"""What is known of a recording: facts, each with its source, how sure it is, and when in the sound it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a fact is about. `seen` holds what pictures show: it may confirm and is never asked about.
KINDS = (
    *("label", "event", "caption", "onsets", "tempo", "pitch", "loudness", "centroid", "duration", "silence"),
    "seen",
)


@dataclass(frozen=True)
class Fact:
    """`value` is a text, or a number with its `unit`; `start` and `end` are seconds, None where it is of all the sound.
    `id` is unique in its item: evidence is named by it."""

    id: str
    kind: str
    value: str | float
    unit: str = ""
    source: str = ""
    confidence: float = 1.0
    start: float | None = None
    end: float | None = None

    def plain(self) -> dict[str, Any]:
        """For the fields of an item; what is not there is left out."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}

    @property
    def words(self) -> str:
        """The value as it is read aloud."""
        if isinstance(self.value, str):
            return self.value
        return f"{self.value:g} {self.unit}".strip()


def read(listed: Any) -> list[Fact]:
    """The facts in a field of an item; what is none is left out."""
    known = {item.name for item in dataclasses.fields(Fact)}
    return [
        Fact(**{name: value for name, value in one.items() if name in known})
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, Mapping) and {"id", "kind", "value"} <= set(one)
    ]


def added(listed: Any, more: Iterable[Fact]) -> list[dict[str, Any]]:
    """The facts of a field with `more`, which are numbered on: ``f0``, ``f1``, …"""
    there = read(listed)
    fresh = [dataclasses.replace(fact, id=f"f{n}") for n, fact in enumerate(more, len(there))]
    return [fact.plain() for fact in (*there, *fresh)]


def of(facts: Sequence[Fact], *kinds: str, least: float = 0.0) -> list[Fact]:
    """Those of the kinds, sure to `least` at the least, the surest first."""
    found = [fact for fact in facts if fact.kind in kinds and fact.confidence >= least]
    return sorted(found, key=lambda fact: -fact.confidence)
