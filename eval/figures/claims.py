"""What public rules make of one and the same replies, what explains that they differ, and which of them a number that
somebody states can come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from audio_llm.language.mentions import find, offered
from audio_llm.language.quantities import read_text
from eval.figures.estimates import Estimate
from eval.figures.scores import Scored, item_values, score_rows, summarise
from eval.predictions import Prediction
from eval.scorers import SCORERS, Scorer
from eval.scorers.base import Asking

ROUNDING = 0.0005  # half of the last digit of a figure in percent with one decimal


@dataclass(frozen=True)
class Rule:
    """What one rule makes of the replies: `unread` of them hold no answer by it, `dropped` are not in its figure."""

    name: str
    title: str
    accuracy: Estimate
    unread: int
    dropped: int


@dataclass(frozen=True)
class Shape:
    """Replies of one shape: how many there are, what each rule gives them on average, and one of them."""

    name: str
    count: int
    values: Mapping[str, float]
    example: str


def scored_by_rules(rows: Sequence[Prediction]) -> dict[Scorer, list[Scored]]:
    """The rows under every scorer that asks nobody and has a score for some of them."""
    rules = [SCORERS[name] for name in sorted(SCORERS)]
    found = {rule: score_rows(rows, rule) for rule in rules if not isinstance(rule, Asking)}
    return {rule: scored for rule, scored in found.items() if any(entry.score is not None for entry in scored)}


def rules_of(scored: Mapping[Scorer, Sequence[Scored]], asked: int) -> list[Rule]:
    """Every rule's figure, the highest first."""
    rules = []
    for rule, entries in scored.items():
        cell = summarise(entries)
        dropped = asked - cell.accuracy.n
        rules.append(Rule(rule.name, rule.title, cell.accuracy, cell.parse_failures, dropped))
    return sorted(rules, key=lambda rule: -rule.accuracy.value)


def shape_of(row: Prediction) -> str:
    """How a reply is written, as far as rules trip over it."""
    raw = row.raw.strip()
    if not raw:
        return "empty"
    if row.finish_reason == "length":
        return "cut off"
    if re.search(r"<answer>", raw, re.IGNORECASE):
        return "in tags"
    if re.fullmatch(r"\W*[A-Z]\W*", raw):
        return "a letter alone"
    bare = raw.strip("\"'“”. ")
    if bare.casefold() in {choice.casefold() for choice in row.choices}:
        return "an option word for word" + (", beginning with A" if re.match(r"A\b", bare) else "")
    if re.match(r"\W*[A-Z]\W\s*\S", raw):
        return "a letter and its words"
    named = {option for one in find(read_text(raw), offered(tuple(row.choices))) for option in one.options}
    if len(named) > 1:
        return "a text that names several options"
    return "a sentence with one option" if named else "no option named"


def shapes_of(scored: Mapping[Scorer, Sequence[Scored]], rows: Iterable[Prediction]) -> list[Shape]:
    """What rules give to replies of each shape, the most frequent first."""
    groups: dict[str, list[Prediction]] = {}
    for row in rows:
        if not row.error:
            groups.setdefault(shape_of(row), []).append(row)
    values = {rule.name: item_values(entries) for rule, entries in scored.items()}
    shapes = []
    for name, found in groups.items():
        means = {
            rule: float(np.mean([by_item[row.id] for row in found if row.id in by_item] or [np.nan]))
            for rule, by_item in values.items()
        }
        shapes.append(Shape(name, len(found), means, found[0].raw.strip()[:60].replace("\n", " ")))
    return sorted(shapes, key=lambda shape: -shape.count)


def verdict(claimed: float, rules: Sequence[Rule]) -> tuple[bool, str]:
    """Whether a stated accuracy, a share, is one that these replies give, and in words by which rule."""
    exact = [rule.name for rule in rules if abs(rule.accuracy.value - claimed) <= ROUNDING + 1e-9]
    within = [rule.name for rule in rules if rule.accuracy.low <= claimed <= rule.accuracy.high]
    told = f"{100 * claimed:.1f} %"
    if exact:
        return True, f"{told} is what {', '.join(exact)} gives"
    if within:
        return True, f"{told} is the figure of no rule here; it is within the interval of {', '.join(within)}"
    nearest = min(rules, key=lambda rule: abs(rule.accuracy.value - claimed))
    return False, (
        f"{told} is not reproduced: no rule's interval holds it; the nearest is {nearest.name}, {nearest.accuracy}"
    )
