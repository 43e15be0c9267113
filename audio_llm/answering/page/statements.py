"""What a reply states, clause by clause: seconds, a direction, metres. Read by ``audio_llm.language`` alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from audio_llm.language.directions import read_direction, read_directions
from audio_llm.language.quantities import Quantity, quantities, read_distance, read_text
from audio_llm.language.stances import said
from audio_llm.language.words import Text

_CLAUSE = re.compile(r"[;\n]|(?<=[.!?])\s")
# "Lasts 2 s" is no place in time.
_LASTING = frozenset("for lasts lasting lasted last duration".split())


@dataclass(frozen=True)
class Statement:
    """One clause and what it states; None for what it does not.

    `seconds` are a beginning and an end, equal for one moment. `azimuth` is in degrees, counter-clockwise, 0 in front
    and 90 left; None for what is only above or below. `elevation` is in degrees, up positive; `metres` a distance.
    `sides` are the words of a direction that is stated in words alone, of which the degrees are the middle.
    """

    words: str
    seconds: tuple[float, float] | None = None
    azimuth: float | None = None
    elevation: float | None = None
    metres: float | None = None
    sides: tuple[str, ...] = ()


def read_statements(text: str) -> list[Statement]:
    """The clauses of `text` that state a time or a direction, in order; a clause ends at ``;``, a line, a full stop.

    What a clause denies, asks or contradicts is not stated by it: the readers of rewards and scorers decide that.
    """
    found = []
    for clause in filter(None, map(str.strip, _CLAUSE.split(text))):
        seconds, direction = _seconds(clause), read_direction(clause)
        if seconds is None and direction is None:
            continue
        azimuth = elevation = None
        if direction is not None:
            front, left, up = direction
            elevation = round(math.degrees(math.asin(max(-1.0, min(1.0, up)))), 1)
            if math.hypot(front, left) > 1e-6:
                azimuth = round(math.degrees(math.atan2(left, front)), 1)
        in_degrees = any(one.dimension == "angle" for one in quantities(read_text(clause)))
        sides = () if in_degrees else tuple(read_directions(clause).values())
        found.append(Statement(clause, seconds, azimuth, elevation, read_distance(clause), sides))
    return found


def _seconds(clause: str) -> tuple[float, float] | None:
    """When the clause says that something is: the first and the last second it names."""
    read = read_text(clause)
    times = [one for one in quantities(read) if one.dimension == "time" and not _lasts(read, one)]
    values: list[float] = []
    for place in said(read, [one.span for one in times]):
        one = times[place]
        values += [one.value] if one.value is not None else one.values
    return (min(values), max(values)) if values and min(values) >= 0 else None


def _lasts(text: Text, one: Quantity) -> bool:
    return bool(_LASTING & set(text.keys[max(0, one.first - 2) : one.first])) or text.keys[one.end : one.end + 1] == (
        "long",
    )
