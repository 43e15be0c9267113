"""Choice questions: the option a reply resolves to, and the letter it names."""

from __future__ import annotations

from functools import lru_cache
from string import ascii_uppercase

from audio_llm.language.replies import read_letter
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, choice_score, unscored
from eval.scorers.open_answers import score_open


class OptionResolution:
    """A reply is right when it resolves to exactly one option and that option is the gold answer.

    A contradiction, several options or none is wrong and counted as unread; nothing is ever guessed. Questions without
    options are scored by the form of their gold answer (:func:`eval.scorers.open_answers.score_open`), unless they have
    reference texts: whole sentences are no answers of a form.
    """

    name = "option-resolution"
    version = "5"
    title = "Resolved option"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices and "references" in row.meta:
            return None
        return _score_choice(row) if row.choices else score_open(row)


def _score_choice(row: Prediction) -> Score:
    if row.gold not in row.choices:
        return Score(
            row.id, row.question_type, 0.0, None, f"the gold answer '{row.gold}' is not among the choices", False
        )
    reply = row.reply()
    return choice_score(row, reply.choice, f"by {reply.how}" if reply.choice is not None else str(reply.problem))


class LetterMatch:
    """Right when the answer names the gold option's letter; words beside the letter are not looked at."""

    name = "letter"
    version = "2"
    title = "Letter match"

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or not row.choices or row.gold not in row.choices:
            return None
        letter = _letter(row.reply().answer, tuple(row.choices))
        gold = ascii_uppercase[row.choices.index(row.gold)]
        if letter is None:
            return Score(row.id, row.question_type, 0.0, None, f"names no letter; gold ({gold})", False)
        place = ascii_uppercase.index(letter)
        # Of repeated options every letter is right.
        right = place < len(row.choices) and row.choices[place] == row.gold
        note = "right" if right else f"gold ({gold})"
        return Score(row.id, row.question_type, float(right), letter, f"letter {letter}: {note}", True)


_letter = lru_cache(maxsize=50_000)(read_letter)


SCORERS: tuple[Scorer, ...] = (OptionResolution(), LetterMatch())
