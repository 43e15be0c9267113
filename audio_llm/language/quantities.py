"""Directions, metres and seconds in words, as far as a text does not deny them. Rewards pay and scorers score by this
alone.

The words are those of SpatialSoundQA ("left, front, below; 2.5m"; Zheng et al. 2024) and their synonyms. Azimuths are
counter-clockwise, 0 in front, 90 left; elevations are positive upwards; both in degrees.
"""

from __future__ import annotations

import math
import re

from audio_llm.language.replies import said_in

Vector = tuple[float, float, float]  # front, left, up; unit length

AXES = (("left", "right"), ("front", "behind"), ("above", "below"))
_UNITS: dict[str, Vector] = {
    "left": (0, 1, 0), "right": (0, -1, 0), "front": (1, 0, 0), "behind": (-1, 0, 0), "above": (0, 0, 1),
    "below": (0, 0, -1),
}  # fmt: skip
_WORDS = {  # word → the word of its axis
    **{word: word for word in _UNITS},
    **dict.fromkeys(("frontal", "ahead", "forward"), "front"),
    **dict.fromkeys(("back", "rear", "backward"), "behind"),
    **dict.fromkeys(("up", "overhead", "upward", "upwards"), "above"),
    **dict.fromkeys(("down", "beneath", "underneath", "downward", "downwards"), "below"),
}
_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(_WORDS)})(?![a-z])")
_DEGREES = re.compile(r"([-+\u2212]?\d+(?:\.\d+)?)\s*(?:°|degrees?\b|deg\b)")
_ELEVATION_BEFORE = re.compile(r"elevation\s*(?:of|is|:|=)?\s*$")
_ELEVATION_AFTER = re.compile(r"^\s*(?:of\s+)?(?P<word>elevation|up|upwards?|above|down|downwards?|below)\b")
_SIDE_AFTER = re.compile(r"^\s*(?:(?:to|on|towards?|of)\s+)?(?:(?:the|your|my)\s+)?(?P<side>left|right)\b")
_SIDE_BEFORE = re.compile(r"\b(?P<side>left|right)\s*(?:by|at|,|:)?\s*$")
# No sign, and no second half of a range: neither "-2 m" nor "1-2 m" states one distance.
_AMOUNT = r"(?<![\w.\-\u2212])(\d+(?:\.\d+)?)\s*"
_METRES = re.compile(rf"{_AMOUNT}(cm|centimet(?:er|re)s?|m|met(?:er|re)s?)\b")
_SECONDS = re.compile(rf"{_AMOUNT}(ms|milliseconds?|s|secs?|seconds?)\b")


def read_directions(text: str) -> dict[str, str]:
    """Direction words by axis, ``{"left/right": "left", …}``; an axis that is named both ways is left out."""
    words = _direction_words(text)
    return {"/".join(axis): word for axis in AXES for word in axis if words & set(axis) == {word}}


def read_direction(text: str) -> Vector | None:
    """Unit vector (front, left, up) of the direction stated in `text`; None without one, or if it contradicts itself.

    Degrees win over words, since "behind, 170° to the left" says the same thing twice.
    """
    azimuth, elevation = _angles(text)
    if azimuth is not None or elevation is not None:
        return unit_vector(azimuth or 0.0, elevation or 0.0)
    words = _direction_words(text)
    total = [sum(_UNITS[word][axis] for word in words) for axis in range(3)]
    if not words or sum(part**2 for part in total) < len(words):  # an axis named both ways cancels out
        return None
    length = math.hypot(*total)
    return (total[0] / length, total[1] / length, total[2] / length)


def is_direction(text: str) -> bool:
    """Whether `text` is made of direction words and of nothing else."""
    return all(word in _WORDS for word in re.findall(r"[a-z]+", text.lower()) or [""])


def read_distance(text: str) -> float | None:
    """Metres stated in `text` ('2.5m', '2.5 metres', '80 cm'); None without exactly one value."""
    return _single(_METRES, {"c": 0.01, "m": 1.0}, text)


def read_time(text: str) -> float | None:
    """Seconds stated in `text` ('at 1.5 s', '1.5 seconds', '300 ms'); None without exactly one value."""
    return _single(_SECONDS, {"m": 0.001, "s": 1.0}, text)


def unit_vector(azimuth: float, elevation: float) -> Vector:
    """(front, left, up) of an azimuth and an elevation in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))


def great_circle(a: Vector, b: Vector) -> float:
    """Angle between two unit vectors, in degrees [0, 180]."""
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return math.degrees(math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True))))


def _direction_words(text: str) -> set[str]:
    return {_WORDS[match[0]] for match in said_in(text, _WORD)}


def _angles(text: str) -> tuple[float | None, float | None]:
    """Azimuth and elevation stated in degrees ('35° to the left', 'azimuth -35°, elevation 10°'), None where absent."""
    azimuth: float | None = None
    elevation: float | None = None
    for match in said_in(text, _DEGREES):
        value = float(match[1].replace("\u2212", "-"))
        before, after = match.string[: match.start()], match.string[match.end() :]
        vertical = _ELEVATION_AFTER.match(after)
        if vertical or _ELEVATION_BEFORE.search(before):
            down = vertical is not None and vertical["word"].startswith(("down", "below"))
            elevation = -abs(value) if down else value
            continue
        side = _SIDE_AFTER.match(after) or _SIDE_BEFORE.search(before)
        if side is not None:
            value = abs(value) if side["side"] == "left" else -abs(value)
        azimuth = value if azimuth is None else azimuth
    return azimuth, elevation


def _single(pattern: re.Pattern[str], units: dict[str, float], text: str) -> float | None:
    """The one quantity stated in `text`; None where there is none, or several that differ."""
    values = {float(match[1]) * units[match[2][0]] for match in said_in(text, pattern)}
    return values.pop() if len(values) == 1 else None
