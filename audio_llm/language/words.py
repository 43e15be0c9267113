"""A text as words and numbers: what is compared when a reply is read.

Writing that means the same becomes the same (Unicode forms, full width, quotes, dashes, ♯ and ♭, digits of any
script, number words). A number is one token with its sign, point, comma, fraction or colon, so that no number is found
inside another. What lies between two tokens, :meth:`Text.gap`, tells whether they belong together.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

_SAME = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2014\u2015", " - "),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u00b4`\u2032\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u2033", '"'),
    **dict.fromkeys("✓✔✅☑", "✓"),
    **dict.fromkeys("✗✘❌✖", "✗"),
    "\u266f": "#", "\u00ba": "°", "\u2044": "/", "\u00d7": " x ", "\u2026": " … ", "\u2116": " number ", "·": " ",
}  # fmt: skip
_SAME_TABLE = str.maketrans(_SAME)
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: float(value) for value, word in enumerate(_SMALL)} | {
    word: 10.0 * (place + 2) for place, word in enumerate(_TENS)
}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6}
# "the right one", "one might think": a pronoun.
_ONE_AFTER = set(
    "the this that which no any every each other another right correct best wrong last some first second third fourth "
    "fifth".split()
)
_ONE_BEFORE = set("can could might may would should must of".split())
_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w./])\.)?\d+(?:[.,:/]\d+)*(?:e[+-]?\d+(?![^\W_]))?)"
    r"|(?P<word>[^\W\d_]\w*(?:'[^\W\d_]+)*(?:(?<=[A-G])[#\u266d](?:[^\W_]*))?)"
    r"|(?P<mark>[&%°<>≤≥±^…✓✗]|#(?=\w)|(?<=[^\s*\"'])[/+](?=[^\s*\"'])|(?<=[A-G#b\u266d]):(?=maj|min|dim|aug|sus|hdim|[0-9(]))",
    re.IGNORECASE,
)
_MARKS = {"&": "and", "%": "percent", "°": "degrees"}
CHECK, CROSS = "✓", "✗"
SPLITS = re.compile(r"(?:(?<=\d)|^)([a-z]+)(\d+(?:\.\d+)?)?([a-z]*)", re.IGNORECASE)


def phrases(*groups: str) -> re.Pattern[str]:
    """Any of the phrases, " | " between two, in words joined by spaces; "~" stands for the rest of a word."""
    choices = "|".join(group.strip() for text in groups for group in text.split(" | ")).replace("~", r"\S*")
    return re.compile(rf"(?<!\S)(?:{choices})(?!\S)")


@dataclass(frozen=True)
class Token:
    """`key` is compared; `text` has its capitals; `value` is a number's, None for a word and for "1.2.3"."""

    key: str
    text: str
    start: int
    end: int
    number: bool = False
    value: float | None = None
    clock: bool = False


@dataclass(frozen=True)
class Text:
    """A folded text and its tokens."""

    folded: str
    tokens: tuple[Token, ...]

    def gap(self, place: int) -> str:
        """What stands before token `place`, after the one before it; before 0 and after the last: the margins."""
        start = self.tokens[place - 1].end if place else 0
        return self.folded[start : self.tokens[place].start if place < len(self.tokens) else len(self.folded)]

    def glued(self, place: int) -> bool:
        """Whether token `place` and the one before it are parts of one word: "post-punk", "dog.wav", "A/B", "1 000"."""
        if not 0 < place < len(self.tokens):
            return False
        before, token, gap = self.tokens[place - 1], self.tokens[place], self.gap(place)
        if before.number and token.number:
            return gap in (" ", "-", "")
        if token.key in ("/", ":", "+", "#", "^") or before.key in ("/", ":", "+", "#", "^"):
            return True
        if gap == "" or token.text == "&" or before.text == "&":
            return not (token.key in ("percent", "degrees") or {token.text, before.text} & set("<>≤≥±…✓✗"))
        return gap in ("-", ".", "'", "@", "\\") or (gap == " " and before.key in PREFIXES)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(token.key for token in self.tokens)

    @cached_property
    def plain_keys(self) -> tuple[str, ...]:
        """The keys without accents."""
        return tuple(key if key.isascii() else plain(key) for key in self.keys)


PREFIXES = frozenset(("non", "anti", "counter", "pseudo", "semi", "proto", "post", "pre", "un"))


@lru_cache(maxsize=20_000)
def fold(text: str) -> str:
    """`text` with one form for what is written in several; capitals and line breaks stay."""
    out = []
    for character in () if text.isascii() else unicodedata.normalize("NFC", text):
        kind = unicodedata.decomposition(character)
        if character in _SAME:
            out.append(_SAME[character])
        elif kind.startswith("<fraction>"):
            out.append(" " + unicodedata.normalize("NFKC", character).replace("\u2044", "/"))
        elif kind.startswith("<super>") and character.isdigit():
            out.append("^" + unicodedata.normalize("NFKC", character))
        elif unicodedata.category(character) == "Nd":
            out.append(str(unicodedata.digit(character)))
        elif unicodedata.category(character) != "Cf":
            out.append(unicodedata.normalize("NFKC", character))
    folded = (unicodedata.normalize("NFC", "".join(out)) if out else text).translate(_SAME_TABLE)
    folded = re.sub(r"\.{2,}", " … ", re.sub(r"[^\S\n]+", " ", folded))
    folded = re.sub(r"(?<!\w)_+|_+(?!\w)", "", folded).replace("per cent", "percent")
    folded = re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])(?=[A-Za-z0-9])", r"\1 ", folded)
    return re.sub(r"(\d)'\s*(\d+)\s*(?:\"|'')", r"\1 ft \2 in", folded).strip()


def plain(word: str) -> str:
    """`word` without its accents."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


@lru_cache(maxsize=20_000)
def read(text: str, units: frozenset[str] = frozenset()) -> Text:
    """The tokens of a text. A number and letters glued to it are one word ("2nd", "3B"), unless they are a unit's."""
    folded = fold(text)
    tokens: list[Token] = []
    for match in _TOKEN.finditer(folded):
        start, end = match.span()
        glued = bool(tokens) and tokens[-1].end == start
        if match["number"]:
            tokens.append(_number(folded, start, end, tokens))
        elif match["mark"]:
            tokens.append(Token(_MARKS.get(match[0], match[0]), match[0], start, end))
        elif glued and tokens[-1].number:
            tokens[-1:] = _with_unit(tokens[-1], match[0], start, units)
        else:
            key = match[0].casefold()
            if key == "clockwise" and tokens and tokens[-1].key == "anti":
                tokens[-1] = Token("counter", tokens[-1].text, tokens[-1].start, tokens[-1].end)
            tokens.append(Token(_note(key, match[0]), match[0], start, end))
    return Text(folded, tuple(_numbers(folded, tokens)))


def _note(key: str, text: str) -> str:
    """ "Bb" and "B♭" are one note; "bb" is none. "Anticlockwise" is "counterclockwise" in another English."""
    if key == "anticlockwise":
        return "counterclockwise"
    if text[:1] in "ABCDEFG" and text[1:2] in ("b", "\u266d") and (len(text) == 2 or text[2:3] in "m7Mad0123456789"):
        return key[0] + "\u266d" + key[2:]
    return key


def _number(folded: str, start: int, end: int, tokens: list[Token]) -> Token:
    """A number with its sign: a dash before it is a minus where nothing that it could join stands before the dash."""
    text = folded[start:end]
    gap = folded[tokens[-1].end if tokens else 0 : start]
    sign = re.search(r"(?:^|[\s(\[{\"'*$:=,])([-+])$", gap) or re.search(
        r"(?:^|\n)(-)\s$", "" if tokens and "\n" not in gap else gap
    )
    if sign and not (tokens and gap == "-"):
        start = start - len(gap) + sign.start(1)
        negative = sign[1] == "-"
    else:
        negative = False
    value, clock = _value(text)
    if value is not None and negative:
        value = -value
    plain_number = value is not None and not re.search(r"[/:]", text) and not re.match(r"0\d", text)
    key = f"#{value!r}" if plain_number else "#" + "-" * negative + text
    return Token(key, folded[start:end], start, end, True, value, clock)


def _value(text: str) -> tuple[float | None, bool]:
    """What digits say, and whether they are a time on a clock (then in seconds)."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return float(text.replace(",", "")), False
    if re.fullmatch(r"\d*\.?\d+(?:e[+-]?\d+)?|\d+,\d+", text, re.IGNORECASE):
        value = float(text.replace(",", ".")) if len(text) < 300 else float("inf")
        return (value if value < float("inf") else None), False
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        return (int(match[1]) / int(match[2]), False) if len(text) < 30 and int(match[2]) else (None, False)
    if re.fullmatch(r"(?:\d{1,3}:)?\d{1,3}:[0-5]\d(?:\.\d+)?", text):
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
        return seconds, True
    return None, False


def _with_unit(number: Token, letters: str, start: int, units: frozenset[str]) -> list[Token]:
    """ "2m" is a number and a unit, "1m50" and "1m2s" two numbers; "2nd", "3B" and "1940s" are words."""
    match = SPLITS.fullmatch(letters)
    decade = letters == "s" and re.fullmatch(r"(?:1\d|20)\d0", number.text)
    if match and not decade and match[1].casefold() in units and (not match[3] or match[3].casefold() in units):
        found = [number, Token(match[1].casefold(), match[1], start, start + match.end(1))]
        if match[2]:
            value = float(match[2])
            found.append(Token(f"#{value!r}", match[2], start + match.start(2), start + match.end(2), True, value))
        if match[3]:
            found.append(Token(match[3].casefold(), match[3], start + match.start(3), start + match.end(3)))
        return found
    text = number.text + letters
    return [Token(text.casefold(), text, number.start, start + len(letters))]


def _numbers(folded: str, tokens: list[Token]) -> list[Token]:
    """Number words, "2 hundred", "1 1/2", "1 000", "two and a half", "one point five", "F sharp" put together."""
    found: list[Token] = []
    place = 0
    while place < len(tokens):
        token, end = _spoken(folded, tokens, place)
        found.append(token)
        place = end
    return found


def _spoken(folded: str, tokens: list[Token], place: int) -> tuple[Token, int]:
    """The number, or the note, that begins at `place`, else the token there; and the place after it."""

    def key(at: int, *between: str) -> str:
        """The token at `at`, where one of `between` stands before it."""
        inside = 0 < at < len(tokens) and folded[tokens[at - 1].end : tokens[at].start] in between
        return tokens[at].key if inside else ""

    first = tokens[place]
    if (
        first.text in tuple("ABCDEFG")
        and key(place + 1, " ", "-") in ("sharp", "flat")
        and _names_note(folded, tokens, place)
    ):
        mark = "#" if tokens[place + 1].key == "sharp" else "\u266d"
        return Token(first.key + mark, first.text + mark, first.start, tokens[place + 1].end), place + 2
    sign = 1.0
    at = place
    if first.key in ("minus", "negative") and place + 1 < len(tokens):
        sign, at = -1.0, place + 1
    value, end = _whole(tokens, at, key)
    if value is None:
        return first, place + 1
    if key(end, " ") == "point" and end + 1 < len(tokens) and VALUES.get(tokens[end + 1].key, 10) < 10:
        digits = ""
        end += 1
        while end < len(tokens) and VALUES.get(tokens[end].key, 10) < 10:
            digits += f"{VALUES[tokens[end].key]:.0f}"
            end += 1
        value += float("0." + digits)
    if [key(end, " ", "-"), key(end + 1, " ", "-"), key(end + 2, " ", "-")] == ["and", "a", "half"]:
        value, end = value + 0.5, end + 3
    elif key(end, " ", "-", "") in ("#1/2", "#1/4", "#3/4", "#1/3", "#2/3") and value == int(value):
        value, end = value + (tokens[end].value or 0.0), end + 1
    if end == place + 1 and first.number:
        return first, end
    value *= sign
    start, stop = first.start, tokens[end - 1].end
    return Token(f"#{value!r}", folded[start:stop], start, stop, True, value), end


def _names_note(folded: str, tokens: list[Token], place: int) -> bool:
    """Whether "A flat" is a note: "A flat major", "A flat." — not "A flat tone"."""
    if place + 2 >= len(tokens) or re.search(r"[^ -]", folded[tokens[place + 1].end : tokens[place + 2].start]):
        return True
    return tokens[place + 2].key in ("major", "minor", "maj", "min", "chord", "key", "note", "is", "or", "and")


def _whole(tokens: list[Token], place: int, key: Callable[..., str]) -> tuple[float | None, int]:
    """A number in words or digits that begins at `place`, and the place after it; None where none does."""
    token = tokens[place]
    before = tokens[place - 1].key if place and key(place, " ") else ""
    after = key(place + 1, " ", "-")
    if token.key == "half" and after in ("a", "an"):
        return 0.5, place + 2
    if token.key == "one" and after == "half":
        return 0.5, place + 2
    if token.key in ("twice", "thrice"):
        return 2.0 + (token.key == "thrice"), place + 1
    if token.key == "one" and (before in _ONE_AFTER or after in _ONE_BEFORE):
        return None, place
    spoken, end = token.key in VALUES, place + 1
    if spoken:
        part = VALUES[token.key]
    elif token.number and not token.clock and token.value is not None:
        part = token.value
    else:
        return None, place
    if re.fullmatch(r"\d{1,3}", token.text):
        while end < len(tokens) and key(end, " ") and re.fullmatch(r"\d{3}", tokens[end].text):
            part, end = 1000 * part + (tokens[end].value or 0.0), end + 1
    total, scaled = 0.0, False
    while end < len(tokens):
        word = key(end, " ", "-", *([", "] if scaled else []))
        if word in _SCALES:
            total, part = (total, part * 100) if word == "hundred" else (total + part * _SCALES[word], 0.0)
            scaled, end = True, end + 1
            continue
        at = end + (scaled and word == "and")
        small = VALUES.get(key(at, " ", "-", *([", "] if scaled else [])), 100.0)
        ones = spoken and small < 10 and part % 100 >= 20 and part % 10 == 0 and at == end
        if small == 100 or not (ones or (scaled and part % 100 == 0)):
            break
        part, end, spoken = part + small, at + 1, True
    return total + part, end
