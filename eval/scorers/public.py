"""Rules of public harnesses, kept to explain the numbers they give; no figure of ours rests on them."""

from __future__ import annotations

import re
from string import ascii_uppercase

from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, unscored


class TagExact:
    """The reward of R1-AQA and AudSemThinker: the answer tag (else the whole reply) is the gold text to the letter."""

    name = "tag-exact"
    version = "1"
    title = "Tag content, exact"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row):
            return None
        tagged = re.search(r"<answer>(.*?)</answer>", row.raw, re.DOTALL)
        text = (tagged[1] if tagged else row.raw).strip()
        right = text == row.gold.strip()
        note = "the gold text" if right else f"not literally '{row.gold}'"
        return Score(row.id, row.question_type, float(right), text[:200] or None, note, bool(text))


class LetterOrRandom:
    """A capital that stands alone is the choice, else one is drawn: MMMU's parser as lmms-eval uses it for audio.

    The article of "A dog" is read as option A. The value is the expectation over the draw, 1 / options, so that it
    repeats; the rule gives points to empty replies, which is why it is here to be looked at and never to be quoted.
    """

    name = "letter-or-random"
    version = "1"
    title = "Letter, else random"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices:
            return None
        text = f" {row.raw.strip(',.!?;:' + chr(39))} "
        letters = ascii_uppercase[: len(row.choices)]
        found = {letter: text.rfind(f"({letter})") for letter in letters if f"({letter})" in text}
        found = found or {letter: text.rfind(f" {letter} ") for letter in letters if f" {letter} " in text}
        found = found or {letter: text.rfind(f"{letter}.") for letter in letters if f"{letter}." in text}
        if not found:
            share = row.choices.count(row.gold) / len(row.choices)
            return Score(row.id, row.question_type, share, None, f"one of {len(letters)} drawn", False)
        letter = max(found, key=lambda name: found[name])
        right = row.choices[letters.index(letter)] == row.gold
        return Score(row.id, row.question_type, float(right), letter, f"reads the letter {letter}", True)


SCORERS: tuple[Scorer, ...] = (TagExact(), LetterOrRandom())
