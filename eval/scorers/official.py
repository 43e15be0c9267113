"""Rules of benchmarks' own scripts, reimplemented to stand beside ours; no headline of ours rests on them.

MMAU's, which is MMAR's too, is in :mod:`eval.scorers.mmau`.
"""

from __future__ import annotations

from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, choice_score, unscored

LETTERS = "ABCD"  # both scripts know four
LEAD_IN = "The correct answer is:"  # what MuChoMusic's prompt ends with, and models repeat


class MmsuLetter:
    """MMSU's rule (``mmsu_evaluation.py``): the first character of the reply, else its last but one, is the letter.

    A reply with no letter there has no score, for the script drops its row; an empty one is wrong. Letters are those
    that were shown: where the script shows missing options under letters of their own, we show none.
    """

    name = "mmsu-official"
    version = "1"
    title = "MMSU's rule, first or last letter"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices:
            return None
        said = row.raw.strip().replace("\n", "")
        if said in ("", "None"):
            return choice_score(row, None, "the reply is empty")
        letter = next((one for one in (said[0], said[-2:-1]) if one and one in LETTERS), None)
        if letter is None:
            return None
        place = LETTERS.index(letter)
        if place >= len(row.choices):
            return Score(row.id, row.question_type, 0.0, letter, f"letter {letter} was not shown", True)
        return choice_score(row, place, f"by the letter {letter}")


class MuChoMusicCapital:
    """MuChoMusic's rule (``scoring.py``): the one capital A to D among all characters of the reply, words included,
    else the first option that the reply contains, else no answer, which is wrong. "Blues" is option B by it."""

    name = "muchomusic-official"
    version = "1"
    title = "MuChoMusic's rule, one capital"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices:
            return None
        said = row.raw.split(LEAD_IN)[-1].strip()
        capitals = set(LETTERS) & set(said)
        if len(capitals) == 1:
            letter = capitals.pop()
            place = LETTERS.index(letter)
            if place >= len(row.choices):
                return Score(row.id, row.question_type, 0.0, letter, f"letter {letter} was not shown", True)
            return choice_score(row, place, f"by the capital {letter}")
        held = [place for place, one in enumerate(row.choices) if one.lower().strip() in said.lower()]
        return choice_score(row, held[0] if held else None, "by its words" if held else "no option in the reply")


SCORERS: tuple[Scorer, ...] = (MmsuLetter(), MuChoMusicCapital())
