"""What reasoning says of the events of a scene, clause by clause, and whether it follows when the scene is changed.

A clause is an entry of ``meta.counterfactual`` (``data_prep``'s interventions): ``clause`` is its kind, ``labels`` the
names of its event in the scene before and after (None: not there), ``was`` and ``is`` the truth in both.

======== ============================ =================================================
kind     truth                        what is read in the parts of the text on the event
======== ============================ =================================================
label    its name, or None            which of its two names are said
side     azimuth in degrees           the direction, as azimuth
height   elevation in degrees         above or below
distance metres                       the distance
onset    seconds                      the time
order    lead on ``beside`` (seconds) which of the two is named first
======== ============================ =================================================

A part is what stands between full stops and semicolons, and, where it names several events, between commas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from audio_llm.errors import ShardError, describe
from audio_llm.language.directions import read_direction, read_directions
from audio_llm.language.quantities import read_distance, read_time
from audio_llm.language.replies import mentions

Clause = Mapping[str, Any]
Said = float | frozenset[str] | None


@dataclass(frozen=True)
class Followed:
    """How reasoning followed one intervention: a value per clause that was told in it.

    `caused` are the clauses that had to change: True where what is said after is another thing than before, and nearer
    to the truth after. `others` had to stay: True where the same is said. A clause that had to change counts where
    either text says something of it, one that had to stay where both do.
    """

    caused: tuple[bool, ...]
    others: tuple[bool, ...]

    @property
    def whole(self) -> bool:
        return all(self.caused) and all(self.others)


Told = Mapping[str, Sequence[Clause]]  # ``changes`` and ``keeps``, as ``meta.counterfactual`` has them
Read = tuple[tuple[Said, ...], tuple[Said, ...]]  # what a text says of the clauses of both


def follow(told: Told, before: str, after: str) -> Followed:
    """Compare the reasoning `before` and `after` an intervention."""
    return compare(told, read(told, before, 0), read(told, after, 1))


def read(told: Told, text: str, scene: int) -> Read:
    """What `text` about `scene` (0 before, 1 after) says of every clause."""
    changes, keeps = told["changes"], told["keeps"]
    known = tuple(sorted({name for clause in (*changes, *keeps) for name in clause["labels"] if name}))
    said = [tuple(say(clause, text, scene, known) for clause in clauses) for clauses in (changes, keeps)]
    return said[0], said[1]


def compare(told: Told, before: Read, after: Read) -> Followed:
    """What was read of a text about the scene before against what was read of one about the scene after."""
    changed = zip(told["changes"], before[0], after[0], strict=True)
    caused = [
        first is not None and second is not None and first != second and _nearer(clause, second)
        for clause, first, second in changed
        if first is not None or second is not None
    ]
    kept = zip(before[1], after[1], strict=True)
    others = [first == second for first, second in kept if first is not None and second is not None]
    return Followed(tuple(caused), tuple(others))


def say(clause: Clause, text: str, scene: int, known: Sequence[str]) -> Said:
    """What `text` about `scene` (0 before, 1 after) says of a clause; None for nothing. `known` are the labels of both
    scenes."""
    kind, label = clause["clause"], clause["labels"][scene]
    if not text.strip():
        return None
    if kind == "label":
        return frozenset(name for name in clause["labels"] if name and mentions(text, name))
    if kind == "order":
        places = [_place(text, name, tuple(known)) for name in (label, clause["beside"][scene])]
        return None if None in places or places[0] == places[1] else float(places[0] < places[1])  # type: ignore[operator]
    for part in _parts_on(text, label, tuple(known)):
        value = _READ[kind](part)
        if value is not None:
            return round(value, 6)
    return None


def check_told(about: Any, sample: str) -> None:
    """Raise :class:`ShardError` unless `about` is a ``meta.counterfactual`` that a `sample` of this id may have."""
    problem = _problem(about, sample)
    if problem:
        expected = "another sample under `of`, a `kind`, and clauses under `changes` and `keeps`"
        cure = "Pairs are made by audio-llm prep, by the key counterfactuals of a subset."
        raise ShardError(describe(f"meta.counterfactual of sample '{sample}'", expected, problem, cure))


def _problem(about: Any, sample: str) -> str:
    if not isinstance(about, Mapping):
        return repr(about)[:60]
    for key in ("of", "kind"):
        if not isinstance(about.get(key), str) or about[key] == sample:
            return f"{key}: {about.get(key)!r:.60}"
    for key in ("changes", "keeps"):
        clauses = about.get(key)
        if not isinstance(clauses, (list, tuple)):
            return f"{key}: {clauses!r:.60}"
        wrong = next((clause for clause in clauses if not _is_clause(clause)), None)
        if wrong is not None:
            return f"{key}: {wrong!r:.120}"
    return ""


def _is_clause(clause: Any) -> bool:
    if not isinstance(clause, Mapping):
        return False
    kind = clause.get("clause")
    truths: list[Any] = [clause.get("was"), clause.get("is")]
    if kind == "label":
        return _are_names(clause.get("labels")) and _are_names(truths)
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in truths)
    if not numbers or not _are_names(clause.get("labels")):
        return False
    if kind == "order":
        return _are_names(clause.get("beside"))
    return kind in _READ and (kind != "distance" or min(truths) > 0)


def _are_names(pair: Any) -> bool:
    """Two names, of which one may be none."""
    return (
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(name is None or isinstance(name, str) for name in pair)
    )


def _nearer(clause: Clause, said: Said) -> bool:
    """Whether what is said is nearer to what is true now than to what was."""
    was, now = clause["was"], clause["is"]
    if clause["clause"] == "label":
        return said == frozenset([now] if now else [])
    assert isinstance(said, float)
    if clause["clause"] == "order":
        return (said > 0) == (now > 0)
    apart = _APART[clause["clause"]]
    return apart(said, now) < apart(said, was)


# ------------------------------------------------------------------------------------------------ parts of a text


@lru_cache(maxsize=20_000)
def _parts(text: str, known: tuple[str, ...]) -> tuple[tuple[str, frozenset[str]], ...]:
    """Parts of `text` with the labels that each names."""
    found = []
    for sentence in re.split(r"[;\n]|[.!?](?:\s|$)", text):
        named = frozenset(label for label in known if mentions(sentence, label))
        if len(named) > 1:
            pieces = re.split(r",\s", sentence)
            found += [(piece, frozenset(label for label in named if mentions(piece, label))) for piece in pieces]
        elif named:
            found.append((sentence, named))
    return tuple(found)


def _parts_on(text: str, label: str | None, known: tuple[str, ...]) -> list[str]:
    """The parts that name `label` and no other of the `known` ones."""
    return [part for part, named in _parts(text, known) if named == {label}]


def _place(text: str, label: str | None, known: tuple[str, ...]) -> tuple[int, int] | None:
    """Where `label` is first named: number of the part, character in it."""
    for number, (part, named) in enumerate(_parts(text, known)):
        if label in named:
            return number, part.casefold().find(str(label).casefold())
    return None


def _azimuth(part: str) -> float | None:
    vector = read_direction(part)
    if vector is None or math.hypot(*vector[:2]) < 0.1:
        return None
    return math.degrees(math.atan2(vector[1], vector[0]))


def _height(part: str) -> float | None:
    word = read_directions(part).get("above/below")
    return None if word is None else 1.0 if word == "above" else -1.0


_READ = {"side": _azimuth, "height": _height, "distance": read_distance, "onset": read_time}
_APART = {
    "side": lambda a, b: abs((a - b + 180) % 360 - 180),
    "height": lambda a, b: abs(math.copysign(1, a) - math.copysign(1, b)),
    "distance": lambda a, b: abs(math.log(max(a, 1e-3) / b)),
    "onset": lambda a, b: abs(a - b),
}
