"""Free answers against reference texts: exact, contained, and a METEOR of exact words and stems.

METEOR is that of Banerjee and Lavie (2005) with the parameters of the common Python port (α 0.9, β 3, γ 0.5) and
without its WordNet stage: words match as they are, then by Porter's stem. It is called by what it is, and its values
are at most those of the full measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from audio_llm.language.replies import holds, normalise
from eval.predictions import Prediction
from eval.scorers.base import Score, Scorer, unscored
from eval.scorers.choice import OptionResolution
from eval.scorers.stemming import stem

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def references(row: Prediction) -> list[str]:
    """The gold answer, and further ones where the data set has several."""
    more = row.meta.get("references")
    return list(dict.fromkeys([row.gold, *(str(text) for text in more)] if isinstance(more, list) else [row.gold]))


def words(text: str) -> list[str]:
    """Words in lower case; an apostrophe joins, everything else divides."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def exact(said: str, reference: str) -> tuple[float, str]:
    """1 where both are the same but for case, spaces, quotes and closing punctuation."""
    same = normalise(said) == normalise(reference)
    return float(same), "the same text" if same else "another text"


def contains(said: str, reference: str) -> tuple[float, str]:
    """1 where the reference stands in the answer as a whole thing: no number in another, no word in a compound.
    Denials and extra words do not matter."""
    there = holds(said, reference)
    return float(there), "its words are there" if there else "its words are not there"


def meteor(said: str, reference: str) -> tuple[float, str]:
    """F-mean of matched words, lowered by how many pieces they come in."""
    mine, wanted = words(said), words(reference)
    pairs = align(tuple(mine), tuple(wanted))
    if not pairs:
        return 0.0, "no word in common"
    precision, recall = len(pairs) / len(mine), len(pairs) / len(wanted)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in zip(pairs, pairs[1:], strict=False))
    value = mean * (1 - GAMMA * (chunks / len(pairs)) ** BETA)
    return value, f"{len(pairs)} words in {chunks} pieces, precision {precision:.2f}, recall {recall:.2f}"


@lru_cache(maxsize=4096)
def align(mine: tuple[str, ...], wanted: tuple[str, ...]) -> list[tuple[int, int]]:
    """Places of matched words in order of `mine`: first equal words, then equal stems.

    Each word, from the last to the first, takes the last place that is still free (the rule of the common port, kept so
    that the number of pieces is the same).
    """
    pairs: list[tuple[int, int]] = []
    left, right = list(range(len(mine))), list(range(len(wanted)))
    for form in (str, stem):
        for place in reversed(left.copy()):
            other = next((free for free in reversed(right) if form(wanted[free]) == form(mine[place])), None)
            if other is not None:
                pairs.append((place, other))
                left.remove(place)
                right.remove(other)
    return sorted(pairs)


class TextScorer:
    """The best value that `compare` gives an answer over the references; only for questions without choices."""

    version = "2"

    def __init__(self, name: str, title: str, compare: Callable[[str, str], tuple[float, str]]) -> None:
        self.name, self.title, self._compare = name, title, compare

    def score(self, row: Prediction) -> Score | None:
        if unscored(row) or row.choices:
            return None
        said = row.reply().said
        if not said:
            return Score(row.id, row.question_type, 0.0, None, f"no answer to read; reference '{row.gold}'", False)
        found = [(*self._compare(said, text), text) for text in references(row)]
        value, why, text = max(found, key=lambda entry: entry[0])
        return Score(row.id, row.question_type, value, said, f"{why}; reference '{text}'", True)


EXACT = TextScorer("string-exact", "Same text", exact)
CONTAINS = TextScorer("string-contains", "Reference contained", contains)
METEOR = TextScorer("meteor-exact-stem", "METEOR of words and stems (no WordNet)", meteor)


class AudioBenchRule:
    """AudioBench without a judge: METEOR for captions, the resolved option for music, containment for questions."""

    name = "audiobench"
    version = "2"
    title = "AudioBench, by the kind of set"

    def __init__(self) -> None:
        self._of: dict[str, Scorer] = {"caption": METEOR, "choice": OptionResolution(), "question": CONTAINS}

    def score(self, row: Prediction) -> Score | None:
        scorer = self._of.get(row.question_type)
        return scorer.score(row) if scorer is not None else None


SCORERS: tuple[Scorer, ...] = (AudioBenchRule(), EXACT, CONTAINS, METEOR)
