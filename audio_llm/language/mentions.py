"""Where a text names one of the options that it was offered: by letter, by number, in words or as a quantity.

A mention is a whole thing: no option is found inside a longer one, a compound, a number or a range. Letters are labels
where a label can stand, not the article of "A dog" nor the name of a note.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

from audio_llm.language.directions import DIRECTION_WORDS, means_place
from audio_llm.language.quantities import Quantity, quantities, read_text
from audio_llm.language.stances import Span
from audio_llm.language.words import Text

ARTICLES = ("a", "an", "the")
_LETTERED = re.compile(r"\s*[(\[]?([A-Za-z])\s*[.):\]]\s*(\S.*)", re.DOTALL)  # an option as it is offered
# Not "1.5 s", "2.5 s", … nor "1:30", "2:30", …: a point or colon between digits belongs to a number.
_NUMBERED = re.compile(r"\s*[(\[]?(\d{1,2})\s*(?:[)\]]|[.:](?!\d))\s*(\S.*)", re.DOTALL)
_LABELS = frozenset("option options choice choices letter answer statement".split())
_COUNTED = (("first", "1st"), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"), ("fifth", "5th"))
# What a capital that stands alone may follow, and what may follow it, to be the letter of an option.
_CUES_BEFORE = frozenset(
    "is it's be choose pick select say with for go guess think answer option options choice letter so thus hence not "
    "or and nor neither either both than only that's mean rather of over to was selected therefore but actually wait "
    "leaves leaving matches means eliminating exclude excluding eliminate out it by no yes suppose chose prefer user "
    "if while although then believe probably likely maybe perhaps definitely clearly described remains sorry instead "
    "except rules indeed vote now towards toward lean leaning opt keep torn".split()
)
CUES_AFTER = frozenset(
    "is was are were because since as match matches seem seems fit fits and or nor rather instead over not would can "
    "could can't couldn't cannot do does did don't doesn't didn't aren't isn't wasn't weren't won't then will must "
    "should may might sounds looks best definitely only which to probably i it both all remains wins for hands".split()
)
_NAMING = frozenset(  # "vitamin B"
    "vitamin vitamins plan type hepatitis grade group side model section mr mrs ms dr appendix figure part chapter "
    "bluetooth".split()
)
_GRADED = re.compile(r"\s*[(\[]\s*(?:\d|conf|prob|score|sure|certain)", re.IGNORECASE)  # "B (confidence: 0.9)"
_PRONOUNS = frozenset("i you we they he she it one who which that".split())
_GRAMMAR = frozenset("am can do it may so us will".split())  # also a chord, a month, a note, a country, a name
_NOTES = frozenset("flat sharp major minor natural maj min".split())


@dataclass(frozen=True)
class Option:
    """An option as it can be named. `keys` are its words without an article in front; `compact` a compound in one word
    ("" for none); `quantity` the amount that it is; `number` its own number where all options bring theirs, else 0."""

    text: Text
    keys: tuple[str, ...]
    compact: str
    quantity: Quantity | None
    number: int


@dataclass(frozen=True)
class Mention:
    """Tokens [start, end) that name options by a `letter` ("" for none), in `words`, or both.

    `options` are those meant: several where only case or accents tell them apart and the text does not, none where the
    letter is beyond them or disagrees with the words.
    """

    start: int
    end: int
    options: frozenset[int]
    letter: str = ""
    words: bool = False

    @property
    def span(self) -> Span:
        return self.start, self.end


def bare_options(choices: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The options without the letters or numbers that all of them bring, and whether those were numbers."""
    for pattern, labels in ((_LETTERED, list(ascii_uppercase)), (_NUMBERED, [str(n) for n in range(1, 27)])):
        found = [match for option in choices if (match := pattern.fullmatch(option))]
        if len(found) == len(choices) and [match[1].upper() for match in found] == labels[: len(choices)]:
            return tuple(match[2].strip() for match in found), pattern is _NUMBERED
    return tuple(choices), False


def misplaced(letter: str, choices: Sequence[str]) -> bool:
    """Whether `letter` means two of the options: they all bring letters, and this one stands at another place."""
    found = [match for option in choices if (match := _LETTERED.fullmatch(option))]
    letters = [match[1].upper() for match in found] if len(found) == len(choices) else []
    return letter.upper() in letters and letters.index(letter.upper()) != ascii_uppercase.index(letter.upper())


@lru_cache(maxsize=4096)
def offered(choices: tuple[str, ...]) -> tuple[Option, ...]:
    """The options, ready to be found."""
    bare, numbered = bare_options(choices)
    texts = [read_text(text) for text in bare]
    shared = Counter(map(without_article, texts))
    options = []
    for place, text in enumerate(texts):
        keys = without_article(text)
        hyphens = len(text.tokens) > 1 and all(text.gap(at) == "-" for at in range(1, len(text.tokens)))
        amounts = quantities(text)
        whole = amounts[0] if len(amounts) == 1 and amounts[0].span == (0, len(text.tokens)) else None
        options.append(
            Option(
                text,
                keys if shared[keys] == 1 else text.plain_keys,
                "".join(text.plain_keys) if hyphens else "",
                whole,
                numbered * (place + 1),
            )
        )
    return tuple(options)


def without_article(text: Text) -> tuple[str, ...]:
    """ "A piano" may be named "the piano"; "A minor" may not."""
    keys = text.plain_keys
    article = len(keys) > 1 and keys[0] in ARTICLES and text.gap(1) == " "
    return keys[1:] if article and keys[1] not in _NOTES and len(keys[1]) > 1 else keys


def find(text: Text, options: Sequence[Option], letters_only: bool = False) -> list[Mention]:
    """Every mention of an option in `text`, in order, not overlapping. `letters_only`: a letter that is also the text
    of an option is the letter. Without options any letter is one."""
    words, letters = in_words(text, options), _letters(text, options)
    sure = {one.start for one in letters if _surely(text, one.start, words)}
    if letters_only:  # but in "C. E" the E is the text of option C
        sure |= {one.start for one in letters if one.start - 1 not in sure}
    words = [one for one in words if not (one.start in sure and one.end == one.start + 1)]
    found: list[Mention] = []
    for one in sorted([*words, *letters], key=lambda one: (one.start, -one.end)):
        before = found[-1] if found else None
        if before is not None and one.start < before.end:  # a letter inside an option's text
            continue
        if before is not None and _beside(text, before, one):
            found[-1] = _put_together(before, one, options)
        else:
            found.append(one)
    loose = {one.start for one in letters if _label(text, one.start) == "loose"}
    found = [one for one in found if one.words or one.start not in loose or one.end > one.start + 1]
    return [*found[:-1], *(_against_other_words(text, one, options) for one in found[-1:])]


def _put_together(a: Mention, b: Mention, options: Sequence[Option]) -> Mention:
    same = a.options & b.options
    if not same:  # equal options under two letters
        texts = {options[place].text.folded for place in b.options}
        same = frozenset(place for place in a.options if options[place].text.folded in texts)
    return Mention(a.start, b.end, same, a.letter or b.letter, a.words or b.words)


def _against_other_words(text: Text, one: Mention, options: Sequence[Option]) -> Mention:
    """ "(A) dog" where no option is "dog": a label with foreign words behind it names nothing, unless they explain."""
    if one.words or not one.options or not options or one.end >= len(text.tokens):
        return one
    gap, following = text.gap(one.end), text.tokens[one.end :]
    first = following[0]
    labels = re.match(r"\W*[)\]:]\W*$", gap) or (re.match(r"\W*\.\W*$", gap) and first.text[:1].islower())
    if not labels or "\n" in gap or len(following) > 3 or any(token.key in CUES_AFTER for token in following):
        return one
    keys = [token.key for token in following if token.key not in ARTICLES]
    own = options[min(one.options)].text.keys
    if all(key in own for key in keys) or not all(key.isalpha() for key in keys) or "?" in text.folded:
        return one
    explains = any(key in ("yes", "no", "right", "correct", "wrong", "incorrect", "true", "false") for key in keys)
    return (
        one
        if explains or re.search(r"[.!]", text.gap(one.end + 1))
        else Mention(one.start, len(text.tokens), frozenset(), one.letter)
    )


# ------------------------------------------------------------------------------------------------ words


def in_words(text: Text, options: Sequence[Option]) -> list[Mention]:
    """Where options are named in words or as quantities; a mention inside a longer one does not count."""
    amounts = quantities(text)
    found: dict[Span, set[int]] = {}
    for place, option in enumerate(options):
        for start, end in _places(text, option, amounts):
            # Its own number in front ("1. rain") and its article belong to it.
            own = {
                f"#{float(option.number or math.nan)!r}",
                *option.text.keys[: len(option.text.keys) - len(option.keys)],
            }
            wider = start > 0 and text.keys[start - 1] in own
            found.setdefault((start - wider, end), set()).add(place)
    return [
        Mention(*span, _told_apart(text, span, places, options), words=True)
        for span, places in sorted(found.items())
        if not any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in found)
    ]


def _places(text: Text, option: Option, amounts: Sequence[Quantity]) -> list[Span]:
    keys = text.plain_keys
    spans = [
        (start, start + size)
        for wanted in {option.keys, _contracted(option.keys)}
        for size in (len(wanted),)
        for start in range(len(keys) - size + 1 if size else 0)
        if _same(keys[start : start + size], wanted)
        and _in_one(text, (start, start + size), option)
        and _whole(text, (start, start + size), amounts, option)
    ]
    spans += _genitives(text, option, amounts)
    if option.compact:
        spans += [
            (at, at + 1) for at, key in enumerate(keys) if key == option.compact and not _joined(text, (at, at + 1))
        ]
    if option.quantity is not None:
        spans += [one.span for one in amounts if _equal(text, one, option.quantity) and not _joined(text, one.span)]
    if len(option.keys) == 1 and option.keys[0] in DIRECTION_WORDS:  # "That's right: left" names one side
        spans = [span for span in spans if means_place(text, span[0])]
    return [span for span in spans if span[1] > span[0] + 1 or not _function_word(text, span[0], option)]


def _genitives(text: Text, option: Option, amounts: Sequence[Quantity]) -> list[Span]:
    """Where an option of an owner and a thing ("car horn") is said with a genitive: "the horn of a red car", "the car's
    horn"; and "barking of a dog" as "dog barking". So a car is not named where its horn is, if both are offered."""
    keys, wanted = text.plain_keys, option.keys
    if len(wanted) < 2:
        return []
    told = len(wanted) > 2 and wanted[1] == "of"
    owner, thing = (wanted[3 if wanted[2] in ARTICLES else 2 :], wanted[0]) if told else (wanted[:-1], wanted[-1])
    if not owner or thing in DIRECTION_WORDS or not all(key.isalpha() for key in (*owner, thing)):
        return []
    found = []
    for place in range(len(keys) - len(owner) + 1):
        end = place + len(owner)
        if not _same(keys[place:end], owner):
            continue
        if end < len(keys) and _same(keys[end : end + 1], (thing,)) and (not told or thing.endswith("ing")):
            found.append((place, end + 1))  # "the car's horn", "dog barking"
        for start in range(max(0, place - 4), place - 1):
            between = keys[start + 1 : place]  # of, an article and a word more
            if _same(keys[start : start + 1], (thing,)) and between[0] == "of":
                listed = end < len(keys) and keys[end] in ("and", "or")  # "a fusion of jazz and rock" is not of jazz
                if (len(between) == 1 or between[1] in ARTICLES) and not listed:
                    found.append((start, end))
    return [
        span
        for span in found
        if all(text.gap(at) == " " for at in range(span[0] + 1, span[1])) and _whole(text, span, amounts, option)
    ]


def _contracted(keys: tuple[str, ...]) -> tuple[str, ...]:
    """ "The man is angry" as "the man's angry"."""
    return tuple(" ".join(keys).replace(" is ", "'s ").split())


def _same(mine: Sequence[str], wanted: Sequence[str]) -> bool:
    """The same words; the last one may be a plural."""
    last, other = mine[-1], wanted[-1]
    plural = len(other) > 2 and other.isalpha() and last in (f"{other}s", f"{other}es", f"{other}'s")
    return mine[:-1] == wanted[:-1] and (last == other or plural)


def _in_one(text: Text, span: Span, option: Option) -> bool:
    """Whether no sentence ends inside the span but where one does in the option."""
    skipped = len(option.text.tokens) - (span[1] - span[0])
    return not any(
        re.search(r"[.;!?:]", text.gap(at)) and not re.search(r"[.;!?:]", option.text.gap(skipped + at - span[0]))
        for at in range(span[0] + 1, span[1])
    )


def _function_word(text: Text, place: int, option: Option) -> bool:
    """Whether the word at `place` is grammar, as in "a dog", "I hear", "I can", "it may be", "one another", and not the
    note, chord, vowel, vessel, month or number that is written like it."""
    key, token, after = text.keys[place], text.tokens[place], text.gap(place + 1)
    previous = text.keys[place - 1] if place and text.gap(place) == " " else ""
    following = text.keys[place + 1] if place + 1 < len(text.tokens) and after == " " else ""  # on the same line
    if token.text.casefold() == "one":
        return following == "another" or previous in ("no", "every", "each", "any")
    if key == "a":
        first = place == 0 or bool(re.search(r"[.!?:\n]", text.gap(place)))
        names = following in CUES_AFTER or following == "without"  # "a rather than b"
        return bool(following) and not names and (first or token.text == "a")
    if key == "i":
        return bool(following) and following not in ("is", "and", "or")
    if key == "can" and previous in _PRONOUNS:
        return True
    offered_as = option.text.tokens[-1].text
    other = token.text != offered_as and not (token.text.isupper() or offered_as.islower())  # "it may", not "May"
    return other and key in _GRAMMAR and previous not in (*ARTICLES, "is", "in", "from")


def _joined(text: Text, span: Span) -> bool:
    hyphen = text.gap(span[1]) == "-" and not text.tokens[span[1] - 1].number  # "a 2-meter-long room"
    return text.glued(span[0]) or (text.glued(span[1]) and not hyphen)


def _whole(text: Text, span: Span, amounts: Sequence[Quantity], option: Option) -> bool:
    """Whether the words of an option at `span` are no part of a longer word, number or quantity."""
    start, end = span
    if text.glued(start) or (text.glued(end) and text.keys[end] != "hand"):
        return False
    wanted = option.quantity
    for one in amounts:
        inside = start <= one.first and one.end <= end
        if one.end <= start or end <= one.first or (inside and (wanted is None or _alike(one, wanted))):
            continue
        # "2" may be said of "2 s"; not of "2 %", "1-2", "up to 2".
        counted = one.first == start and end == start + 1 and one.value is not None and one.end == end + 1
        if not counted or one.dimension in ("share", "?"):
            return False
    return True


def _alike(a: Quantity, b: Quantity) -> bool:
    """Whether both are values, both bounds, or both ranges with two ends."""
    return (a.value is None) == (b.value is None) and len(a.values) == len(b.values)


def _equal(text: Text, named: Quantity, wanted: Quantity) -> bool:
    """Whether two quantities, or two ranges, are equal; a bare number has the unit that was offered."""
    if named.values or wanted.values:
        close = len(named.values) == len(wanted.values) and all(
            abs(a - b) < 1e-9 for a, b in zip(named.values, wanted.values, strict=True)
        )
        return close and (named.dimension == wanted.dimension or "" in (named.dimension, wanted.dimension))
    if named.value is None or wanted.value is None or wanted.dimension in ("", "?"):
        return False
    if named.dimension == "":
        after = text.keys[named.end : named.end + 1]
        counts = bool(after) and text.gap(named.end) in (" ", "") and after[0] not in CUES_AFTER  # "2 people"
        return not counts and named.value == wanted.value
    return named.dimension == wanted.dimension and abs(named.value - wanted.value) <= 1e-9 * max(1.0, abs(wanted.value))


def _told_apart(text: Text, span: Span, places: set[int], options: Sequence[Option]) -> frozenset[int]:
    """Of options named by the same words those whose capitals and accents are the text's, if that tells them apart."""
    mine = [token.text for token in text.tokens[slice(*span)]]
    for form in (str, str.casefold):
        wanted = list(map(form, mine))
        same = {at for at in places if [form(token.text) for token in options[at].text.tokens][-len(mine) :] == wanted}
        if len({options[at].text.folded for at in same}) == 1:
            return frozenset(same)
    return frozenset(places)


# ------------------------------------------------------------------------------------------------ letters


def _letters(text: Text, options: Sequence[Option]) -> list[Mention]:
    """Where letters, numbers that the options bring, or "the second option" stand for options or for none of them."""
    found = []
    count = len(options) or len(ascii_uppercase)
    for place, token in enumerate(text.tokens):
        after = text.gap(place + 1)
        if len(token.text) == 1 and token.text.isascii() and token.text.isalpha():
            letter, how = token.text.upper(), _label(text, place)
            index = ascii_uppercase.index(letter)
            if how and (index < count or how == "sure"):
                found.append(Mention(place, place + 1, frozenset((index,) if index < count else ()), letter))
        elif options and options[0].number and token.number and not text.glued(place):
            alone = len(text.tokens) == 1 or re.match(r"\s*[.):]", after) or (place and text.keys[place - 1] in _LABELS)
            if alone and token.value in range(1, count + 1):
                found.append(_numbered(place, place + 1, int(token.value or 0)))
    return found + _counted(text, options)


def _counted(text: Text, options: Sequence[Option]) -> list[Mention]:
    """ "The second option", "option 2", "the last one": options counted in the order in which they were offered."""
    found: list[Mention] = []
    if any(option.quantity for option in options):  # "the second one" of numbers is not the number two
        return found
    for place, key in enumerate(text.keys[:-1]):
        signed = text.keys[place + 1] == "#" and place + 2 < len(text.tokens)  # "option #2"
        end = place + 3 if signed else place + 2
        token, after = text.tokens[end - 1], text.keys[place + 1]
        ordinal = next((number for number, names in enumerate(_COUNTED, 1) if key in names), 0)
        ordinal = len(options) if key == "last" else ordinal
        counted = key in ("option", "choice") and not text.glued(end) and token.value
        if after in ("option", "choice", "one", "answer", "statement") and text.gap(place + 1) == " ":
            counted = ordinal
        if counted in range(1, len(options) + 1):
            found.append(_numbered(place, end, int(counted or 0)))
    return found


def _numbered(start: int, end: int, number: int) -> Mention:
    return Mention(start, end, frozenset((number - 1,)), ascii_uppercase[number - 1])


def _label(text: Text, place: int) -> str:
    """How sure it is that the letter at `place` is a label: "sure" ("(b)", "option B", "B."), "likely" where one can
    stand, "loose" where only the option's words behind it make it one ("B dog"), "" for a word, a note, a name."""
    token, before, after = text.tokens[place], text.gap(place), text.gap(place + 1)
    previous = text.keys[place - 1] if place else ""
    following = text.keys[place + 1] if place + 1 < len(text.tokens) else ""
    last, small = place + 1 == len(text.tokens), token.text.islower()
    if (following in _NOTES and after in (" ", "-")) or re.match(r"\s*[#\u266e\u266d]", after):
        return ""
    if re.search(r"[(\[{\u3010]\s*$", before) and re.match(r"\s*[)\]}\u3011]", after):
        return "" if place and small and before == "(" else "sure"  # "dog(s)"
    if text.glued(place) or (text.glued(place + 1) and not (after == "." and place == 0 and len(following) > 1)):
        return ""
    ends = last or bool(re.match(r"[\s\"'*]*[.,;:!?)\n]", after)) or " - " in after or " = " in after
    ends = ends or _GRADED.match(text.folded, token.end) is not None
    if previous in _LABELS:
        return "" if not ends and (small or (token.text in "AI" and following not in CUES_AFTER)) else "sure"
    if small:
        opens = place == 0 and (last or bool(re.match(r"\s*\**[.):]", after)))
        return "sure" if opens or (last and previous == "is" and "answer" in text.keys) else ""
    marked = last or re.match(r"\s*\**[):](?:[\s*]|$)" if token.text == "I" else r"\s*\**[.):](?:[\s*]|$)", after)
    if marked and (place == 0 or re.search(r"\n\W*$", before)):
        return "sure"
    quoted = bool(re.search(r"[\"'*]$", before) and re.match(r"[\"'*]", after))
    if previous in _NAMING:
        return ""
    if token.text == "I":
        return "likely" if quoted or (last and previous in ("is", "it's")) else ""
    return _bare(text, place, ends or quoted or following == "…", quoted)


def _bare(text: Text, place: int, ends: bool, quoted: bool) -> str:
    """The same of a capital with no mark that makes it a label."""
    before, previous = text.gap(place), text.keys[place - 1] if place else ""
    following = text.keys[place + 1] if place + 1 < len(text.tokens) else ""
    divided = place == 0 or bool(re.search(r"[.,;:!?(\n=>]|→| -\s*$|\"$", before)) or previous in ("…", "✓", "✗")
    single = len(previous) == 1 and previous not in ("a", "i")  # "A B C D"
    if not (divided or single or quoted or previous in _CUES_BEFORE or following in CUES_AFTER):
        return ""
    if ends:
        return "likely"
    if text.tokens[place].text == "A":  # "A as", "A it" begin no sentence about option A
        return "likely" if following in CUES_AFTER - {"as", "it", "i", "only", "best", "hands"} else ""
    return "likely" if following in CUES_AFTER or len(following) == 1 else "loose" if place == 0 else ""


def _surely(text: Text, place: int, words: Sequence[Mention]) -> bool:
    """Whether a letter that is also the text of an option ("C" among chords) stands as a label: "(C)", "option C", or
    beside another text, "C. E minor"."""
    before, after = text.gap(place), text.gap(place + 1)
    if re.search(r"[(\[{\u3010]$", before) and re.match(r"[)\]}\u3011]", after):
        return True
    if place and text.keys[place - 1] in ("option", "choice", "letter"):
        return True
    beside = any(one.start == place + 1 for one in words)
    return beside and (bool(re.match(r"\W*[.):\-]", after)) or place == 0)


def _beside(text: Text, a: Mention, b: Mention) -> bool:
    """Whether two mentions are a letter and its text, or a label twice, with marks and an article at most between."""
    if bool(a.letter) == bool(b.letter) and not (a.letter == b.letter != "" and not a.words and not b.words):
        return False
    if (a.letter and a.words) or (b.letter and b.words):
        return False
    gaps = "".join(text.gap(place) for place in range(a.end, b.start + 1))
    if re.search(r"[\n?!]", gaps) or any(key not in ARTICLES for key in text.keys[a.end : b.start]):
        return False
    if a.letter:
        return True
    # The text comes first: "dog (B)", "dog, B" — but in "(A) rain (B) dog" and "rain, B. dog" the letter goes on.
    if "(" in gaps:
        closing = text.gap(b.end)
        return b.end == len(text.tokens) or bool(re.search(r"[.,;:]", closing)) or text.keys[b.end] in CUES_AFTER
    return (
        bool(re.search(r"[,-]", gaps)) and not re.search(r"[.;:]", gaps) and not re.match(r"\s*[.):]", text.gap(b.end))
    )
