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
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audio_llm.errors import ConfigError, nearest
from audio_llm.language.directions import great_circle, read_direction, unit_vector
from audio_llm.language.parts import completion_text, strip_turn_markers
from audio_llm.language.polarity import YES_NO, read_yes_no
from audio_llm.language.prompts import STYLES, TAGS
from audio_llm.language.quantities import read_distance, read_time
from audio_llm.language.replies import (
    Reply,
    mentions,
    normalise,
    read_labels,
    read_reply,
    resolve_option,
)
from audio_llm.registry import find
from audio_llm.training.counterfactual import counterfactual

Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]

DEFAULT_WEIGHTS: dict[str, Any] = {"answer_accuracy": 1.0, "format": 0.25}


# --- reading -------------------------------------------------------------------------------------------------------


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
        return self.reply.said or None


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
        if normalise(row.reference) in YES_NO:
            return float(row.stated is not None and read_yes_no(row.stated) == normalise(row.reference))
        gold = read_labels(row.reference)
        return float(row.stated is not None and read_labels(row.stated, sorted(gold)) == gold)
    place = resolve_option(row.reference, row.choices).index
    if place is None:  # the reference names none of the options: no truth to reward against
        return None
    return float(row.stated == row.choices[place])


def answer_accuracy(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
    """1 where the reply names the right option (letter, text or both; a contradiction is wrong), else 0.

    Without choices yes and no are read from the words; of any other reference the labels between semicolons must be the
    same, up to case and punctuation. None without a reference.
    """
    return [_accuracy(row) for row in _rows(completions, columns)]


_STYLE_TAGS = dict(zip(STYLES, (TAGS[2:], (TAGS[0], TAGS[2]), TAGS, ()), strict=True))


@functools.cache
def _style_pattern(style: str) -> re.Pattern[str]:
    tags = "|".join(TAGS)
    character = (
        rf"(?:(?!</?(?:{tags})>).)"  # a body holds no tag, else '<answer>a</answer><answer>b</answer>' would fit
    )
    body = rf"{character}*?\S{character}*"
    return re.compile(r"\s*".join(f"<{tag}>{body}</{tag}>" for tag in _STYLE_TAGS[style]) or body, re.DOTALL)


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
    label = float(mentions(clause, event["label"]))
    stated, away = read_direction(clause), read_distance(clause)
    truth = unit_vector(event["azimuth"], event.get("elevation") or 0.0)
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
    "counterfactual": counterfactual,
}


# --- recipes -------------------------------------------------------------------------------------------------------


def build_rewards(recipe: dict[str, Any] | None) -> tuple[list[RewardFunction], list[float]]:
    """Reward functions and their weights from a recipe's ``name: weight`` or ``name: {weight: w, option: value}``; a
    function with TRL's signature from elsewhere is named as ``package.module:function``.

    Raises :class:`ConfigError` for an unknown reward, an unknown option, or a weight that is no number.
    """
    functions: list[RewardFunction] = []
    weights: list[float] = []
    for name, value in (DEFAULT_WEIGHTS if recipe is None else recipe).items():
        function = find("reward", name, REWARDS, needs="__call__")
        options = dict(value) if isinstance(value, dict) else {"weight": value}
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
    if not any(weights):
        raise ConfigError("rewards: expected at least one of a weight other than 0, found none.")
    return functions, weights


def _bind(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """`function` with `options` fixed and its name kept: TRL logs rewards under ``__name__``."""
    if not options:
        return function

    @functools.wraps(function)
    def bound(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
        return function(prompts, completions, **{**columns, **options})

    return bound
