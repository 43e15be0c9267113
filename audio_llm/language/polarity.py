"""Yes or no, as a reply says it, clause by clause: the "no" of "no doubt" and "no sound can be heard" is none."""

from __future__ import annotations

import re

from audio_llm.language.quantities import read_text
from audio_llm.language.words import phrases

YES_NO = ("yes", "no")

_FILLERS = phrases(
    r"so | well | okay | ok | oh | thus | therefore | hence | and | but | hmm",
    r"(?:the|my) (?:final |correct )?answer (?:is|would be|should be) | the answer's | answer",
    r"(?:it'd be|(?:that|it) would be|it's|it is) an?(?= (?:\S+ )?(?:yes|no))",
    r"(?:i'd|i would|i will|i'll|i)(?: have to)? (?:say|think|guess|answer)(?= (?:yes|no))",
)
_SUBJECT = r"(?:it|there|that|they|he|she)"
_IT_IS = r"(?:that's|that is|it's|it is|this is|the statement is)"
_YES = phrases(
    r"(?:yes|yeah|yep|yup|affirmative)(?: (?:it|there|that|this|i|indeed|of course|the|they|yes|sir|ma'am|both"
    r"|definitely|please)(?!\S).*)?",
    r"(?:absolutely|certainly|definitely|of course|indeed|sure|exactly|true|correct|right)(?: (?:yes|it is|so))?",
    rf"{_IT_IS} (?:\S+ly )?(?:correct|right|true|the case)",
    rf"(?:indeed )?{_SUBJECT} (?:\S+ly |sure )?(?:is|does|are|do|was|has)",
    r"(?:i|i'd|i would) (?:think|believe|say|guess|suppose) so | (?:i'm |i am )?afraid so | without (?:a )?doubt | y",
)
_NO = phrases(
    r"(?:no|nope|nah)(?: (?:it|there|that|this|i|way|from me|the|we|they|no|sir|ma'am|not|definitely|neither)(?!\S)"
    r"(?! to).*)?",
    r"(?:definitely|certainly|absolutely|of course|clearly|probably|surely) not | never | by no means | negative",
    r"not (?:really|at all|true|correct|quite|right|in the least|that i can (?:hear|tell)|by any means) | i think not",
    r"false | incorrect | untrue | wrong | it's not | (?:i'm |i am )?afraid not | n",
    r"i (?:don't|do not) (?:think|believe) so",
    rf"{_SUBJECT} (?:(?:is|does|are|do|was|has) not|isn't|doesn't|aren't|don't|wasn't)",
    rf"{_IT_IS} (?:not (?:correct|right|true|the case)|incorrect|wrong|false|untrue)",
    r"(?:it|that) isn't (?:true|right|correct|the case)",
)
_ABSENT = re.compile(
    r"there (?:(?:is|are|was|were) no|(?:isn't|aren't|is not|are not) any?) (?P<what>\S+)(?P<where> .*)?"
)
# Of these "there is none" is no answer: "no information", "no sound" (but "no sound on the left" is one).
_NOTHING = frozenset(
    "doubt information way idea answer audio question means clue evidence telling recording file sound sounds".split()
)
_PLACES = frozenset("left right front behind above below side on in at".split())
_UNKNOWN = re.compile(r"\bno (?:way|means) (?:of|to) (?:know|tell|say)|\bway of knowing\b")


def read_yes_no(text: str) -> str | None:
    """``yes`` or ``no``, the one of them that `text` says as its answer; None where it says neither or both, asks,
    makes conditions, or says that nothing could be heard or known ("no idea", "no sound can be heard")."""
    told: list[str] = []  # in so many words
    implied: list[str] = []  # "it is not", "correct": where there is no yes or no beside it
    for clause, asked, corrects in _clauses(text):
        if asked:
            continue
        if _UNKNOWN.search(clause) or (told and re.match(r"(?:if|unless|provided)\b", clause)):
            return None
        said = clause
        while (filler := _FILLERS.match(said)) and filler.end() < len(said):
            said = said[filler.end() :].strip()
        if set(YES_NO) <= set(said.split()):
            return None
        word = None if re.match(r"(?:yes|no) (?:would|is|was|or|and)\b", said) else _polarity(said)
        if word and corrects:
            told, implied = [], []
        if word:
            plain = said.split()[0] in ("yes", "yeah", "yep", "yup", "no", "nope", "nah")
            (told if plain else implied).append(word)
    found = set(told or implied)
    return found.pop() if len(found) == 1 else None


def _polarity(clause: str) -> str | None:
    if _YES.fullmatch(clause):
        return "yes"
    if _NO.fullmatch(clause):
        return "no"
    if match := _ABSENT.fullmatch(clause):
        what, where = match["what"], set((match["where"] or "").split())
        return "no" if what not in _NOTHING or (what.startswith("sound") and where & _PLACES) else None
    return None


def _clauses(text: str) -> list[tuple[str, bool, bool]]:
    """The clauses of a text in order: their words, whether they ask, whether they correct what was said before."""
    read = read_text(text)
    clauses: list[tuple[str, bool, bool]] = []
    words: list[str] = []
    corrects = False
    for place in range(len(read.tokens) + 1):
        gap = read.gap(place)
        token = read.tokens[place] if place < len(read.tokens) else None
        number = token is not None and token.number and re.fullmatch(r"\.\s", gap)  # "No. 5"
        opens = token is not None and (
            token.key in ("…", "because", "but")
            or (token.key == "so" and words[-1:] not in (["think"], ["believe"], ["say"]))
        )
        if words and (token is None or opens or (re.search(r"[?.!;,:\n()]| - |/", gap) and not number)):
            clauses.append((" ".join(words), "?" in gap, corrects))
            words, corrects = [], False
        if token is not None and not words and token.key in ("wait", "actually", "sorry", "correction", "rather"):
            corrects = True
        elif token is not None and token.key not in ("…", "/"):
            words.append(token.key)
    return clauses
