"""What a reply says: its parts, the option, letter, labels, yes or no that it gives, and what it denies.

Rewards pay and scorers score by this and by :mod:`audio_llm.language.quantities` alone. A text that contradicts itself,
or that says a thing only to deny it, says nothing: no answer is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from audio_llm.language.prompts import TAGS

Span = tuple[int, int]  # start and end of a mention


@dataclass(frozen=True)
class Resolution:
    """Which option a text names. `how` is letter, text, both or mention; `problem` says why there is none."""

    index: int | None
    how: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Reply:
    """A reply taken apart. `answer` is the text of the answer; `choice` the option it resolves to."""

    raw: str
    thinking: str | None
    semantic_elements: str | None
    answer: str
    choice: int | None
    how: str | None
    problem: str | None

    @property
    def said(self) -> str:
        """The words of the one answer; "" where there are none, or several answers that differ."""
        return "" if self.problem == SEVERAL_ANSWERS else self.answer


SEVERAL_ANSWERS = "several different answers"
YES_NO = ("yes", "no")
_YES_NO = re.compile(r"\b(yes|no)\b")
# "The correct answer is …": what follows is the answer.
_LEAD_IN = re.compile(
    r"^[\s\"'*]*(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best|most likely)\s+)*"
    r"(?:(?:answer|option|choice)\s+(?:is|would be|should be|must be)\b\s*:?|answer\s*[:=])[\s*]*(?=\S)",
    re.IGNORECASE,
)
_LETTER_ONLY = re.compile(
    r"^[\s\"'*]*(?:option|choice|answer)?\s*[:(\[]*\s*([A-Za-z])\s*[)\].:,\"'*]*\s*$", re.IGNORECASE
)
_LETTER_FIRST = re.compile(
    r"^[\s\"'*]*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s*\**[).:,\-]\**|([A-Z])\s)\s*(.+)$", re.DOTALL
)
_LETTER_INSIDE = re.compile(
    r"\((?P<a>[A-Z])\)|\b(?:option|choice|answer)(?:\s+is)?\s*:?\s*\(?(?P<b>[A-Z])\b(?!\s+[a-z]|[.'’/-]\w|[#♯♭]|:\S)",
    re.IGNORECASE,
)
# A label that can only be one: bracketed, or marked and set off ("i.e.", "I, for one" and "X-ray" are none).
_LABEL = re.compile(r"^[\s\"'*]*(?:\([A-Za-z]\)|\[[A-Za-z]\]|[A-Za-z]\s*[).:](?=[\s*]))")
_LETTERED = re.compile(r"\s*[(\[]?([A-Za-z])\s*[.):\]]\s*(\S.*)", re.DOTALL)  # an option as it is offered


def normalise(text: str) -> str:
    """Lower case, single spaces, no quotes, emphasis or closing punctuation; accents, signs and inner marks stay."""
    text = re.sub(r"\s+", " ", text.replace("’", "'")).strip().casefold()
    return text.strip(" \"'*`").rstrip(".!,;:").strip(" \"'*`")


def resolve_option(text: str, choices: Sequence[str], answer_as: str = "") -> Resolution:
    """Resolve `text` to exactly one of `choices`, or say why not. Never guesses.

    In order: the text *is* an option, as it stands or after "the answer is"; it is a letter; it is a letter with an
    option (which must agree); exactly one option is mentioned and not denied, and a letter in the text does not
    contradict it. A single letter that is itself an option's text (a musical key, a stress mark) is that option, not a
    label, unless letters were asked for (`answer_as` "letter", of ``ANSWERS_AS``; "": nothing in particular was). Of
    equal options the first is returned.
    """
    wanted = normalise(text)
    options = [normalise(choice) for choice in choices]
    if not wanted:
        return Resolution(None, problem="empty")
    if not options:
        return Resolution(None, problem="no choices")
    if answer_as == "letter" and (match := _LETTER_ONLY.match(text)):
        labelled = _by_letter(match[1], options)
        if labelled.index is not None or wanted not in options:  # an "E" among four options can only be a text
            return labelled
    if wanted in options:
        return Resolution(options.index(wanted), "text")
    if match := _LEAD_IN.match(text):
        told = resolve_option(text[match.end() :], choices, answer_as)
        if told.how != "mention":  # a mention may stand beside a letter that the lead-in makes one
            return told
    elif match := _LETTER_ONLY.match(text):
        return _by_letter(match[1], options)
    elif match := _LETTER_FIRST.match(text):
        letter = next(group for group in match.groups()[:4] if group)
        by_letter = _resolve_labelled(text, letter, match[5], match[4] is not None, options)
        if by_letter is not None:
            return by_letter
    named, refused = _named_options(normalise(re.sub(r"\s*\n\s*", "; ", text)), options)  # a line is a clause
    letters, refused_letters = _named_letters(text, options)
    if beyond := sorted(letter for letter in letters if ascii_uppercase.index(letter) >= len(options)):
        return _by_letter(beyond[0], options)
    meant = _of_letters(letters, options)
    if len(named) == 1:
        if meant - named or named & _of_letters(refused_letters, options):
            return Resolution(None, problem="contradiction between letter and text")
        return Resolution(named.pop(), "both" if letters else "mention")
    if not named and len(letters) == 1 and not meant & refused:
        return _by_letter(letters.pop(), options)
    return Resolution(None, problem=_problem(named, refused or refused_letters))


def read_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The one option letter that an answer gives ("B", "(b) rain", "B. rain", "the answer is B"), whatever it means.

    A letter that may be a word ("A dog") is none, nor is one that the answer denies ("(B) rain is not heard", told from
    what the `choices` say); of several letters none is taken.
    """
    if match := _LEAD_IN.match(text):
        text = text[match.end() :]
    if match := _LETTER_ONLY.match(text):
        return match[1].upper()
    letters, refused = _named_letters(text, [normalise(choice) for choice in choices] or [""] * len(ascii_uppercase))
    if (match := _LETTER_FIRST.match(text)) and match[4] is None and _LABEL.match(text):
        letter = next(group for group in match.groups()[:3] if group).upper()
        return letter if letters <= {letter} and letter not in refused else None
    return letters.pop() if len(letters) == 1 else None


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
    """``("A. rain", "B. wind")`` → ``("rain", "wind")``; unchanged unless every option has the letter of its place."""
    found = [match for option in options if (match := _LETTERED.fullmatch(option))]
    if [match[1].upper() for match in found] != list(ascii_uppercase[: len(options)]):
        return tuple(options)
    return tuple(match[2].strip() for match in found)


def read_key(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Index of the choice that an answer key names, and what had to be repaired or is beyond repair ("" for neither).

    A key is a choice's text, its letter with its text, or its letter alone. Case, spaces and closing punctuation are
    repaired; a letter beside another choice's text, several letters or more words than the choice's are not.
    """
    found, match = resolve_option(said, choices), _LETTERED.fullmatch(said)
    if found.how == "letter" and _LETTER_ONLY.match(said):
        return found.index, "answer is a letter alone"
    words = match[2] if match and found.how == "both" else said
    if found.index is not None and normalise(words) == normalise(choices[found.index]):
        exact = words.strip() == choices[found.index].strip()
        return found.index, "" if exact else "answer differs from its option by punctuation, case or spaces"
    return None, f"the answer {said.strip()!r} is none of the options"


def read_yes_no(text: str) -> str | None:
    """``yes`` or ``no``, the one of them that `text` says and does not deny; None where it says neither or both."""
    words = {match[0] for match in said_in(text, _YES_NO)}
    return words.pop() if len(words) == 1 else None


def read_labels(text: str) -> frozenset[str]:
    """The set of labels of a ``"; "`` list, in normal form; a comma inside a label is part of it."""
    return frozenset(label for label in map(normalise, text.split(";")) if label)


def mentions(text: str, label: str) -> bool:
    """Whether running `text` names `label` somewhere and does not deny it there."""
    return bool(_named_options(normalise(text), [normalise(label)])[0])


def said_in(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Where `text`, :func:`lowered`, matches `pattern` and does not deny it."""
    text = lowered(text)
    found = {match.span(): match for match in pattern.finditer(text)}
    refused = _denied(text, found)
    return [match for span, match in found.items() if span not in refused]


def _resolve_labelled(text: str, letter: str, rest: str, bare: bool, options: Sequence[str]) -> Resolution | None:
    """A letter, then words: both must agree. None where the letter may be a word ("A dog …", "I hear …")."""
    index = ascii_uppercase.index(letter.upper())
    inner = _resolve_words(normalise(rest), options)
    if index >= len(options):
        return _by_letter(letter, options) if _LABEL.match(text) else None
    if inner.index is not None:
        if options[inner.index] == options[index]:
            return Resolution(inner.index, "both")
        # A bare A or I may be a word; another bare letter is a label unless it is part of the option ("E minor").
        if bare and (letter in "AI" or _resolve_words(normalise(text), options).index != inner.index):
            return None
        return Resolution(None, problem=f"contradiction: letter {letter.upper()} beside option {inner.index + 1}")
    if inner.problem == "no option named" and not bare and not re.search(r"\b(?:not|no|never|isn't)\b", lowered(text)):
        return Resolution(None, problem=f"letter {letter.upper()} beside words that are no option")
    return None


def _named_letters(text: str, options: Sequence[str]) -> tuple[set[str], set[str]]:
    """Capital letters that a text names as labels, and those that it denies: a letter is in one of the two."""
    small = lowered(text)
    places = {match.span(): (match["a"] or match["b"]) for match in _LETTER_INSIDE.finditer(text)}
    if (match := _LETTER_FIRST.match(text)) and _LABEL.match(text):
        group = next(number for number in (1, 2, 3) if match[number])
        if not any(start <= match.start(group) < end for start, end in places):
            places[match.span(group)] = match[group]
    for (start, end), letter in list(places.items()):
        beyond = ascii_uppercase.index(letter.upper()) >= len(options)
        if beyond and (letter.islower() or text[:start][-1:].isalnum()):  # "dog(s)" is a plural
            del places[start, end]
    spans = _denied(small, places, beside=_mentions(small, options))
    refused = {places[span].upper() for span in spans}
    return {letter.upper() for letter in places.values()} - refused, refused


def _of_letters(letters: set[str], options: Sequence[str]) -> set[int]:
    """The options, the first of equal ones, that letters stand for."""
    return {
        options.index(option) for letter, option in zip(ascii_uppercase, options, strict=False) if letter in letters
    }


def _by_letter(letter: str, options: Sequence[str]) -> Resolution:
    index = ascii_uppercase.index(letter.upper())
    if index < len(options):
        return Resolution(options.index(options[index]), "letter")
    return Resolution(None, problem=f"letter {letter.upper()} beyond the {len(options)} options")


def _resolve_words(text: str, options: Sequence[str]) -> Resolution:
    """Exactly one option named in running text and not denied; an option inside a longer named one does not count."""
    named, refused = _named_options(text, options)
    return Resolution(named.pop(), "mention") if len(named) == 1 else Resolution(None, problem=_problem(named, refused))


def _problem(named: Collection[int], refused: Collection[Any]) -> str:
    return "several options named" if named else "only denied" if refused else "no option named"


def _named_options(text: str, options: Sequence[str]) -> tuple[set[int], set[int]]:
    """Options that a text names, and those that it denies: an option is in one of the two."""
    places = _mentions(text, options)
    refused = {places[span] for span in _denied(text, places)}
    return set(places.values()) - refused, refused


def _mentions(text: str, options: Sequence[str]) -> dict[Span, int]:
    """The option of every mention that does not lie inside a longer one."""
    spans: dict[Span, int] = {}
    for option in dict.fromkeys(options):  # equal options are one option: the first of them stands for all
        for match in re.finditer(rf"(?<![\w#])(?<!non-){re.escape(option)}(?![\w#])", text) if option else ():
            spans[match.span()] = options.index(option)
    return {a: index for a, index in spans.items() if not any(b[0] <= a[0] and a[1] <= b[1] and b != a for b in spans)}


def _blocks(text: str, tag: str) -> list[str]:
    opening, closing = f"<{tag}>", f"</{tag}>"
    blocks, end = [], 0
    # No pattern does this in one pass: a model that repeats an opening tag for ever would cost its length squared.
    while (start := text.find(opening, end)) >= 0 and (close := text.find(closing, start)) >= 0:
        blocks.append(text[start + len(opening) : close].strip())
        end = close + len(closing)
    return blocks


def strip_turn_markers(text: str) -> str:
    """Remove end-of-turn markers that a decoder left at the end of a reply."""
    return re.sub(r"(?:<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|</s>|<\|end_of_text\|>)\s*$", "", text.strip()).strip()


def read_reply(text: str, choices: Sequence[str] = (), answer_as: str = "") -> Reply:
    """Take a reply apart. Without an answer tag the words after the thinking count, and `problem` says so.

    Several answer blocks count only when they all resolve to the same option; `answer_as` as in
    :func:`resolve_option`.
    """
    body = strip_turn_markers(text)
    thinking, elements, answers = (_blocks(body, tag) for tag in TAGS)
    problem: str | None = None
    if not answers:
        problem = "no answer tag"
        rest = re.split(r"</semantic_elements>|</think>", body)[-1]
        if "<think>" in rest:  # the thinking never ended: whatever it mentions is not an answer
            rest, problem = "", "thinking not closed"
        answers = [re.sub(r"</?answer>", "", rest).strip()]
    resolutions = [resolve_option(answer, choices, answer_as) for answer in answers] if choices else []
    choice = how = None
    if resolutions:
        first = resolutions[0]
        if len({resolution.index for resolution in resolutions}) > 1:
            problem = SEVERAL_ANSWERS
        elif first.index is None:
            problem = problem or first.problem
        else:
            choice, how = first.index, first.how
    elif len({normalise(answer) for answer in answers}) > 1:
        problem = SEVERAL_ANSWERS
    if not answers[-1] and problem is None:
        problem = "empty"
    return Reply(
        raw=text,
        thinking=thinking[0] if thinking else None,
        semantic_elements=elements[0] if elements else None,
        answer=answers[-1],
        choice=choice,
        how=how,
        problem=problem,
    )


# ------------------------------------------------------------------------------------------------ denials
# "not rain", "I doubt it is (B)", "rain? No.", "rain cannot be heard". A denial before the mention holds to the end of
# its clause and through a list ("neither rain, wind nor a dog"), one after it must follow at once. Where that is
# unclear the mention counts as denied.

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


def _denied(text: str, spans: Collection[Span], beside: Iterable[Span] = ()) -> set[Span]:
    """The mentions among `spans` that `text`, in lower case, denies. A "never" inside a mention, or inside what stands
    `beside` it, denies nothing: all of them are masked."""
    for start, end in (*spans, *beside):
        text = text[:start] + "\0" * (end - start) + text[end:]
    return {span for span in spans if _is_denied(text, *span)}


def _is_denied(text: str, start: int, end: int) -> bool:
    before = _NEUTRAL.sub(lambda match: "_" * len(match[0]), text)[:start]
    # The mask that follows tells a list's comma from a clause's, so the clauses are cut with the mention in sight.
    clause = 0
    for boundary in _CLAUSE.finditer(before + "\0"):
        clause = boundary.end()
    return bool(_BEFORE.search(before[clause:])) or bool(_AFTER.match(text[end:]))
