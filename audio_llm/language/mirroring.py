"""A scene seen in a mirror, in words and in events: left and right change places, and azimuths their sign.

The sound of it is :func:`audio_llm.audio.swap_channels`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from audio_llm.shards.schema import Event, Sample

MIRROR = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
SIDE_WORD = re.compile(
    # "right" that is no side: the right answer, right now, all right.
    r"(?<!\ball )(?<!\bthat's )\b(" + "|".join(sorted(MIRROR, key=len, reverse=True)) + r")(?=\b|-)"
    r"(?! (?:answers?|options?|choices?|now|away|after|before)\b)",
    re.IGNORECASE,
)
_AZIMUTH = re.compile(r"(\bazimuth(?: angle)?(?: (?:of|is))?\s*[:=]?\s*)([-+−]?)(\d+(?:\.\d+)?)", re.IGNORECASE)


def mirror_text(text: str) -> str:
    """`text` with every left turned into right and back, capitals kept, and stated azimuths negated."""

    def turn(match: re.Match[str]) -> str:
        word = match[0]
        other = MIRROR[word.casefold()]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    def negate(match: re.Match[str]) -> str:
        positive = match[2] in ("", "+") and float(match[3]) not in (0, 180)
        return f"{match[1]}{'-' if positive else ''}{match[3]}"

    return _AZIMUTH.sub(negate, SIDE_WORD.sub(turn, text))


def mirror_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """A scene event, as a mapping: the azimuth (degrees, counter-clockwise, 0 in front) changes its sign."""
    return {**event, "azimuth": -event["azimuth"]} if event.get("azimuth") is not None else dict(event)


def mirror_events(events: Iterable[Event]) -> list[Event]:
    """The same of a sample's events."""
    return [event if event.azimuth is None else dataclasses.replace(event, azimuth=-event.azimuth) for event in events]


def mirror_sample(sample: Sample) -> Sample:
    """The sample as it is true of the mirrored sound: question, choices, answer, reasoning, elements and events."""
    return dataclasses.replace(
        sample,
        question=_mirrored(sample.question),
        choices=_mirrored(sample.choices),
        answer=_mirrored(sample.answer),
        thinking=_mirrored(sample.thinking),
        semantic_elements=_mirrored(sample.semantic_elements),
        events=mirror_events(sample.events),
    )


def _mirrored(value: Any) -> Any:
    if isinstance(value, str):
        return mirror_text(value)
    if isinstance(value, list):
        return [_mirrored(part) for part in value]
    return {key: _mirrored(part) for key, part in value.items()} if isinstance(value, dict) else value
