"""On which side a row lies: what must not be divided (a recording, a speaker) lies on one side alone."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace

from audio_llm.errors import DataError, describe
from audio_llm.shards.splits import joined
from data_prep.manifest.recipe import ManifestConfig
from data_prep.manifest.rows import Draft, Reason, Reject


def divided(drafts: Sequence[Draft], config: ManifestConfig) -> tuple[dict[str, list[Draft]], list[Reject]]:
    """The drafts of each split of the recipe, in order, and those that have none.

    Raises :class:`DataError` for a split that gets nothing, and for a group that a column puts on two sides.
    """
    homes = (
        {unicodedata.normalize("NFC", str(value)): name for name, values in config.splits.items() for value in values}
        if config.by_value
        else {}
    )
    whole = joined([draft.groups for draft in drafts])
    drawn = {} if config.by_value else draw(list(whole.values()), config.splits, config.seed)
    found: dict[str, list[Draft]] = {name: [] for name in config.splits}
    rejects, owners = [], dict[str, str]()
    for draft in drafts:
        side = homes.get(draft.split) if config.by_value else drawn[whole[draft.groups[0]]]
        if side is None:
            known = ", ".join(homes)
            rejects.append(
                Reject(
                    draft.where, Reason.UNKNOWN_SPLIT, f"expected one of {known}, found '{draft.split or 'nothing'}'."
                )
            )
            continue
        for group in draft.groups:
            if owners.setdefault(group, side) != side:
                cure = "Divide by another column (columns.group), or mend the table."
                raise DataError(describe(f"'{group}'", f"only in {owners[group]}", f"in {side} as well", cure))
        sample = replace(draft.sample, source=replace(draft.sample.source, split=side))  # type: ignore[type-var]
        found[side].append(replace(draft, sample=sample))
    if empty := [name for name, rows in found.items() if not rows]:
        groups, apart = len(whole), len(set(whole.values()))
        cure = "Name other values or shares under 'splits'."
        if apart < groups:
            cure += " Groups hang together where a row is about sounds of both: make rows of sounds of one side."
        told = f"none, of {len(drafts)} rows in {groups} groups" + (
            f", {apart} of them apart" if apart < groups else ""
        )
        raise DataError(describe(f"split '{empty[0]}'", "rows", told, cure))
    return found, rejects


def draw(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """The side of each group: all of them in an order that the seed draws, cut by the shares; every side gets one where
    there are enough."""
    order = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    names, bounds, total = list(shares), [], 0.0
    for share in shares.values():
        total += share
        bounds.append(round(total * len(order)))
    for place in range(len(bounds)):  # none is empty, as long as there are groups
        least = (bounds[place - 1] if place else 0) + 1
        most = len(order) - (len(bounds) - 1 - place)
        bounds[place] = min(max(bounds[place], least), max(most, 0))
    sides, place = {}, 0
    for number, group in enumerate(order):
        while number >= bounds[place] and place < len(bounds) - 1:
            place += 1
        sides[group] = names[place]
    return sides
