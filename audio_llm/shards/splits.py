"""On which side of a split a recording lies, and what cannot be parted by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from audio_llm.errors import ConfigError, describe


def split_of(recording: str, fractions: dict[str, float], seed: int) -> str:
    """The split of a source recording: a seeded hash, so all that is made of one recording lies on one side.

    `fractions` maps split names to shares that sum to 1, e.g. ``{"train": 0.8, "test": 0.2}``. Adding recordings
    never moves the ones that were there.
    """
    if not fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(describe("split fractions", "shares ≥ 0 that sum to 1", str(fractions)))
    digest = hashlib.sha256(f"{seed}:{recording}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    bound = 0.0
    for split, share in fractions.items():
        bound += share
        if position < bound:
            return split
    return [split for split, share in fractions.items() if share > 0][-1]


def joined(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """By group what it cannot be parted from: the least name among all that rows of several groups chain to it."""
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        parent.setdefault(group, group)
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    for first, *others in rows:
        for other in others or [first]:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return {group: root(group) for group in list(parent)}
