"""Whether running text denies what it mentions: "not rain", "I doubt it is (B)", "rain? No.", "rain cannot be heard".

A denial before the mention holds to the end of its clause and through a list ("neither rain, wind nor a dog"), one
after it must follow at once. Where that is unclear the mention counts as denied: no answer has to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Words with a negation in them that deny nothing of what follows.
_NEUTRAL = re.compile(
    r"(?:\bno|\x00\x00) (?:doubt|question)\b|"
    r"\b(?:without (?:an?y? )?doubt|not only|not just|nothing (?:but|other than)|"
    r"(?:no|none) other than|(?:can't|cannot|could not|couldn't|can not) be anything (?:but|other than|else than)|"
    r"(?:i'm |i am )?not (?:\w+ly )?(?:sure|certain)(?! (?:it|that|if|whether|about|of)\b))"
)
_BEFORE = re.compile(
    r"\b(?:not|no|never|neither|nor|none|nothing|without|except|excluding|exclude[sd]?|eliminat(?:e[sd]?|ing)|"
    r"reject(?:s|ed|ing)?|rul(?:e[sd]?|ing) out|doubt\w*|unlikely|improbable|impossible|wrong|incorrect|false|"
    r"far from|hardly|lack(?:s|ing)?|absence of|fail(?:s|ed)? to|refuse[sd]? to|instead of|rather than|other than|"
    r"unlike|(?:anything|everything|all) but|isnt|wasnt|arent|dont|doesnt|didnt|cant|cannot|\w+n't)\b"
)
# A list goes on after a comma: the denial goes on with it.
_ITEM = r"(?:(?:or|nor|and)\s+)?(?:an?\s+|the\s+)?(?:\(?[a-z]\)\s*|[a-z]\.\s+)?\x00"
_CLAUSE = re.compile(
    rf"[!?;\n]|\.(?=\s|$)|,(?!\s*{_ITEM})|\s[-\u2013\u2014]\s|"
    r"(?<!anything )(?<!everything )(?<!nothing )(?<!all )\bbut\b|\b(?:however|therefore|hence|thus|actually)\b|"
    r"\bso\b(?! much)|\bbecause\b(?! of)|\binstead\b(?! of)|"
    r"\band (?:it|there|i|the|this|that|we|so|instead|therefore)\b(?!\s*\x00)"
)
_VERB = r"(?:is|was|are|were|does|do|did|can|could|will|would|should|may|might|must|has|have|had)"
_SEEMS = r"(?:is|was|are|were|seems?|sounds?|appears?|looks?|(?:would|can|could|should|may|must) be)"
_AFTER = re.compile(
    rf"[\"'*)\].]*\s*\x00*(?:\s+(?:sounds?|noises?|options?|choices?|answers?|ones?|alternative|itself|here))?"
    rf"[\"'*)\].]*(?:(?:,\s*which)?\s+(?:"
    rf"{_VERB}\s+(?:\w+ly\s+)?(?:not|never|no longer)\b(?!\s+only\b)|(?:\w+n't|cannot|isnt|wasnt|arent|doesnt)\b|"
    rf"{_SEEMS}\s+(?:\w+ly\s+|to be\s+)?(?:incorrect|wrong|false|impossible|implausible|improbable|unlikely|doubtful|"
    rf"questionable|excluded|rejected|ruled out|eliminated|absent|missing|inaudible)\b)"
    rf"|\s*[?!.,:;\u2013\u2014-]*\s*[(\[]?(?:no|nope|not|never|wrong|incorrect|false)[)\]]?\s*(?:[.!,;]|$))"
)


def lowered(text: str) -> str:
    """`text` in lower case with plain apostrophes, character for character: places in it are places in `text`."""
    small = (character.lower() for character in text.replace("\u2019", "'"))
    return "".join(low if len(low) == 1 else character for low, character in zip(small, text, strict=True))


def mask(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """`text` with every span made neutral: a "never" inside an option denies nothing."""
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def denied(text: str, start: int, end: int) -> bool:
    """Whether `text`, in lower case and with its mentions masked, denies the mention from `start` to `end`."""
    before = _NEUTRAL.sub(lambda match: "_" * len(match[0]), text)[:start]
    # The mask that follows tells a list's comma from a clause's, so the clauses are cut with the mention in sight.
    clause = 0
    for boundary in _CLAUSE.finditer(before + "\0"):
        clause = boundary.end()
    return bool(_BEFORE.search(before[clause:])) or bool(_AFTER.match(text[end:]))
