"""Where a text says that something is, in direction words, degrees or clock hours.

The words are those of SpatialSoundQA ("left, front, below; 2.5m"; Zheng et al. 2024) and their synonyms. Azimuths are
counter-clockwise, 0 in front, 90 left; elevations are positive upwards; both in degrees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from audio_llm.language.quantities import Quantity, quantities, read_text
from audio_llm.language.stances import Span, said
from audio_llm.language.words import Text, Token

Vector = tuple[float, float, float]  # front, left, up; unit length

AXES = (("left", "right"), ("front", "behind"), ("above", "below"))
_VECTORS: dict[str, Vector] = {
    "left": (0, 1, 0), "right": (0, -1, 0), "front": (1, 0, 0), "behind": (-1, 0, 0), "above": (0, 0, 1),
    "below": (0, 0, -1),
}  # fmt: skip

DIRECTION_WORDS = {  # word → the word of its axis
    **{word: word for word in _VECTORS},
    **dict.fromkeys(("lefthand", "leftward", "leftwards", "leftmost"), "left"),
    **dict.fromkeys(("righthand", "rightward", "rightwards", "rightmost"), "right"),
    **dict.fromkeys(("frontal", "ahead", "forward", "forwards"), "front"),
    **dict.fromkeys(("back", "rear", "backward", "backwards", "rearward"), "behind"),
    **dict.fromkeys(("up", "overhead", "upward", "upwards", "upper", "over", "higher", "top"), "above"),
    **dict.fromkeys(("down", "beneath", "underneath", "downward", "downwards", "under", "lower", "bottom"), "below"),
}
_CLOCK = {12: "front", 3: "right", 6: "behind", 9: "left"}
_ADVERBIAL = frozenset("answer answers option options choice choices now away there here after before".split())
_PLACES_LEFT = frozenset(
    "the to on from your my its his her their far is it's at not or nor and front back top bottom upper lower "
    "slightly moves moving towards toward side comes coming behind ahead above below up down say rear directly "
    "forward over but then so was were think hear heard say just only instead rather than yes no hard far".split()
)
# (word, words before, words after) that make it no place: "up to", "slow down", "back and forth".
_IDIOMS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "up": (frozenset("end ends ended give gives speed turn turns pick set wake".split()), frozenset(("to", "front"))),
    "down": (frozenset("slow slows slowing shut shuts break calm".split()), frozenset()),
    "back": (frozenset("be come comes came go goes get call and".split()), frozenset(("and", "later"))),
    "above": (frozenset(("the", "stated", "see", "as", "mentioned")), frozenset(("all", "options", "mentioned"))),
    "below": (frozenset(("see", "the")), frozenset()),
    "over": (frozenset(("all", "is")), frozenset(("there", "here", "the", "time", "and"))),
    "forward": (frozenset(("look", "looking", "and")), frozenset(("and",))),
    "top": (frozenset(), frozenset(("of",))),
}  # fmt: skip


def read_directions(text: str) -> dict[str, str]:
    """Direction words by axis, ``{"left/right": "left", …}``; an axis that is named both ways is left out."""
    found = _direction_words(read_text(text))
    return {"/".join(axis): word for axis in AXES for word in axis if found & set(axis) == {word}}


def read_direction(text: str) -> Vector | None:
    """Unit vector (front, left, up) of the direction stated in `text`; None without one, or if it contradicts itself.

    Degrees win over words, since "behind, 170° to the left" says the same thing twice.
    """
    read = read_text(text)
    azimuth, elevation = _angles(read)
    if azimuth is not None or elevation is not None:
        return unit_vector(azimuth or 0.0, elevation or 0.0)
    found = _direction_words(read)
    total = [sum(_VECTORS[word][axis] for word in found) for axis in range(3)]
    if not found or sum(part**2 for part in total) < len(found):  # an axis named both ways cancels out
        return None
    length = math.hypot(*total)
    return (total[0] / length, total[1] / length, total[2] / length)


def is_direction(text: str) -> bool:
    """Whether `text` is made of direction words and of nothing else."""
    return all(word in DIRECTION_WORDS for word in re.findall(r"[a-z]+", text.lower()) or [""])


def unit_vector(azimuth: float, elevation: float) -> Vector:
    """(front, left, up) of an azimuth and an elevation in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))


def great_circle(a: Vector, b: Vector) -> float:
    """Angle between two unit vectors, in degrees [0, 180]."""
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return math.degrees(math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True))))


def _direction_words(text: Text) -> set[str]:
    places: dict[Span, set[str]] = {}
    for place, token in enumerate(text.tokens):
        keys = text.keys
        if token.key in DIRECTION_WORDS and means_place(text, place):
            hand = keys[place + 1 : place + 2] == ("hand",) and token.key in ("left", "right")
            places[place, place + 1 + hand] = {DIRECTION_WORDS[token.key]}
        elif token.value is not None and keys[place + 1 : place + 2] == ("o'clock",) and 1 <= token.value <= 12:
            places[place, place + 2] = _by_clock(token.value)
    spans = list(places)
    return {word for number in said(text, spans) for word in places[spans[number]]}


def _by_clock(hour: float) -> set[str]:
    """12 is in front, 3 on the right: hours between are both neighbours ("2 o'clock": front and right)."""
    if int(hour) in _CLOCK:
        return {_CLOCK[int(hour)]}
    return {"front" if hour < 3 or hour > 9 else "behind", "right" if hour < 6 else "left"}


def means_place(text: Text, place: int) -> bool:
    """Whether the direction word at `place` means a place: not in "that's right", "it has left", "up to 2 m"."""
    keys, word = text.keys, text.tokens[place].key
    before, after = (keys[place - 1] if place else ""), (keys[place + 1] if place + 1 < len(keys) else "")
    beside = [k for k in (place, place + 1) if text.glued(k)]
    if any(not _joins(text, k) for k in beside):
        return False
    told, follows = _IDIOMS.get(word, (frozenset[str](), frozenset[str]()))
    start = place == 0 or bool(re.search(r"[.,;:!?(\n]", text.gap(place)))
    stop = place + 1 >= len(keys) or bool(re.search(r"[.,;:!?)\n]", text.gap(place + 1)))
    if (before in told and not start) or (after in follows and not stop):
        return False
    measured = place + 1 < len(keys) and text.tokens[place + 1].number and not stop
    if word in ("over", "under", "above", "below") and measured and before not in DIRECTION_WORDS:
        return False
    if word == "left" and not stop and (after.endswith("ing") or keys[place + 1 : place + 3] == ("to", "itself")):
        return False
    if word == "left":
        return (
            start
            or before in _PLACES_LEFT
            and not _leaving(keys, place)
            or before in DIRECTION_WORDS
            or before.endswith("ly")
            or after == "hand"
        )
    return word != "right" or _is_right(keys, place, start, stop)


def _joins(text: Text, place: int) -> bool:
    """Whether a word glued to a direction word leaves it one: "front-left", "left-hand"."""
    pair = {text.tokens[place - 1].key, text.tokens[place].key}
    return pair <= set(DIRECTION_WORDS) or "hand" in pair or bool(pair & {"most", "side"})


def _leaving(keys: Sequence[str], place: int) -> bool:
    """ "what is left", "nothing is left": the verb."""
    return keys[place - 1] == "is" and place > 1 and keys[place - 2] in ("what", "nothing", "anything", "all", "who")


def _is_right(keys: Sequence[str], place: int, start: bool, stop: bool) -> bool:
    before, after = (keys[place - 1] if place else ""), (keys[place + 1] if place + 1 < len(keys) else "")
    if not stop and (after in _ADVERBIAL or after in ("in", "at", "on", "up", "down")):
        return False
    if not stop and after in ("behind", "above", "below", "over", "under"):  # "right behind me"; "right behind below"
        return place + 2 < len(keys) and keys[place + 2] in DIRECTION_WORDS
    if start and stop and after in ("it", "the", "that", "so", "there", "this", "i"):
        return False
    return (
        start
        or before not in ("all", "that's", "you're", "are", "that", "you", "i'm")
        and not (before == "is" and place > 1 and keys[place - 2] == "that")
    )


def _angles(text: Text) -> tuple[float | None, float | None]:
    """Azimuth and elevation stated in degrees ('35° to the left', 'azimuth -35°, elevation 10°'), None where absent."""
    azimuth: float | None = None
    elevation: float | None = None
    found = [one for one in quantities(text) if one.dimension == "angle"]
    for number in said(text, [one.span for one in found]):
        one = found[number]
        if one.value is None:
            continue
        before, after = _near(text, one)
        vertical = next(
            (
                DIRECTION_WORDS.get(w, w)
                for w in after[:1]
                if DIRECTION_WORDS.get(w, w) in ("above", "below", "elevation")
            ),
            "",
        )
        if vertical or before[:1] == ["elevation"]:
            elevation = -abs(one.value) if vertical == "below" else one.value
            continue
        side = next((word for word in (*after[:1], *before[:1]) if word in ("left", "right")), "")
        value = one.value if not side else abs(one.value) * (1 if side == "left" else -1)
        azimuth = value if azimuth is None else azimuth
    return azimuth, elevation


def _near(text: Text, one: Quantity) -> tuple[list[str], list[str]]:
    """The words before (nearest first) and after a quantity that matter, small words left out."""
    small = frozenset("to on towards toward of the your my is at by".split())

    def kept(tokens: Iterable[Token]) -> Iterator[str]:
        return (token.key for token in tokens if token.key not in small)

    after = [] if re.search(r"[,;]", text.gap(one.end)) else list(kept(text.tokens[one.end :]))
    return list(kept(reversed(text.tokens[: one.first]))), after
