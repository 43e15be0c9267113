"""Porter's stemmer (M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980), as published."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

Condition = Callable[[str], bool]


def _is_consonant(word: str, place: int) -> bool:
    letter = word[place]
    if letter in "aeiou":
        return False
    return letter != "y" or place == 0 or not _is_consonant(word, place - 1)


def measure(word: str) -> int:
    """m of ``[C](VC)^m[V]``: how often a consonant follows a vowel."""
    kinds = [_is_consonant(word, place) for place in range(len(word))]
    return sum(not first and second for first, second in zip(kinds, kinds[1:], strict=False))


def _has_vowel(word: str) -> bool:
    return any(not _is_consonant(word, place) for place in range(len(word)))


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _is_consonant(word, len(word) - 1)


def _ends_cvc(word: str) -> bool:
    """Consonant, vowel, consonant at the end, the last one not w, x or y."""
    if len(word) < 3 or word[-1] in "wxy":
        return False
    last = len(word) - 1
    return _is_consonant(word, last) and not _is_consonant(word, last - 1) and _is_consonant(word, last - 2)


STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


def _replace(word: str, rules: dict[str, str], allowed: Condition) -> str:
    """Apply the rule of the longest ending that `word` has, if the rest allows it; no other rule is tried."""
    ending = max((ending for ending in rules if word.endswith(ending)), key=len, default=None)
    if ending is None:
        return word
    rest = word[: len(word) - len(ending)]
    return rest + rules[ending] if allowed(rest) else word


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of a word in lower case; words of one or two letters stay."""
    if len(word) <= 2:
        return word
    word = _replace(word, {"sses": "ss", "ies": "i", "ss": "ss", "s": ""}, lambda rest: True)
    word = _past_and_gerund(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(word, STEP_2, lambda rest: measure(rest) > 0)
    word = _replace(word, STEP_3, lambda rest: measure(rest) > 0)
    word = _step_4(word)
    if word.endswith("e"):
        rest = word[:-1]
        if measure(rest) > 1 or (measure(rest) == 1 and not _ends_cvc(rest)):
            word = rest
    return word[:-1] if measure(word) > 1 and word.endswith("ll") else word


def _past_and_gerund(word: str) -> str:
    """Step 1b: -eed, -ed, -ing, and the tidying after the last two."""
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        rest = word[: len(word) - len(ending)]
        if word.endswith(ending):
            return _tidied(rest) if _has_vowel(rest) else word
    return word


def _tidied(rest: str) -> str:
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if _ends_double(rest) and rest[-1] not in "lsz":
        return rest[:-1]
    return rest + "e" if measure(rest) == 1 and _ends_cvc(rest) else rest


def _step_4(word: str) -> str:
    ending = max((ending for ending in STEP_4 if word.endswith(ending)), key=len, default=None)
    if ending is None:
        return word
    rest = word[: len(word) - len(ending)]
    allowed = measure(rest) > 1 and (ending != "ion" or rest.endswith(("s", "t")))
    return rest if allowed else word
