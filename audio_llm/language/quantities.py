"""Numbers with units, metres and seconds above all, as far as a text says them. Rewards pay and scorers score by this.

A range ("1-2 m"), a bound ("more than 2 m"), a difference ("2 m closer") and several values that differ are no value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from audio_llm.language import words
from audio_llm.language.stances import Span, said
from audio_llm.language.words import Text

_UNIT_TABLE = """
length m 1: m meter meters metre metres
length m 0.001: mm millimeter millimeters millimetre millimetres
length m 0.01: cm centimeter centimeters centimetre centimetres
length m 0.1: dm decimeter decimeters decimetre decimetres
length m 1000: km kilometer kilometers kilometre kilometres
length m 0.3048: ft foot feet
length m 0.0254: in inch inches
length m 0.9144: yd yard yards
time s 1: s sec secs second seconds
time s 0.001: ms msec millisecond milliseconds
time s 60: min mins minute minutes
time s 3600: h hr hrs hour hours
angle deg 1: degrees degree deg
frequency Hz 1: hz hertz
frequency Hz 1000: khz kilohertz
level dB 1: db decibel decibels
tempo bpm 1: bpm
share % 1: percent
"""
UNITS: dict[str, tuple[str, float]] = {
    name: (line.split()[0], float(line.split(":")[0].split()[2]))
    for line in _UNIT_TABLE.strip().splitlines()
    for name in line.split(":")[1].split()
}
_GLUED_UNITS = frozenset(UNITS)
_BOUNDS = frozenset(
    "more than | less than | fewer than | greater than | over | under | beyond | within | above | below | up to | < | "
    "> | ≤ | ≥ | ± | at least | at most | exceeding | before | maximum | minimum".split(" | ")
)
_BOUNDS |= {"half of", "third of", "double", "quarter of", "every", "each", "far as", "plus", "times", "long as"}
# "2 m closer than the cat", "1.5 s before the end": a difference.
_DIFFERENCES = frozenset(
    "closer nearer farther further less longer shorter later earlier before plus minus too late ago".split()
)
_BOUND_AFTER = ("or more", "or less", "at the earliest", "at the latest", "at least", "at most", "or so more")
# "2" alone is a distance or a time where no word follows that it could count.
_UNCOUNTED = frozenset("away off ahead in on at from to i and or but not".split())


@dataclass(frozen=True)
class Quantity:
    """A number of tokens [first, end). `dimension` is "" without a unit, "?" with one that is not known; `value` is in
    metres, seconds, degrees, …, None for a range, a bound or digits that are no number; `values` are a range's ends."""

    first: int
    end: int
    dimension: str
    value: float | None
    values: tuple[float, ...] = ()

    @property
    def span(self) -> Span:
        return self.first, self.end


def read_text(text: str) -> Text:
    """The tokens of `text`, units recognised."""
    return words.read(text, _GLUED_UNITS)


@lru_cache(maxsize=4096)
def quantities(text: Text) -> list[Quantity]:
    """Every number in `text` with its unit, in order; ranges and bounds as one quantity without a value."""
    found: list[Quantity] = []
    tokens, place = text.tokens, 0
    while place < len(tokens):
        quantity = _amount(text, place)
        if quantity is None:
            place += 1
            continue
        found.append(quantity)
        place = quantity.end
    return _ranges(text, found)


def _amount(text: Text, place: int) -> Quantity | None:
    """The quantity that begins at token `place`: a number with its unit, and smaller units that go on with it."""
    tokens = text.tokens
    token = tokens[place]
    following = [other.key for other in tokens[place + 1 : place + 5]]
    if token.key in ("a", "an") and following and UNITS.get(following[0], ("", 0))[0] in ("length", "time"):
        half = following[1:4] == ["and", "a", "half"]  # "a second" may be another one; "a second and a half" is none
        if half or (UNITS[following[0]][0] == "length" and len(following[0]) > 2):
            dimension, factor = UNITS[following[0]]
            return Quantity(place, place + (5 if half else 2), dimension, factor * (1.5 if half else 1))
    if not token.number:
        return None
    if text.glued(place) and not tokens[place - 1].number and tokens[place - 1].key not in UNITS:
        return Quantity(place, place + 1, "?", None)
    found = _with_unit(text, place)
    while found.value is not None and found.dimension in ("length", "time"):
        smaller = _continued(text, place, found)
        if smaller is None:
            break
        found = smaller
    return found


def _with_unit(text: Text, place: int) -> Quantity:
    tokens = text.tokens
    token = tokens[place]
    end = place + 1
    unit = tokens[end] if end < len(tokens) and text.gap(end) in ("", " ", "-") else None
    if unit is None or unit.key not in UNITS or (unit.key == "in" and end + 1 < len(tokens) and text.gap(end) != ""):
        clock = "time" if token.clock else ""
        if unit is not None and (unit.key in ("per", "^", "/") or text.glued(end)):
            clock = "?"
        return Quantity(place, end, clock, token.value)
    end += 1
    following = tokens[end] if end < len(tokens) else None
    if following is not None and (
        following.key == "per" or (following.key in ("/", "^") and text.gap(end) in ("", " "))
    ):
        return Quantity(place, end + 2, "?", None)
    if unit.key == "m" and following is not None and following.number and text.gap(end) in ("", " "):
        after = tokens[end + 1].key if end + 1 < len(tokens) and text.gap(end + 1) in ("", " ") else ""
        if UNITS.get(after, ("", 0))[0] == "time":  # "1m2s"
            return Quantity(place, end, "time", None if token.value is None else 60 * token.value)
    dimension, factor = UNITS[unit.key]
    return Quantity(place, end, dimension, None if token.value is None else token.value * factor)


def _continued(text: Text, place: int, found: Quantity) -> Quantity | None:
    """`found` and the smaller unit behind it: "2 m 10 cm", "one minute and two seconds", "1m50", "6 ft 7 in"."""
    tokens, end = text.tokens, found.end
    assert found.value is not None
    at = end + 1 if end < len(tokens) and tokens[end].key == "and" and text.gap(end) == " " else end
    if at >= len(tokens) or not tokens[at].number or text.gap(at) not in ("", " ", ", "):
        return None
    more, last = _with_unit(text, at), tokens[end - 1]
    whole = UNITS.get(last.key, ("", 0.0))[1]
    if last.key in ("ft", "foot", "feet") and at + 1 < len(tokens) and tokens[at + 1].key == "in":
        more = Quantity(at, at + 2, "length", 0.0254 * (tokens[at].value or 0.0))
    if more.value is None or more.value < 0:
        return None
    if more.dimension == "" and found.dimension == "length" and at == end:  # "one metre fifty", "five feet ten"
        part = {1.0: 0.01, 0.3048: 0.0254}.get(whole)
        count = tokens[at].value or 0.0
        if (
            part is None
            or not ((1 if part > 0.01 else 10) <= count < 100 and count == int(count))
            or part * count >= whole
        ):
            return None
        return Quantity(place, at + 1, "length", found.value + part * count)
    step = UNITS.get(tokens[more.end - 1].key, ("", 0.0))[1] if more.dimension == found.dimension else 0.0
    smaller = 0 < step < whole or (last.key == "m" and found.dimension == "time" and step < 60)
    return Quantity(place, more.end, found.dimension, found.value + more.value) if smaller and step else None


def _ranges(text: Text, found: Sequence[Quantity]) -> list[Quantity]:
    """Ranges ("1-2 m", "between 1 and 2 m", "1 or 2 m") and bounds ("up to 2 m") put together."""
    joined: list[Quantity] = []
    keys = text.keys
    for quantity in found:
        before = joined[-1] if joined else None
        if before is not None and _to(text, before, quantity):
            first = before.first - (before.first > 0 and keys[before.first - 1] in ("from", "between"))
            ends = [end for end in (*(before.values or (before.value,)), quantity.value) if end is not None]
            joined[-1] = Quantity(
                first, quantity.end, quantity.dimension or before.dimension, None, _scaled(text, before, quantity, ends)
            )
            continue
        bound = _bound_before(text, quantity) or _bound_after(text, quantity)
        joined.append(replace(quantity, value=None) if bound else quantity)
    return joined


def _bound_before(text: Text, one: Quantity) -> bool:
    """Whether words before it make a quantity a bound or a multiple: "up to 2 m", "every 2 m"."""
    words = text.keys[max(0, one.first - 3) : one.first]
    if words[-1:] in (("above",), ("below",)):  # a place in "left, front, above; 2 m" and in "left front above 2 m"
        listed = bool(words[-2:-1]) and words[-2] in ("left", "right", "front", "behind")
        return one.dimension == "length" and not listed and not _divided(text, one.first)
    return any(" ".join(words[-width:]) in _BOUNDS for width in (1, 2))


def _bound_after(text: Text, one: Quantity) -> bool:
    """The same of the words after it: "2 m or more", "2 m closer than the cat"."""
    words = text.keys[one.end : one.end + 3]
    following = [word for word in words[:2] if word not in ("is", "away")]
    differs = bool(following) and following[0] in _DIFFERENCES and not _divided(text, one.end)
    return differs or any(" ".join(words[:width]) in _BOUND_AFTER for width in (2, 3))


def _divided(text: Text, place: int) -> bool:
    return bool(re.search(r"[,;.]", text.gap(place)))


def _scaled(text: Text, before: Quantity, after: Quantity, ends: Sequence[float]) -> tuple[float, ...]:
    """The ends of a range in one unit: "1-2 cm" states the unit once."""
    if before.dimension == "" and after.dimension in {name for name, _ in UNITS.values()}:
        factor = UNITS[text.tokens[after.end - 1].key][1] if text.tokens[after.end - 1].key in UNITS else 1.0
        return tuple(end * factor for end in ends[:-1]) + tuple(ends[-1:])
    return tuple(ends)


def _to(text: Text, a: Quantity, b: Quantity) -> bool:
    """Whether two quantities are the ends of one range, or one number and its alternative."""
    keys = text.keys[a.end : b.first]
    gap = text.gap(b.first).strip(" ")
    if not keys:
        return gap == "-" or (text.glued(b.first) and gap == "" and text.gap(b.first) == "")
    if len(keys) > 1 or not all(text.gap(place).strip() == "" for place in range(a.end, b.first + 1)):
        return False
    if keys[0] in ("to", "until", "till", "through", "…", "x", "±", "by"):
        return True
    between = a.first > 0 and text.tokens[a.first - 1].key == "between"
    return keys[0] in ("and", "or") and (between or (a.dimension == "" and b.dimension != ""))


def read_distance(text: str) -> float | None:
    """Metres stated in `text` ('2.5m', 'two metres', '6 ft', a bare '2'); None without exactly one value."""
    return _single(text, "length")


def read_time(text: str) -> float | None:
    """Seconds stated in `text` ('at 1.5 s', '300 ms', '1:02', a bare '2'); None without exactly one value."""
    return _single(text, "time")


def _single(text: str, dimension: str) -> float | None:
    """The one value of `dimension` that `text` says; a bare number counts where nothing else does."""
    read = read_text(text)
    found = quantities(read)
    kept = [one for one in found if one.dimension == dimension] or [
        one for one in found if _bare(read, one, len(found))
    ]
    said_ones = [kept[place] for place in said(read, [one.span for one in kept])]
    values = [one.value for one in said_ones]
    first = next(iter(values), None)
    if first is None or first < 0:
        return None
    units = {"" if read.tokens[one.end - 1].number else read.tokens[one.end - 1].key for one in said_ones}
    close = 1e-6 if len(units) == 1 else 0.1  # "2 m (6 ft)" is how people convert
    same = all(value is not None and abs(value - first) <= close * max(first, value) for value in values)
    return first if same else None


def _bare(text: Text, quantity: Quantity, count: int) -> bool:
    """Whether a number without a unit is all the text has, and counts nothing ("2 people")."""
    if count != 1 or quantity.dimension != "" or text.glued(quantity.first) or text.glued(quantity.end):
        return False
    following = text.tokens[quantity.end].key if quantity.end < len(text.tokens) else ""
    return not following or following in _UNCOUNTED or bool(re.search(r"\W{2}|[,;]", text.gap(quantity.end)))
