"""Rewards for GRPO: pure functions with TRL's signature ``(prompts, completions, **columns) -> list[float | None]``.

A reward is a number in [0, 1], or None where it does not apply to a row (TRL then leaves the row out of that reward's
mean). What applies is decided by the *reference* answer alone, never by the reply, so that a reply cannot escape a
reward by being unreadable: an unreadable reply to a row that has a truth is worth 0.

Columns used: ``answer`` (reference text), ``choices`` (list of option texts, or None for a free answer). A recipe names
rewards and weights::

    rewards: {answer_accuracy: 1.0, format: 0.25, direction: {weight: 0.5, zero_at: 90}}

Weights that are sums of powers of two keep sums of rewards exact in binary, so that equal rewards compare equal.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audio_llm.errors import ConfigError, nearest
from audio_llm.prompts import STYLES, TAGS, Reply, normalise, read_reply, resolve_option, strip_turn_markers

Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]
Vector = tuple[float, float, float]  # front, left, up; unit length

DEFAULT_WEIGHTS: dict[str, Any] = {"answer_accuracy": 1.0, "format": 0.25}


# --- reading -------------------------------------------------------------------------------------------------------


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The assistant's text of a TRL completion: a plain string, or a list of messages whose last one is the reply."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


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


@dataclass(frozen=True)
class _Row:
    """One reply, taken apart, beside its reference."""

    reply: Reply
    choices: list[str]
    reference: str | None

    @property
    def stated(self) -> str | None:
        """What the reply claims; with choices the text of the option it resolves to, so that '(B)' alone counts."""
        if self.choices:
            return None if self.reply.choice is None else self.choices[self.reply.choice]
        return None if self.reply.problem == "several different answers" else self.reply.answer


def _rows(completions: Sequence[Any], columns: dict[str, Any]) -> list[_Row]:
    references = columns.get("answer") or [None] * len(completions)
    options = columns.get("choices") or [None] * len(completions)
    return [
        _Row(read_reply(completion_text(completion), choices or ()), list(choices or ()), reference)
        for completion, reference, choices in zip(completions, references, options, strict=True)
    ]


# --- rewards -------------------------------------------------------------------------------------------------------


def _accuracy(row: _Row) -> float | None:
    if row.reference is None:
        return None
    if not row.choices:
        return float(row.stated is not None and normalise(row.stated) == normalise(row.reference))
    gold = resolve_option(row.reference, row.choices).index
    if gold is None:  # the reference names none of the options: no truth to reward against
        return None
    return float(row.reply.choice == gold)


def answer_accuracy(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
    """1 where the reply names the right option (letter, text or both; a contradiction is wrong), else 0.

    Without choices the answer's text must equal the reference up to case and punctuation. None without a reference.
    """
    return [_accuracy(row) for row in _rows(completions, columns)]


_STYLE_TAGS = dict(zip(STYLES, (TAGS[2:], (TAGS[0], TAGS[2]), TAGS), strict=True))


@functools.cache
def _style_pattern(style: str) -> re.Pattern[str]:
    tags = "|".join(TAGS)
    character = (
        rf"(?:(?!</?(?:{tags})>).)"  # a body holds no tag, else '<answer>a</answer><answer>b</answer>' would fit
    )
    body = rf"{character}*?\S{character}*"
    return re.compile(r"\s*".join(f"<{tag}>{body}</{tag}>" for tag in _STYLE_TAGS[style]), re.DOTALL)


def format(prompts: Sequence[Any], completions: Sequence[Any], *, style: str | None = None, **columns: Any) -> Rewards:
    """1 where the whole reply is the style's tags in order, each once, none empty, and nothing around them; else 0.

    `style` comes from the recipe; a dataset column ``style`` decides row by row; without either, 'think'.
    """
    styles = [style] * len(completions) if isinstance(style, str) or style is None else list(style)
    return [
        float(_style_pattern(one or "think").fullmatch(strip_turn_markers(completion_text(completion))) is not None)
        for completion, one in zip(completions, styles, strict=True)
    ]


def length(prompts: Sequence[Any], completions: Sequence[Any], *, target: float = 25.0, **columns: Any) -> Rewards:
    """Correctness times a triangle over the words of thinking: 1 at `target`, 0 at no words and at 2 × `target`.

    Symmetric, so that neither silence nor rambling pays, and never paid for a wrong answer. None without a reference.
    """
    rewards: Rewards = []
    for row in _rows(completions, columns):
        correct = _accuracy(row)
        words = len((row.reply.thinking or "").split())
        rewards.append(None if correct is None else correct * max(0.0, 1.0 - abs(words - target) / target))
    return rewards


def _graded(
    completions: Sequence[Any],
    columns: dict[str, Any],
    read: Callable[[str], Any],
    error: Callable[[Any, Any], float],
    zero_at: float,
) -> Rewards:
    """1 − error / `zero_at`, at least 0; None where the reference states no quantity, 0 where the reply does not."""
    rewards: Rewards = []
    for row in _rows(completions, columns):
        truth = None if row.reference is None else read(row.reference)
        if truth is None:
            rewards.append(None)
            continue
        found = None if row.stated is None else read(row.stated)
        rewards.append(0.0 if found is None else max(0.0, 1.0 - error(found, truth) / zero_at))
    return rewards


def direction(prompts: Sequence[Any], completions: Sequence[Any], *, zero_at: float = 180.0, **columns: Any) -> Rewards:
    """Great-circle error between the stated and the true direction, in degrees, graded to [0, 1]."""
    return _graded(completions, columns, read_direction, great_circle, zero_at)


def distance(prompts: Sequence[Any], completions: Sequence[Any], *, zero_at: float = 2.0, **columns: Any) -> Rewards:
    """Error of the stated distance in metres, graded to [0, 1]; `zero_at` metres off is worth nothing."""
    return _graded(completions, columns, read_distance, lambda a, b: abs(a - b), zero_at)


def onset(prompts: Sequence[Any], completions: Sequence[Any], *, zero_at: float = 1.0, **columns: Any) -> Rewards:
    """Error of the stated time in seconds (an onset, an end, a duration), graded to [0, 1]."""
    return _graded(completions, columns, read_time, lambda a, b: abs(a - b), zero_at)


def evidence(prompts: Sequence[Any], completions: Sequence[Any], *, zero_at: float = 90.0, **columns: Any) -> Rewards:
    """Does the thinking describe the scene? The clauses of its first sentence (``the dog on the left, 2.5 m; the rain
    behind, 1 m.``) are compared with the true events, both in order of onset.

    A clause earns a third each for the label, for the direction (great-circle error, worth nothing at `zero_at`
    degrees) and for the distance (its ratio to the truth, worth nothing at a factor of two, or it would pay to guess
    the middle). The mean is over the events, or over the clauses where there are more: naming everything pays no better
    than naming what is there. Rows without events with a direction and a distance get None.
    """
    scores: Rewards = []
    for completion, events in zip(completions, columns.get("events") or [None] * len(completions), strict=True):
        known = [e for e in events or [] if e.get("azimuth") is not None and e.get("distance")]
        if not known or len(known) != len(events):
            scores.append(None)
            continue
        known.sort(key=lambda event: event.get("onset") or 0.0)
        sentence = re.split(r"\.(?:\s|$)", read_reply(completion_text(completion)).thinking or "")[0]
        clauses = [part for part in sentence.split(";") if part.strip()]
        earned = sum(_evidence(clause, event, zero_at) for clause, event in zip(clauses, known, strict=False))
        scores.append(earned / max(len(known), len(clauses)))
    return scores


def _evidence(clause: str, event: dict[str, Any], zero_at: float) -> float:
    label = 1.0 if re.search(rf"\b{re.escape(normalise(event['label']))}\b", normalise(clause)) else 0.0
    stated, away = read_direction(clause), read_distance(clause)
    truth = _unit(event["azimuth"], event.get("elevation") or 0.0)
    where = 0.0 if stated is None else max(0.0, 1 - great_circle(stated, truth) / zero_at)
    far = 0.0 if not away or away <= 0 else max(0.0, 1 - abs(math.log2(away / event["distance"])))
    return (label + where + far) / 3


REWARDS: dict[str, RewardFunction] = {
    "answer_accuracy": answer_accuracy,
    "format": format,
    "length": length,
    "direction": direction,
    "distance": distance,
    "onset": onset,
    "evidence": evidence,
}


# --- recipes -------------------------------------------------------------------------------------------------------


def _lookup(name: str) -> RewardFunction:
    """A reward by name, or by ``package.module:function`` for one with TRL's signature from elsewhere."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"rewards: unknown reward '{name}'{nearest(name, REWARDS)}. Known: {', '.join(REWARDS)}.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards: '{name}' cannot be imported ({error}).") from error


def build_rewards(recipe: dict[str, Any] | None) -> tuple[list[RewardFunction], list[float]]:
    """Reward functions and their weights from a recipe's ``name: weight`` or ``name: {weight: w, option: value}``.

    Raises :class:`ConfigError` for an unknown reward, an unknown option, or a weight that is no number.
    """
    functions: list[RewardFunction] = []
    weights: list[float] = []
    for name, value in (recipe or DEFAULT_WEIGHTS).items():
        function, options = _lookup(name), dict(value) if isinstance(value, dict) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"rewards: {name}: expected a number as weight, found {weight!r}.")
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for option, setting in options.items():
            if option not in known:
                raise ConfigError(f"rewards: {name}: unknown option '{option}'{nearest(option, known)}.")
            if option == "style" and setting not in STYLES:
                raise ConfigError(f"rewards: {name}: unknown style '{setting}'{nearest(str(setting), STYLES)}.")
            if option in ("zero_at", "target") and not (isinstance(setting, (int, float)) and setting > 0):
                raise ConfigError(f"rewards: {name}: {option}: expected a number above 0, found {setting!r}.")
        functions.append(_bind(function, options))
        weights.append(float(weight))
    if not functions:
        raise ConfigError("rewards: expected at least one reward, found none.")
    return functions, weights


def _bind(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """`function` with `options` fixed and its name kept: TRL logs rewards under ``__name__``."""
    if not options:
        return function

    @functools.wraps(function)
    def bound(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
        return function(prompts, completions, **{**columns, **options})

    return bound
