"""What a reply says: the option, letter, labels, yes or no that it gives.

Rewards pay and scorers score by this, by ``quantities`` and by ``directions`` alone. A reply is taken apart
(``parts``), its answer becomes tokens (``words``), the options that it names are found as whole things (``mentions``),
and ``stances`` tells what is said from what is denied, asked, supposed or taken back. A text that contradicts itself
says nothing: no answer is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

from audio_llm.language.mentions import ARTICLES, Mention, Option, bare_options, find, in_words, misplaced, offered
from audio_llm.language.parts import take_apart, unwrap
from audio_llm.language.polarity import YES_NO, read_yes_no
from audio_llm.language.quantities import read_text
from audio_llm.language.stances import stances
from audio_llm.language.words import Text, fold, plain

SEVERAL_ANSWERS = "several different answers"
_LEADS = frozenset(
    "so thus therefore hence the my final correct right best most likely answer option choice is would be should must "
    "letter it it's this that's a an sound i".split()
)
_SAID = ("said", "declared")


@dataclass(frozen=True)
class Resolution:
    """Which option a text names. `how` is letter, text, both or mention; `problem` says why there is none."""

    index: int | None
    how: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply taken apart. `answer` is the text of the answer, `words` the same unwrapped (from a box, from JSON);
    `choice` the option it resolves to."""

    raw: str
    thinking: str | None
    semantic_elements: str | None
    answer: str
    words: str
    choice: int | None
    how: str | None
    problem: str | None

    @property
    def said(self) -> str:
        """The words of the one answer; "" where there are none, or several answers that differ."""
        return "" if self.problem == SEVERAL_ANSWERS else self.words


@lru_cache(maxsize=20_000)
def normalise(text: str) -> str:
    """Lower case, single spaces, no quotes, emphasis or closing punctuation; accents, signs and inner marks stay."""
    return _trimmed(fold(text).casefold())


def _trimmed(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text.strip(" \"'*`").rstrip(".!,;:").strip(" \"'*`")


def read_reply(text: str, choices: Sequence[str] = (), answer_as: str = "") -> Reply:
    """Take a reply apart. Without an answer tag the words after the thinking count, and `problem` says so.

    Several answers (tags, boxes) count only when they all resolve to the same option; `answer_as` as in
    :func:`resolve_option`.
    """
    parts = take_apart(text)
    problem: str | None = None
    answers = parts.answers
    if not answers:
        problem = "thinking not closed" if parts.open else "no answer tag"
        answers = [parts.rest]
    said = [words for answer in answers for words in unwrap(answer)]
    resolutions = [_resolve_once(words, tuple(choices), answer_as) for words in said] if choices else []
    choice = how = None
    if resolutions:
        first = resolutions[0]
        if len({None if one.index is None else choices[one.index] for one in resolutions}) > 1:
            problem = SEVERAL_ANSWERS
        elif first.index is None:
            problem = problem or first.problem
        else:
            choice, how = first.index, first.how
    elif len({normalise(words) for words in said}) > 1:
        problem = SEVERAL_ANSWERS
    if problem is None:
        problem = "empty" if not answers[-1] else "answer not closed" if parts.cut else None
    return Reply(
        raw=text,
        thinking=parts.thinking[0] if parts.thinking else None,
        semantic_elements=parts.elements[0] if parts.elements else None,
        answer=answers[-1],
        words=said[-1],
        choice=choice,
        how=how,
        problem=problem,
    )


# ------------------------------------------------------------------------------------------------ options


def resolve_option(text: str, choices: Sequence[str], answer_as: str = "") -> Resolution:
    """Resolve `text` to exactly one of `choices`, or say why not. Never guesses.

    The text *is* an option, as it stands; or it names options by letter, by text or by both (which must agree), and
    says exactly one of them. A single letter that is itself an option's text (a musical key, a stress mark) is that
    option, not a label, unless letters were asked for (`answer_as` "letter", of ``ANSWERS_AS``; "": nothing in
    particular was). Of equal options the first is returned. Yes and no are read by :func:`read_yes_no`.
    """
    if not normalise(text):
        return Resolution(None, problem="empty")
    if not choices:
        return Resolution(None, problem="no choices")
    text = re.sub(r"^(\W*[A-Z]\.)(?=[^\W\d_]{2})", r"\1 ", text)  # "B.dog"
    options, read = offered(tuple(choices)), read_text(text)
    lone = _lone_letter(text)
    if answer_as == "letter" and lone and ascii_uppercase.index(lone) < len(choices):
        return Resolution(ascii_uppercase.index(lone), "letter")
    whole = _whole(text, choices, options)
    if whole is not None:
        return Resolution(whole, "text")
    polar = _polar(options)
    if polar and not (lone and ascii_uppercase.index(lone) < len(choices)):
        found = _resolve_polar(read, options, polar)
        if found is not None:
            return found
    mentions = find(read, options, answer_as == "letter")
    part = None if mentions else _part_of_one(read, options)
    return _resolve(read, mentions, choices, options) if part is None else Resolution(part, "mention")


_resolve_once = lru_cache(maxsize=50_000)(resolve_option)  # many replies differ in their thinking alone


def _lone_letter(text: str) -> str:
    """The letter that is all of `text`, in capitals; "" for any other text, and for a note ("B♭")."""
    match = re.fullmatch(r"[\W_]*(?:(?:option|choice|answer|letter)\b\W*)?([A-Za-z])[\W_]*", fold(text), re.IGNORECASE)
    return match[1].upper() if match and not re.search(r"[#\u266d\u266e\u266f+]", text) else ""


def _whole(text: str, choices: Sequence[str], options: Sequence[Option]) -> int | None:
    """The option that `text` is, by the strictest form that any option shares with it: to the letter, in one way of
    writing, without case. Options that only a stricter form tells apart are not found by a looser one."""
    forms: tuple[Callable[[str], str], ...] = (str.strip, fold, lambda one: _trimmed(fold(one)), normalise)
    bare = [option.text.folded for option in options]
    for form in forms:
        mine = form(text)
        for texts in (choices, bare):
            same = [place for place, option in enumerate(texts) if form(option) == mine]
            if same:
                apart = form is not forms[0] and len({fold(texts[place]) for place in same}) > 1
                return None if apart else same[0]
    return None


def _resolve(read: Text, mentions: list[Mention], choices: Sequence[str], options: Sequence[Option]) -> Resolution:
    """The one option that the mentions say; those declared as the answer count before the others."""
    found = _stances(read, mentions, options)
    listed = _listed(read, mentions, len(choices))
    if listed and not any(found[place] == "denied" for place in listed):
        mentions = [one for place, one in enumerate(mentions) if place not in listed]
        found = _stances(read, mentions, options)
    declared = [one for one, stance in zip(mentions, found, strict=True) if stance == "declared"]
    said = declared or [one for one, stance in zip(mentions, found, strict=True) if stance == "said"]
    for one in said:
        if not one.options and ascii_uppercase.index(one.letter) >= len(choices):
            return Resolution(None, problem=f"letter {one.letter} beyond the {len(choices)} options")
        if not one.options:
            return Resolution(None, problem=f"contradiction: letter {one.letter} beside other words")
        if len({choices[place] for place in one.options}) > 1:
            return Resolution(None, problem="options told apart by their capitals alone")
    texts = {choices[min(one.options)] for one in said}
    if len(texts) == 1:
        return Resolution(min(said[-1].options), _how(read, said, mentions))
    denied = "denied" in found
    return Resolution(
        None, problem="several options named" if texts else "only denied" if denied else "no option named"
    )


def _stances(read: Text, mentions: Sequence[Mention], options: Sequence[Option]) -> list[str]:
    """Their stances; the marks that an option brings at its end are its own."""
    closings = []
    for one in mentions:
        text = options[min(one.options)].text if one.words and one.options else None
        closings.append(text.gap(len(text.tokens)) if text else "")
    return stances(read, [one.span for one in mentions], closings)


def _how(read: Text, said: Sequence[Mention], mentions: Sequence[Mention]) -> str:
    """text, letter or both where the answer is that and a lead-in ("the answer is …"), else mention."""
    letter, words = any(one.letter for one in said), any(one.words for one in said)
    if letter:
        return "both" if words else "letter"
    outside = (*read.keys[: said[0].start], *read.keys[said[0].end :])
    return "text" if len(mentions) == 1 and all(key in _LEADS for key in outside) else "mention"


def _listed(read: Text, mentions: Sequence[Mention], count: int) -> set[int]:
    """Mentions that only repeat the options as they were offered: all of them, in order, nothing else between."""
    found: set[int] = set()
    for start in range(len(mentions) - count + 1 if count > 1 else 0):
        window = mentions[start : start + count]
        if start not in found and [one.options for one in window] == [frozenset((place,)) for place in range(count)]:
            pairs = zip(window, window[1:], strict=False)
            if all(
                "?" not in read.gap(b.start)
                and all(key in ("and", "or", *ARTICLES) for key in read.keys[a.end : b.start])
                for a, b in pairs
            ):
                found |= set(range(start, start + count))
    return found


def _part_of_one(read: Text, options: Sequence[Option]) -> int | None:
    """The one option that ends with all words of a short answer ("serious and concerned", a surname); None for a
    denial, a question, a number, or words that others end with too."""
    keys = tuple(key for key in read.keys if key not in _LEADS)
    denied = re.search(r"\b(?:not|no|never|cannot)\b|n't\b", " ".join(read.keys))
    if not keys or denied or "?" in read.folded or any(token.number for token in read.tokens):
        return None
    holding = [
        place
        for place, one in enumerate(options)
        if len(keys) < len(one.text.keys) and one.text.keys[-len(keys) :] == keys
    ]
    if len({options[place].text.folded for place in holding}) != 1:
        return None
    names = all(token.text[:1].isupper() for option in options for token in option.text.tokens)
    surname = names and len(options[holding[0]].text.tokens) == 2 and len(keys[0]) > 3
    return holding[0] if len(keys) > 1 or surname else None


def _polar(options: Sequence[Option]) -> dict[str, int]:
    """The places of the options that are yes and no, or true and false; {} where the options are others."""
    names = {" ".join(option.text.keys): place for place, option in enumerate(options)}
    for yes, no in (YES_NO, ("true", "false")):
        if set(names) == {yes, no}:
            return {"yes": names[yes], "no": names[no]}
    return {}


def _resolve_polar(read: Text, options: Sequence[Option], polar: dict[str, int]) -> Resolution | None:
    """The option that a yes or no names, and the label before it if there is one; None where a letter alone decides."""
    mentions = [one for one in find(read, options) if one.letter]
    if mentions and mentions[0].start == 0:
        rest = read.folded[read.tokens[0].end :].lstrip(" .):]*")
        word = read_yes_no(rest)
        if word is None:
            return None
        if mentions[0].letter and mentions[0].options != {polar[word]}:
            return Resolution(None, problem="contradiction between letter and text")
        return Resolution(polar[word], "both")
    word = read_yes_no(read.folded)
    if word is None:
        return None if mentions else Resolution(None, problem="neither yes nor no")
    return Resolution(polar[word], "text" if len(read.tokens) == 1 else "mention")


def read_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The one option letter that an answer gives ("B", "(b) rain", "B. rain", "the answer is B"), whatever it means.

    A letter that may be a word ("A dog") is none, nor is one that the answer denies ("(B) rain is not heard", told from
    what the `choices` say); of several letters none is taken.
    """
    options = offered(tuple(choices))
    found: set[str] = set()
    for words in unwrap(text):
        read = read_text(words)
        mentions = find(read, options, letters_only=True)
        told = zip(mentions, _stances(read, mentions, options), strict=True)
        found |= {one.letter for one, stance in told if stance in _SAID and one.letter}
    return found.pop() if len(found) == 1 else None


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
    """``("A. rain", "B. wind")`` → ``("rain", "wind")``; unchanged unless every option has the letter of its place."""
    bare, numbered = bare_options(options)
    return tuple(options) if numbered else bare


def read_key(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Index of the choice that an answer key names, and what had to be repaired or is beyond repair ("" for neither).

    A key is a choice's text, its letter with its text, or its letter alone. Case, spaces and closing punctuation are
    repaired; a letter beside another choice's text, several letters or more words than the choice's are not.
    """
    found, match = resolve_option(said, choices), re.fullmatch(r"\s*[(\[]?[A-Za-z]\s*[.):\]]\s*(\S.*)", said, re.DOTALL)
    alone = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", said) if found.how == "letter" else None
    if alone and not misplaced(alone[1], choices):
        return found.index, "answer is a letter alone"
    words = match[1] if match and found.how == "both" else said
    if found.index is not None and normalise(words) == normalise(choices[found.index]):
        exact = words.strip() == choices[found.index].strip()
        return found.index, "" if exact else "answer differs from its option by punctuation, case or spaces"
    return None, f"the answer {said.strip()!r} is none of the options"


# ------------------------------------------------------------------------------------------------ free answers


def holds(text: str, label: str) -> bool:
    """Whether `text` has `label` in it as a whole thing, said or not: no "5" is in "2.5", no "speech" in "non-speech".
    All words of the label are wanted, but a quantity may be written otherwise. Yes and no are read as answers: "no
    idea" is no "no"."""
    if normalise(label) in YES_NO:
        return read_yes_no(text) == normalise(label)
    read, options = read_text(text), offered((label,))
    wanted = options[0].text.plain_keys
    found = in_words(read, options)
    return any(options[0].quantity is not None or read.plain_keys[slice(*one.span)] == wanted for one in found)


def mentions(text: str, label: str) -> bool:
    """Whether running text names `label` somewhere and says it there."""
    read, options = read_text(text), offered((label,))
    return any(stance in _SAID for stance in _stances(read, in_words(read, options), options))


def read_labels(text: str, known: Sequence[str] = ()) -> frozenset[str]:
    """The set of labels of a list, in normal form.

    Labels stand between semicolons or on lines of their own; a comma inside one is part of it, unless the `known`
    labels tell that it divides two of them. Bullets, an article and "the sound is" in front are left out, and so is
    what is denied.
    """
    wanted = {plain(normalise(label)): normalise(label) for label in known}
    found: set[str] = set()
    for part in re.split(r"[;\n]", fold(text)):
        pieces = [_label(part)]
        if known and plain(pieces[0]) not in wanted:
            split = [_label(piece) for piece in re.split(r"[,+/]| and | & ", part.strip(" []()"))]
            pieces = split if any(plain(piece) in wanted for piece in split) else pieces
        for piece in pieces:
            if piece and not piece.startswith(("not ", "no ", "neither ")):
                one = plain(piece)
                found.add(wanted.get(one) or wanted.get(one.removesuffix("s")) or piece)
    return frozenset(found)


_LABEL_LEAD = re.compile(
    r"^(?:\s+|[-\u2022*]\s+|\d{1,2}[.)]\s+|(?:the |my )?(?:sounds?|answers?|labels?)(?: \w+)? (?:is|are)\s+"
    r"|(?:it|this) is\s+|(?:i|we) (?:can )?hear:?\s+|(?:answers?|labels?):\s*|(?:an?|the)\s+)+"
)


def _label(part: str) -> str:
    return normalise(_LABEL_LEAD.sub("", part.casefold().strip()))
