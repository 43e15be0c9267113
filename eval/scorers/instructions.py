"""Whether a reply holds to an instruction about its form: the 27 kinds of MMAU-Pro's instruction following.

Kinds and their arguments are those of ``evaluate_mmau_pro_comprehensive.py`` (github.com/sonalkum/MMAUPro). Sentences
are counted by a rule of our own where the script asks NLTK's tokenizer, which needs data from the network.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
# After these a full stop ends no sentence, nor does one after a single capital.
_ABBREVIATED = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|approx|fig|al)|\b[A-Z])\.$", re.IGNORECASE)


class Unchecked(ValueError):
    """An instruction of an unknown kind, or without an argument that its kind needs."""


def count_sentences(text: str) -> int:
    """Sentences end at a full stop, a question or an exclamation mark before a space or the end, but for a handful of
    abbreviations and initials; words after the last one are a sentence too."""
    count, begin = 0, 0
    for mark in _SENTENCE_END.finditer(text):
        piece = text[begin : mark.end()]
        if _ABBREVIATED.search(piece) and text[mark.end() :].strip():
            continue
        if re.search(r"\w", piece):
            count += 1
        begin = mark.end()
    return count + bool(re.search(r"\w", text[begin:]))


def _letters(text: str, keep: str = "") -> str:
    return re.sub(f"[^a-zA-Z{keep}]", "", text).lower()


def _words(text: str) -> int:
    return len(text.split())


def _capitals(text: str) -> int:
    return sum(word.isupper() for word in text.split())


def _pieces(text: str, divider: str) -> int:
    return sum(bool(piece.strip()) for piece in text.split(divider))


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word.lower())}\b", text.lower()))


def _listed(text: str) -> list[str]:
    return text.lower().split(", ")


def _two(text: str) -> bool:
    halves = [half.strip().lower() for half in text.split("*" * 6)]
    return len(halves) == 2 and halves[0] != halves[1]


def _quoted(text: str) -> bool:
    text = text.strip()
    return text.startswith('"') and text.endswith('"')


def _bounded(name: str, count: Callable[[str], int]) -> dict[str, tuple[tuple[str, ...], Callable[..., bool]]]:
    """The three kinds that bound how much of something there is."""
    return {
        f"{name} (at least)": (("N",), lambda text, least: count(text) >= least),
        f"{name} (at most)": (("N",), lambda text, most: count(text) <= most),
        f"{name} (range)": (("N1", "N2"), lambda text, least, most: least <= count(text) <= most),
    }


def _counted(count: Callable[[str], int], compare: Callable[[Any, Any], Any] = operator.eq) -> Any:
    return (("N",), lambda text, number: bool(compare(count(text), number)))


# What an instruction is called: the names of its arguments, and whether a reply holds to it with their values.
CHECKS: dict[str, tuple[tuple[str, ...], Callable[..., bool]]] = {
    "Include Keywords": (("keywords",), lambda text, words: all(word in text.lower() for word in _listed(words))),
    "Forbidden Words": (
        ("forbidden_words",),
        lambda text, words: not any(word in text.lower() for word in _listed(words)),
    ),
    "Keyword Frequency": (("keyword", "N"), lambda text, word, number: _occurrences(text, word) == number),
    "Number Paragraphs": _counted(lambda text: _pieces(text, "***")),
    **_bounded("Number Words", _words),
    **_bounded("Number Sentences", count_sentences),
    "Number Bullets": _counted(lambda text: len(re.findall(r"(?:^|\n)\s*\*\s+", text))),
    "Minimum Number Highlighted Section": _counted(lambda text: len(re.findall(r"\*[^*]+\*", text)), operator.ge),
    "Number Placeholder": _counted(lambda text: len(re.findall(r"\[[^\]]+\]", text)), operator.ge),
    "Multiple Sections": (
        ("N", "section_splitter"),
        lambda text, number, divider: _pieces(text, divider) == number,
    ),
    "Title": ((), lambda text: re.search(r"<<[^>]+>>", text) is not None),
    "Postscript": (("postscript_marker",), lambda text, marker: _letters(marker) in _letters(text)),
    "Start Checker": (("start_phrase",), lambda text, said: _letters(text, " ").startswith(_letters(said, " "))),
    "End Checker": (("end_phrase",), lambda text, said: _letters(text, " ").endswith(_letters(said, " "))),
    "Two Responses": ((), _two),
    "Repeat Prompt": (("question",), lambda text, asked: text.strip().lower().startswith(asked.strip().lower())),
    "All Uppercase": ((), str.isupper),
    "All Lowercase": ((), str.islower),
    **_bounded("All-capital Words", _capitals),
    "Quotation": ((), _quoted),
    "No Commas": ((), lambda text: "," not in text),
}
_NUMBERS = ("N", "N1", "N2")


def arguments(kind: Any, told: Any, question: str) -> list[Any]:
    """What the check of `kind` asks for, in its order, out of `told`. Raises :class:`Unchecked` for a kind that nobody
    knows and for an argument that is null, empty or of another type."""
    if kind not in CHECKS:
        raise Unchecked(f"an unknown kind of instruction, '{kind}'")
    values = dict(told) if isinstance(told, Mapping) else {}
    values["question"] = question
    found = []
    for name in CHECKS[kind][0]:
        value = values.get(name)
        if isinstance(value, str) and name in _NUMBERS and value.strip().isdecimal():
            value = int(value)
        wanted: Any = (int, float) if name in _NUMBERS else str
        if not isinstance(value, wanted) or isinstance(value, bool) or value == "":
            raise Unchecked(f"an instruction without its {name}")
        found.append(value)
    return found


def holds(kind: Any, told: Any, question: str, text: str) -> bool:
    """Whether `text` does what the instruction of `kind` asks for. Raises :class:`Unchecked`."""
    found = arguments(kind, told, question)
    return CHECKS[kind][1](text, *found)
