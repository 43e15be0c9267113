"""Places, metres and seconds in words. Rewards pay and scorers score by this alone."""

from __future__ import annotations

import math
import re

Vector = tuple[float, float, float]  # front, left, up; unit length


_AXES: dict[str, Vector] = {"front": (1, 0, 0), "left": (0, 1, 0), "up": (0, 0, 1)}
_WORDS: dict[str, tuple[str, int]] = {  # word → (axis, sign)
    **dict.fromkeys(("front", "frontal", "ahead", "forward"), ("front", 1)),
    **dict.fromkeys(("behind", "back", "rear", "backward"), ("front", -1)),
    "left": ("left", 1),
    "right": ("left", -1),
    **dict.fromkeys(("above", "overhead", "upward", "upwards"), ("up", 1)),
    **dict.fromkeys(("below", "beneath", "underneath", "downward", "downwards"), ("up", -1)),
}
_NUMBER = r"[-+\u2212]?\d+(?:\.\d+)?"
_NEGATION = re.compile(r"\b(?:not|neither|nor|cannot)\b|n't\b", re.IGNORECASE)
_DEGREES = re.compile(rf"({_NUMBER})\s*(?:°|degrees?\b|deg\b)", re.IGNORECASE)
_ELEVATION_BEFORE = re.compile(r"elevation\s*(?:of|is|:|=)?\s*$", re.IGNORECASE)
_ELEVATION_AFTER = re.compile(
    r"^\s*(?:of\s+)?(?P<word>elevation|up|upwards?|above|down|downwards?|below)\b", re.IGNORECASE
)
_SIDE_AFTER = re.compile(
    r"^\s*(?:(?:to|on|towards?|of)\s+)?(?:(?:the|your|my)\s+)?(?P<side>left|right)\b", re.IGNORECASE
)
_SIDE_BEFORE = re.compile(r"\b(?P<side>left|right)\s*(?:by|at|,|:)?\s*$", re.IGNORECASE)
_METRES = re.compile(rf"({_NUMBER})\s*(cm|centimet(?:er|re)s?|m|met(?:er|re)s?)\b", re.IGNORECASE)
_SECONDS = re.compile(rf"({_NUMBER})\s*(ms|milliseconds?|s|secs?|seconds?)\b", re.IGNORECASE)


def _number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def _unit(azimuth: float, elevation: float) -> Vector:
    """Unit vector of an azimuth (counter-clockwise, 0 front, 90 left) and an elevation (up positive), in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))


def _angles(text: str) -> tuple[float | None, float | None]:
    """Azimuth and elevation stated in degrees ('35° to the left', 'azimuth -35°, elevation 10°'), None where absent."""
    azimuth: float | None = None
    elevation: float | None = None
    for match in _DEGREES.finditer(text):
        value, before, after = _number(match[1]), text[: match.start()], text[match.end() :]
        vertical = _ELEVATION_AFTER.match(after)
        if vertical or _ELEVATION_BEFORE.search(before):
            down = vertical is not None and vertical["word"].lower().startswith(("down", "below"))
            elevation = -abs(value) if down else value
            continue
        side = _SIDE_AFTER.match(after) or _SIDE_BEFORE.search(before)
        if side is not None:
            value = abs(value) if side["side"].lower() == "left" else -abs(value)
        azimuth = value if azimuth is None else azimuth
    return azimuth, elevation


def read_direction(text: str) -> Vector | None:
    """Unit vector (front, left, up) of the direction stated in `text`; None without one, or if it contradicts itself.

    Understands the SpatialSoundQA grammar ('left, front, below; 2.5m'; Zheng et al. 2024), any subset of its
    words, and degrees, where azimuth is counter-clockwise as everywhere in this package. Degrees win over words, since
    'behind, 170° to the left' says the same thing twice.
    """
    if _NEGATION.search(text):
        return None
    azimuth, elevation = _angles(text)
    if azimuth is not None or elevation is not None:
        return _unit(azimuth or 0.0, elevation or 0.0)
    signs: dict[str, int] = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _WORDS:
            axis, sign = _WORDS[word]
            if signs.setdefault(axis, sign) != sign:
                return None
    if not signs:
        return None
    total = [sum(sign * _AXES[axis][i] for axis, sign in signs.items()) for i in range(3)]
    length = math.hypot(*total)
    return (total[0] / length, total[1] / length, total[2] / length)


def _single(pattern: re.Pattern[str], units: dict[str, float], text: str) -> float | None:
    """The one quantity stated in `text`; None where there is none, or several that differ."""
    values = {
        _number(m[1]) * next(f for u, f in units.items() if m[2].lower().startswith(u)) for m in pattern.finditer(text)
    }
    return values.pop() if len(values) == 1 else None


def read_distance(text: str) -> float | None:
    """Metres stated in `text` ('2.5m', '2.5 metres', '80 cm'); None without exactly one value."""
    return _single(_METRES, {"c": 0.01, "m": 1.0}, text)


def read_time(text: str) -> float | None:
    """Seconds stated in `text` ('at 1.5 s', '1.5 seconds', '300 ms'); None without exactly one value."""
    return _single(_SECONDS, {"m": 0.001, "s": 1.0}, text)


def great_circle(a: Vector, b: Vector) -> float:
    """Angle between two unit vectors, in degrees [0, 180]."""
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return math.degrees(math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True))))
