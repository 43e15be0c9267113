"""A scene seen in a mirror, in words and in events: left and right change places, and azimuths their sign.

Only what means a side is changed: a "right" that is correct or just now and a "left" that went away or is there still
stay as they are.
Where the words do not tell which it is, or name sides that a mirror cannot turn (west, channel 1), there is no mirror
image of the text. The sound of it is :func:`audio_llm.audio.swap_channels`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from audio_llm.shards.schema import Event, Sample

MIRROR = {"left": "right", "leftmost": "rightmost", "l": "r", "clockwise": "counterclockwise"}
MIRROR |= {"counter-clockwise": "clockwise", "anticlockwise": "clockwise", "anti-clockwise": "clockwise"}
MIRROR = {**{other: word for word, other in MIRROR.items()}, **MIRROR, "clockwise": "counter-clockwise"}
SIDE_WORD = re.compile(r"\b((?:left|right)(?:most)?)\b", re.IGNORECASE)

_TURNED = re.compile(r"\b(?:(?:counter|anti)-?)?clockwise\b", re.IGNORECASE)
_AZIMUTH = re.compile(
    r"(\b(?:azimuth|DoA|direction|bearing)(?: angle)?(?:(?: of| is| at|:|=)(?: about| around| roughly)?)?\s*)"
    r"([-+−]?)(\d+(?:\.\d+)?)(?!\.?\d)(?!\s?(?:m|cm|metres|meters)\b)",
    re.IGNORECASE,
)
_DEGREES = re.compile(r"[-+−]?\d+(?:\.\d+)?\s?(?:°|º|deg\b|degrees?\b)", re.IGNORECASE)
_UPRIGHT_AFTER = re.compile(r"\s?(?:C|F|celsius|fahrenheit|above|below|up|down|elevation|wide|apart)\b", re.IGNORECASE)
_COUNTED_BEFORE = re.compile(
    r"(?:elevation(?: angle)?(?: of| is)?|(?:left|right|clockwise)(?: by)?)\s*[:=,]?\s*$", re.IGNORECASE
)
_HOURS = dict(zip("twelve one two three four five six seven eight nine ten eleven".split(), range(12), strict=True))
_CLOCK = re.compile(rf"\b(\d{{1,2}}|{'|'.join(_HOURS)})(:30)?(\s?o['’]\s?clock)\b", re.IGNORECASE)
_TIME_OF_DAY = re.compile(r"\s*(?:[ap]\.?m\b|in the (?:morning|afternoon|evening)|at night|sharp|news)", re.IGNORECASE)
_LETTER = re.compile(r"(?<![\w'’&.])([LR])(?![\w'’&.])")
# Sides that cannot be turned: where the listener looks, or what the channels are, is not known.
_UNTURNABLE = re.compile(
    r"\b(?:(?:north|south)?(?:east|west)(?:wards?)?|starboard|larboard|port side"
    r"|channels? (?:\d|one|two)|(?:first|second|1st|2nd) channel)\b",
    re.IGNORECASE,
)

_PLACE = r"(?:left|right|front|back|rear|behind|above|below|up|down|upper|lower|cent(?:er|re)|middle|ahead)"
# What stands before and after a left or right that is a side.
_SIDE_BEFORE = re.compile(
    r"\b(?:on|to|from|at|in|into|onto|by|toward|towards|via|of) (?:(?:the|your|my|his|her|its|our|their|both) )?"
    r"(?:(?:far|very|hard|extreme|immediate|front|rear|back|upper|lower|top|bottom) )*$"
    r"|\b(?:turn|mov|pan|shift|drift|veer|fl|walk|run|fac|look|head|point|travel|go|com|bear|swerv|steer)"
    r"(?:e|es|s|ed|ing|ning|ned|y|ies|ew)? (?:to )?(?:the )?$"
    rf"|\b{_PLACE}(?: and | or | to |, and |, or |[-,;/] ?| )$"
    r"|\b(?:far|further|farther|slightly|somewhat|stage|located|positioned|placed|more|hard)[: ]+$"
    r"|\b(?:option|side|answer|direction)[: ]+$"
    r"|\d ?(?:m|metres?|meters?|°|degrees?),? $|[,;:(/]\s*$",
    re.IGNORECASE,
)
_SIDE_AFTER = re.compile(
    r"-hand\b|[- ](?:hand )?(?:sides?|channels?|ears?|speakers?|half|edge|corner|end|wall|direction|hemisphere|quadrant"
    r"|microphones?|mics?|loudspeakers?|headphones?|earcups?|of|(?:and|or) (?:the )?(?:left|right))\b"
    rf"|[-,;/] ?{_PLACE}\b|, ?\d|:",
    re.IGNORECASE,
)
# What stands around one that is none.
_NONE_AFTER = {
    "right": re.compile(
        r"-handed|[- ](?:answers?|options?|choices?|time|times|moment|words?|way|thing|things|person|order|track|idea"
        r"|mood|note|notes|key|tempo|angle|now|away|there|here|until|through"
        r"|across|at the|from the (?:start|beginning))\b",
        re.IGNORECASE,
    ),
    "left": re.compile(
        r"-handed|-?overs?\b| (?:over|off|out|alone|me|him|us|them|her|you|my|the|a|an|for|unsaid|undone|open|to go)\b",
        re.IGNORECASE,
    ),
}
_NONE_BEFORE = {
    "right": re.compile(r"\b(?:all|quite|(?:you|they|we) are|i am|you're|i'm|they're|that(?: is|'s)) $", re.I),
    "left": re.compile(
        r"\b(?:has|have|had|having|just|already|nothing|something|anything|anyone|much|i|you|we|they|he|she|who) $",
        re.IGNORECASE,
    ),
}  # fmt: skip
_ADVERB = re.compile(r" (?:after|before|behind|above|below|in front|beside|next|over|up|down)\b", re.IGNORECASE)
_BARE = re.compile(
    rf"(?:\(?[a-z][).:] ?)?(?:{_PLACE}|leftmost|rightmost|and|or|to|the|in|yes|no|\W|\d|m\b)+", re.IGNORECASE
)


def mirror_text(text: str) -> str | None:
    """`text` as it is true in the mirror: sides, senses of rotation, hours of the clock as directions and stated
    azimuths turned, capitals kept. None where that cannot be told."""
    if _UNTURNABLE.search(text):
        return None
    if text.strip() in ("L", "R"):
        return text.replace("L", "R") if "L" in text else text.replace("R", "L")
    found: list[tuple[int, int, str]] = []
    for part in (_sides, _letters, _turns, _hours, _azimuths):
        replaced = part(text)
        if replaced is None:
            return None
        found += replaced
    if not _degrees_are_told(text):
        return None
    for start, end, word in sorted(found, reverse=True):
        text = text[:start] + word + text[end:]
    # Words that are sides are so in the mirror, too: "a dog, right a dog" would become "a dog, left a dog".
    return (
        text if len(_sides(text) or ()) == sum(SIDE_WORD.fullmatch(word) is not None for _, _, word in found) else None
    )


Replaced = list[tuple[int, int, str]]  # start, end, the new text


def _sides(text: str) -> Replaced | None:
    found = []
    for match in SIDE_WORD.finditer(text):
        verdict = _is_side(text, match)
        if verdict is None:
            return None
        if verdict:
            found.append((match.start(), match.end(), _like(match[0], MIRROR[match[0].casefold()])))
    return found


def _is_side(text: str, match: re.Match[str]) -> bool | None:
    """Whether a left or right is a side; None where the words around it do not tell."""
    word, before, after = match[0].casefold(), text[: match.start()], text[match.end() :]
    if word.endswith("most") or _BARE.fullmatch(text):
        return True
    if word == "right" and before.endswith(", ") and after.startswith("?"):
        return None  # "…, right?" asks for assent
    if word == "right" and not after.startswith(" of ") and _NONE_BEFORE[word].search(before):
        return False
    if _SIDE_AFTER.match(after):
        return True
    none_after = _NONE_AFTER[word].match(after)
    led = _SIDE_BEFORE.search(before)
    if word == "right" and none_after:
        return False
    if led and not (word == "left" and none_after and before.endswith((", ", "; ", ": "))):
        # "right behind" is a place beside another, or just behind: a comma would tell
        return None if _ADVERB.match(after) and not before.endswith("the ") else True
    if none_after or _NONE_BEFORE[word].search(before):
        return False
    if word == "right" and re.match(r" (?:after|before)\b", after):
        return False
    alone = re.search(r"\bthe $", before, re.I) and re.match(r"[.,;!?)]|$| (?:is|was|than)\b", after)
    return True if alone else None


def _letters(text: str) -> Replaced | None:
    """A lone L or R that names a channel, an ear or a loudspeaker."""
    found = []
    for match in _LETTER.finditer(text):
        named = re.match(r"[ -](?:channel|ear|speaker|side)|\s?/\s?[LR]\b", text[match.end() :])
        leads = re.search(r"(?:\b(?:channel|ch\.?) |\b[LR]\s?/\s?)$", text[: match.start()])
        if not named and not leads:
            return None
        found.append((match.start(), match.end(), _like(match[0], MIRROR[match[0].casefold()])))
    return found


def _turns(text: str) -> Replaced:
    turned = ((match, _like(match[0], MIRROR[match[0].casefold()])) for match in _TURNED.finditer(text))
    return [(match.start(), match.end(), word) for match, word in turned]


def _hours(text: str) -> Replaced | None:
    """ "At 3 o'clock" becomes "at 9 o'clock", unless it is a time of day."""
    found = []
    for match in _CLOCK.finditer(text):
        if _TIME_OF_DAY.match(text[match.end() :]):
            continue
        written = match[1].casefold()
        hour = _HOURS[written] if written in _HOURS else int(written)
        if hour > 12:
            return None
        turned = (12 - hour - bool(match[2])) % 12
        name = next(name for name, number in _HOURS.items() if number == turned)
        found.append((match.start(1), match.end(1), _like(match[1], name) if written in _HOURS else str(turned or 12)))
    return found


def _azimuths(text: str) -> Replaced:
    found = []
    for match in _AZIMUTH.finditer(text):
        if not _beside_a_side(text, match.end(3)):
            positive = match[2] in ("", "+") and float(match[3]) not in (0, 180)
            found.append((match.start(2), match.end(2), "-" if positive else ""))
    return found


def _beside_a_side(text: str, end: int) -> bool:
    """Whether the degrees that end here are counted to a side: "45 degrees to the left", "60° counter-clockwise"."""
    near = r"\s?(?:°|º|deg\b|degrees?)?,? (?:(?:to|on|off|of|toward|towards) )*(?:the |your )?"
    return re.match(near + r"(?:left|right|(?:counter|anti)?-?clockwise)\b", text[end:], re.IGNORECASE) is not None


def _degrees_are_told(text: str) -> bool:
    """Whether all degrees are azimuths, are counted to a side, or have nothing to do with one."""
    azimuths = [match.span() for match in _AZIMUTH.finditer(text)]
    for match in _DEGREES.finditer(text):
        start, end = match.span()
        told = _beside_a_side(text, end) or any(one <= start < other for one, other in azimuths)
        told = told or _UPRIGHT_AFTER.match(text[end:]) is not None or _COUNTED_BEFORE.search(text[:start]) is not None
        if not told and float(re.sub(r"[^\d.]", "", match[0])) not in (0, 180):
            return False
    return True


def _like(word: str, other: str) -> str:
    """`other` in the capitals of `word`."""
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def mirror_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """A scene event, as a mapping: the azimuth (degrees, counter-clockwise, 0 in front) changes its sign."""
    return {**event, "azimuth": -event["azimuth"]} if event.get("azimuth") is not None else dict(event)


def mirror_events(events: Iterable[Event]) -> list[Event]:
    """The same of a sample's events."""
    return [event if event.azimuth is None else dataclasses.replace(event, azimuth=-event.azimuth) for event in events]


def mirror_sample(sample: Sample) -> Sample | None:
    """The sample as it is true of the mirrored sound: question, choices, answer, reasoning, elements and events. None
    where one of its texts has no mirror image."""
    words = (sample.question, sample.choices, sample.answer, sample.thinking, sample.semantic_elements)
    try:
        question, choices, answer, thinking, elements = (_mirrored(value) for value in words)
    except _Unclear:
        return None
    if sample.places and question != sample.question:
        return None  # its sounds stand between words that move
    return dataclasses.replace(
        sample,
        question=question,
        choices=choices,
        answer=answer,
        thinking=thinking,
        semantic_elements=elements,
        events=mirror_events(sample.events),
    )


class _Unclear(Exception):
    """A text without a mirror image, inside a sample."""


def _mirrored(value: Any) -> Any:
    if isinstance(value, str):
        if (found := mirror_text(value)) is None:
            raise _Unclear
        return found
    if isinstance(value, list):
        return [_mirrored(part) for part in value]
    return {key: _mirrored(part) for key, part in value.items()} if isinstance(value, dict) else value
