"""The nine groups of semantic elements of AudSemThinker (Wijngaard et al. 2025): one table, one reader.

The published captions and the published questions call the groups by different names, and a language model wrote each
name in many ways. All of them lead to the names of the paper, whose order is the one in which groups are printed. The
questions have *reasoning relationships* in the place of what is felt beyond hearing: no group of the paper means that,
so it stands behind the nine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """`asks` is the question that the group answers, `names` what else it is called, to the word; a longer heading is
    of the group where `words` is found in it."""

    name: str
    asks: str
    names: tuple[str, ...]
    words: str


GROUPS = (
    Group(
        "sound generating agents",
        "which living beings sound",
        ("who", "agents", "agent", "entities", "animate beings", "sound generating animate beings"),
        r"\bagents?\b|\bbeings?\b|\banimated?\b|\bentit(?:y|ies)\b",
    ),
    Group(
        "physical sound sources",
        "which things and substances sound",
        ("what", "objects", "sources", "sound sources", "physical sources", "physical objects substances"),
        r"\bobjects?\b|\bsubstances?\b|\bphysical\b|\bsound sources\b",
    ),
    Group(
        "sound generation mechanisms",
        "what is done that sounds",
        ("how", "actions", "mechanisms", "actions mechanisms", "sound generating mechanisms"),
        r"\bactions?\b|\bmechanisms?\b",
    ),
    Group(
        "temporal context",
        "when, how long, in which order",
        ("when", "time", "temporal", "temporal relations", "temporal relationships"),
        r"\btemporal\b",
    ),
    Group(
        "spatial context",
        "where, in which surroundings",
        ("where", "place", "spatial", "environment", "spatial relations", "spatial relationships"),
        r"\bspatial\b|\benvironments?\b|\bsetting\b",
    ),
    Group(
        "acoustic surfaces",
        "which surfaces and materials are heard",
        ("surfaces", "materials", "acoustic surfaces materials", "acoustic properties"),
        r"\bsurfaces?\b|\bmaterials?\b|\bacoustic propert(?:y|ies)\b",
    ),
    Group(
        "signal descriptors",
        "what the signal is like, whatever made it",
        ("signal", "signal level descriptors", "sound descriptors"),
        r"\bsignal\b|\bdecoupled\b|\bindependent of (?:the )?source\b",
    ),
    Group(
        "auditory attributes",
        "how it is heard",
        ("attributes", "auditory sensation", "auditory sensation attributes", "auditory sensations"),
        r"\bauditory\b",
    ),
    Group(
        "non auditory sensation",
        "what is felt beyond hearing",
        ("feeling", "emotion", "emotions", "non auditory sensations", "non auditory descriptors", "subjective"),
        r"\bnon ?auditory\b|\bsubjective\b|\bemotion(?:s|al)?\b",
    ),
)
REASONING = Group("reasoning relationships", "what follows from what", ("reasoning",), r"\breasoning\b")
ELEMENT_GROUPS = tuple(group.name for group in GROUPS)
DESCRIPTION = "description"  # the group of a text that names none

_TABLE = (*GROUPS, REASONING)
_EXACT = {name: group for group in _TABLE for name in (group.name, *group.names)}
# "Non-auditory" holds "auditory", and "signal descriptors independent of source" names a source: the rarer words first.
_LOOSE = tuple((re.compile(group.words), group) for group in reversed(_TABLE))


def group_of(name: str, loose: bool = False) -> str | None:
    """The paper's name of the group called `name`, however it is spelt; None for a group of somebody's own.

    `loose` takes a longer heading for the group whose words are in it ("Physical objects/substances generating sound").
    """
    plain = _plain(name)
    found = _EXACT.get(plain) or _EXACT.get(plain.removeprefix("the "))
    if found is None and loose:
        found = next((group for words, group in _LOOSE if words.search(plain)), None)
    return found.name if found else None


def in_order(elements: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Groups and their words: the nine in their order, however they are called, others behind them as they come."""
    return sorted(elements.items(), key=lambda group: _place(group[0]))


def unified(elements: Mapping[str, Any]) -> dict[str, Any]:
    """`elements` under the names of the paper, in its order; groups that are one under several names become one."""
    found: dict[str, Any] = {}
    for name, words in in_order(elements):
        key = group_of(name, loose=True) or name
        found[key] = words if key not in found else [*_listed(found[key]), *_listed(words)]
    return found


def _place(name: str) -> int:
    place = next((n for n, group in enumerate(_TABLE) if group.name == group_of(name)), None)
    return len(_TABLE) if place is None else place


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.lower()).strip(" 0123456789")


def _listed(words: Any) -> list[str]:
    return list(words) if isinstance(words, (list, tuple)) else [str(words)]


# ------------------------------------------------------------------------------------------------ reading

_BULLET = re.compile(r"^\s*(?:[-*\u2022\u2013]\s+|[-\u2022]\s*(?=\w))")
_NUMBER = re.compile(r"^\s*\(?(\d{1,2})[.)]\s+")
# Where a new line begins that is not written as one: at a number that counts on, at a bullet between spaces.
_COUNTED = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)]\s+(?=\**[A-Za-z])")
_INLINE = re.compile(r"\s+[-\u2022]\s+(?=[\w\"'(*])")
_ANY_NAME = "|".join(re.escape(name).replace("\\ ", r"[\s_/-]+") for name in _EXACT)
# A name of the table in running text, after a stop: "Entities: a dog. Actions: it barks."
_NAMED = re.compile(rf"(?:(?<=[.;,])\s+|^)(?=\**(?:{_ANY_NAME})\**\s*:)", re.IGNORECASE)


def read_elements(text: str) -> dict[str, Any]:
    """Groups of semantic elements as they stand in a reply, or in the one text of the published shards.

    ``group: words; group: words``, a group a line, or numbered headings with bullets under them, also where the line
    breaks were lost. Bullets make a list, other words stay one text. Names stay as they are written, but for numbered
    headings, which get the paper's. A text that begins with no group is all of the group
    ``description``.
    """
    found: dict[str, Any] = {}
    name, heading = "", False  # the open group, and whether its words stand under it
    for line in _lines(text):
        number, bare = _NUMBER.match(line), _NUMBER.sub("", line)
        bullet = _BULLET.match(bare) is not None
        bare = _BULLET.sub("", bare).strip()
        before, colon, behind = bare.replace("**", "").partition(":")
        key = _heading(before, numbered=number is not None) if colon and len(before) <= 120 else None
        own = before.strip() and behind.strip() and len(before) <= 60 and ". " not in before
        if key is None and own and number is None and not (bullet and heading):
            key = before.strip()  # a group of somebody's own
        if key is None and not name:
            return {DESCRIPTION: text.strip()} if text.strip() else {}
        if key is None:
            found[name] = _with(found.get(name), bare)
            continue
        name, heading = key, not behind.strip()
        if not heading:
            found[name] = behind.strip() if name not in found else _with(found[name], behind.strip())
    return found


def _heading(before: str, numbered: bool) -> str | None:
    """What the group of a heading is called: the paper's name where it has a number, else as it is spelt."""
    words = re.sub(r"\s*\(.*\)\s*$", "", before).strip()  # "Entities (who)"
    return group_of(before, loose=True) if numbered else words if group_of(words) else None


def _with(words: Any, more: str) -> Any:
    return more if not words and not more else [*_listed(words), more] if words else [more]


def _lines(text: str) -> list[str]:
    text = text.replace("\\n", "\n")  # as the published tables have it
    if "\n" not in text.strip():
        counted = list(_COUNTED.finditer(text))
        starts = [match.start() for n, match in enumerate(counted, 1) if int(match[1]) == n]
        if len(starts) > 1:
            ends = [*starts[1:], len(text)]
            text = "\n".join([text[: starts[0]], *(text[a:b] for a, b in zip(starts, ends, strict=True))])
            text = _INLINE.sub("\n - ", text)
        elif ";" not in text:
            text = _NAMED.sub("\n", text)
    counted_lines = sum(_NUMBER.match(line) is not None for line in text.split("\n")) > 1
    parts = text.split("\n") if counted_lines else re.split(r"[;\n]", text)
    return [part for part in parts if part.strip(" -*\t")]
