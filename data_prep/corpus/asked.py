"""A question that was generated, and everything that code alone can find wrong with it: a closed list of reasons.

Nothing here listens, and no model is asked: what these checks leave is judged by models afterwards. They are cheap, so
they come first, and the first that fails is the reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from audio_llm.datasets.mmau import word_set
from audio_llm.language.groups import ELEMENT_GROUPS, REASONING, group_of
from audio_llm.language.mentions import bare_options, without_article
from audio_llm.language.polarity import YES_NO
from audio_llm.language.quantities import read_text
from audio_llm.language.replies import holds, mentions, normalise, read_key
from data_prep.corpus.facts import Fact
from data_prep.manifest.checks import MARKS
from data_prep.scenes.rooms import seeded

FORMS = ("caption", "open", "choice")
REASONS = {
    "schema": "a field is missing, empty or of another type",
    "marks": "it holds tags of a reply, marks of turns, or {places} that were to be filled",
    "degenerate": "a word or a mark is repeated again and again",
    "not_a_question": "it asks nothing",
    "question_long": "the question has more words than allowed",
    "yes_no": "the answer is yes or no",
    "few_options": "there are fewer options than asked for",
    "equal_options": "two options are equal but for case, spaces, punctuation and an article",
    "lettered_options": "the options bring letters of their own, or stand in the question",
    "options_collide": "all words of one option are in another",
    "answer_no_option": "the answer is none of the options",
    "answer_stands_out": "the answer is much longer, or much shorter, than all other options",
    "question_tells": "the question names the answer, and no other option",
    "answer_long": "the answer has more words than allowed",
    "banned_phrase": "it speaks of captions, fields or other traces of how it was made",
    "visual": "it speaks of what is seen, which nothing heard confirms",
    "timestamps": "it tells a time in the recording as a clock does",
    "thinking_short": "the thinking has fewer words than asked for",
    "thinking_long": "the thinking has more words than allowed",
    "thinking_elsewhere": "the thinking names other options, and never the answer",
    "elements": "semantic elements are missing, or of no known group",
    "evidence": "it rests on no fact, or on one that there is not",
}


@dataclass(frozen=True)
class Asked:
    """A question with its answer. `form` is one of ``FORMS``; `evidence` are ids of facts."""

    form: str
    question: str
    answer: str
    choices: list[str] = field(default_factory=list)
    thinking: str = ""
    semantic_elements: dict[str, Any] = field(default_factory=dict)
    skill: str = ""
    evidence: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, tree: Any) -> Asked | str:
        """The question in a mapping, or what is wrong with its fields. Others than ours are let be."""
        if not isinstance(tree, Mapping):
            return f"expected an object, found {type(tree).__name__}"
        values = {item.name: tree[item.name] for item in dataclasses.fields(cls) if tree.get(item.name) is not None}
        for name in ("form", "question", "answer"):
            if not isinstance(values.get(name), str) or not values[name].strip():
                return f"{name}: expected words, found {values.get(name)!r:.60}"
        if values["form"] not in FORMS:
            return f"form: expected one of {', '.join(FORMS)}, found '{values['form']}'"
        for name in ("thinking", "skill"):
            if not isinstance(values.get(name, ""), str):
                return f"{name}: expected a text, found {values[name]!r:.60}"
        for name in ("choices", "evidence"):
            listed = values.get(name, [])
            if not isinstance(listed, list) or not all(isinstance(one, str) and one.strip() for one in listed):
                return f"{name}: expected a list of texts, found {listed!r:.60}"
        elements = values.get("semantic_elements", {})
        if not isinstance(elements, Mapping):
            return f"semantic_elements: expected an object, found {elements!r:.60}"
        for group, words in elements.items():
            listed = words if isinstance(words, list) else [words]
            if not listed or not all(isinstance(word, str) and word.strip() for word in listed):
                return f"semantic_elements.{group}: expected words, found {words!r:.60}"
        return cls(**values | {"semantic_elements": dict(elements)})

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text with the name of its field."""
        yield from (("question", self.question), ("answer", self.answer), ("thinking", self.thinking))
        yield from (("choices", choice) for choice in self.choices)
        for group, words in self.semantic_elements.items():
            listed = words if isinstance(words, list) else [words]
            yield from ((f"semantic_elements.{group}", word) for word in listed)


@dataclass(frozen=True)
class Rules:
    """What code asks of a question."""

    options: int = 2  # at least so many
    stands_out: float = 3.0  # times the words of the longest other option, or of the shortest
    question_words: int = 60
    answer_words: int = 50
    thinking_words: tuple[int, int] = (0, 400)
    elements: str = "any"  # of the semantic elements: "any", "known" groups alone, or all "nine"
    evidence: bool = False  # whether facts have to be named
    banned: tuple[str, ...] = ()  # phrases beside those of BANNED
    visual: bool = True  # whether words of what is seen are looked for


# Traces of how a question was made: what the published pipeline forbids, and the names of its fields and of ours.
BANNED = (
    "original caption", "original data", "original description", "original title", "closed caption", "closed captions",
    "closed captioning", "the caption", "the captions", "audio caption", "the subtitle", "the subtitles",
    "the transcript", "video caption", "the video description", "audio tag", "audio tags", "the tags", "metadata",
    "predictions per second", "per second predictions", "sat predictions", "ast classification", "conette",
    "the dataset", "the facts provided", "provided facts", "given facts", "the facts given", "from the facts",
    "based on the facts", "the facts say", "the facts state", "the facts list", "listed facts",
    "the data provided", "provided data", "provided information", "given information", "the classifier",
    "confidence score", "as an ai", "language model", "the prompt", "json", "the evidence", "according to the facts",
    "the fact list", "the label", "the labels", "ground truth",
)  # fmt: skip
# What is seen and cannot be heard. A word that a fact of sound has is heard: the click of a camera.
_COLOURS = "red green blue yellow purple brown black white grey gray pink"
VISUAL = frozenset(
    "video videos image images picture pictures photo photograph footage frame frames screen camera onscreen visible "
    "visibly visual visually visuals seen sees seeing see saw looking watches watching watched wearing colour color "
    f"coloured colored {_COLOURS} displayed depicts depicted shows showing blurry".split()
)
_SAYS_SEEN = re.compile(
    r"\b(?:we|you|i|they|one) can see\b|\bcan be seen\b|\bas seen\b|\bin the (?:video|image|picture|frame)\b"
)
# "I see", "let me see": said in thinking, and nothing is seen.
_FIGURES = re.compile(r"\b(?:i see|let me see|let's see|see whether|see if|see what|sea ?saw|chain ?saw|hand ?saw)\b")
_COLOUR = rf"\b(?:{_COLOURS.replace(' ', '|')})"
# A colour in the name of a sound, or of what makes it: white noise, a blue jay, a black-capped chickadee.
_NAMED_BY_COLOUR = re.compile(
    rf"{_COLOUR}(?:[ -](?:noise|bear|bird|deer|duck|finch|fox|frog|goose|grouse|gull|hawk|heron|jay|kite|monkey|owl|"
    r"parrot|rhino|robin|seal|squirrel|swan|thrush|warbler|water|whale|wolf|woodpecker)(?:s|es)?|-\w+ed)\b"
)
_CLOCK = re.compile(
    r"\b\d{1,2}:\d{2}(?:[.:]\d+)?\b|\btimestamps?\b"
    r"|\b(?:at|from|after|until|to) (?:around |about )?\d+(?:\.\d+)? ?(?:s|sec|secs|seconds?)\b(?! long)",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"\b(?:choices|options):|\(?\bA[.)]\s.+\bB[.)]\s", re.IGNORECASE | re.DOTALL)
_ASKING = re.compile(
    r"^(?:please )?(?:describe|choose|select|pick|name|identify|tell|list|give|explain|say|write|count|estimate|decide|"
    r"determine|listen|caption|summari[sz]e|characteri[sz]e|complete|provide)\b",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\{\w*\}")
_REPEATED = re.compile(r"(\S)\1{5,}|\b(\w+)(?:\W+\2\b){3,}|!!!+", re.IGNORECASE)


class Fault(NamedTuple):
    """Something wrong with a question. `field` is where: the name of a field of :class:`Asked`, "" for all of it."""

    reason: str
    detail: str
    field: str


def fault(tree: Any, rules: Rules, facts: Sequence[Fact] = ()) -> tuple[str, str]:
    """The first reason why the question in `tree` is of no use, and what was found; ("", "") for a good one."""
    asked = Asked.read(tree)
    if isinstance(asked, str):
        return "schema", asked
    found = next(faults(asked, rules, facts), None)
    return (found.reason, found.detail) if found else ("", "")


def faults(asked: Asked, rules: Rules, facts: Sequence[Fact] = ()) -> Iterator[Fault]:
    """Everything that code finds wrong with a question, in the order of its checks; the first one is its reason."""
    for check in (_form, _options, _words, _thought):
        yield from check(asked, rules, facts)


def _form(asked: Asked, rules: Rules, facts: Sequence[Fact]) -> Iterator[Fault]:
    for name, text in asked.texts():
        if match := MARKS.search(text) or _PLACE.search(text):
            yield Fault("marks", f"{name}: '{match[0]}'", name)
        if match := _REPEATED.search(text):
            yield Fault("degenerate", f"{name}: '{match[0][:40]}'", name)
        if text.rstrip().endswith("!") and name in ("thinking", "answer") and text.count("!") > 1:
            yield Fault("degenerate", f"{name}: '{text[-40:]}'", name)
    question = asked.question.strip()
    if ("?" not in question and not _ASKING.match(question)) or len(word_set(question)) < 2:
        yield Fault("not_a_question", f"'{question[:80]}'", "question")
    if len(question.split()) > rules.question_words:
        yield Fault("question_long", f"{len(question.split())} words", "question")
    if asked.form != "choice" and normalise(asked.answer) in YES_NO:
        yield Fault("yes_no", f"'{asked.answer}'", "answer")
    if asked.form != "choice" and asked.choices:
        found = f"choices: expected none in the form '{asked.form}', found {len(asked.choices)}"
        yield Fault("schema", found, "choices")


def _options(asked: Asked, rules: Rules, facts: Sequence[Fact]) -> Iterator[Fault]:
    if asked.form != "choice":
        return
    options = asked.choices
    if len(options) < rules.options:
        yield Fault("few_options", f"{len(options)} where at least {rules.options} are asked for", "choices")
    if options and bare_options(options)[0] != tuple(options):
        yield Fault("lettered_options", f"'{options[0]}'", "choices")
    if match := _LETTERED.search(asked.question):
        yield Fault("lettered_options", f"in the question: '{match[0][:60]}'", "question")
    seen: dict[str, str] = {}
    alike: dict[str, str] = {}
    for option in options:
        if (plain := _alike(option)) in alike:
            yield Fault("equal_options", f"'{alike[plain]}' and '{option}'", "choices")
        seen[normalise(option)] = alike[plain] = option
    if not normalise(asked.answer) or normalise(asked.answer) not in seen:
        found = read_key(asked.answer, options)[1] or f"'{asked.answer}' is a letter"
        yield Fault("answer_no_option", found, "answer")
        return  # what follows is about the option that is the answer
    words = [word_set(option) for option in options]
    for one, option in enumerate(options):
        for two, other in enumerate(options):
            if one != two and words[one] <= words[two]:
                yield Fault("options_collide", f"'{option}' is in '{other}'", "choices")
    answer = seen[normalise(asked.answer)]
    others = [len(option.split()) for option in options if option != answer]
    length = len(answer.split())
    if others and (
        (length > 2 and length > rules.stands_out * max(others))
        # "yes" beside "no, it gets louder" gives nothing away; a word beside whole sentences does.
        or (length * rules.stands_out < min(others) and (length > 2 or min(others) - length > 4))
    ):
        yield Fault("answer_stands_out", f"{length} words beside {', '.join(map(str, others))}", "answer")
    named = [option for option in options if holds(asked.question, option)]
    if named == [answer]:
        yield Fault("question_tells", f"'{answer}' in '{asked.question[:80]}'", "question")


def _alike(option: str) -> str:
    """The same for "a dog" and "The dog", "air-conditioner" and "air conditioner"; not for "5 dB" and "-5 dB"."""
    text, plain = read_text(option), normalise(option)
    if len(without_article(text)) < len(text.plain_keys):
        plain = plain.partition(" ")[2]
    return re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", plain)


def _words(asked: Asked, rules: Rules, facts: Sequence[Fact]) -> Iterator[Fault]:
    if len(asked.answer.split()) > rules.answer_words:
        yield Fault("answer_long", f"{len(asked.answer.split())} words", "answer")
    if asked.form == "open" and len(word_set(asked.answer)) and word_set(asked.answer) <= word_set(asked.question):
        yield Fault("question_tells", f"'{asked.answer}' in '{asked.question[:80]}'", "question")
    heard = frozenset[str]().union(*(word_set(str(fact.value)) for fact in facts if fact.kind != "seen"))
    banned = _phrases(rules.banned)
    colourless: dict[str, str] = {}
    for option in asked.choices if rules.visual else ():
        bare = re.sub(rf"{_COLOUR}\b(?! noise)", "", _alike(option).lower())
        if colourless.setdefault(bare, option) != option:
            yield Fault("visual", f"choices: '{option}' and '{colourless[bare]}' differ in colour alone", "choices")
    strange = {f"semantic_elements.{name}" for name in asked.semantic_elements if group_of(name, loose=True) is None}
    for name, text in asked.texts():
        if match := banned.search(text):
            yield Fault("banned_phrase", f"{name}: '{match[0]}'", name)
        # A group that there is not is a fault of its own.
        looked = rules.visual and not (rules.elements != "any" and name in strange)
        if found := _visual(text.lower(), heard) if looked else "":
            yield Fault("visual", f"{name}: '{found}'", name)
        if match := _CLOCK.search(text) if name != "choices" else None:
            yield Fault("timestamps", f"{name}: '{match[0]}'", name)


@lru_cache(maxsize=8)
def _phrases(more: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(phrase).replace("\\ ", r"[\s_-]+") for phrase in (*BANNED, *more))
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


def _visual(text: str, heard: frozenset[str]) -> str:
    if match := _SAYS_SEEN.search(text):
        return match[0]
    found = sorted(set(re.findall(r"[\w']+", _NAMED_BY_COLOUR.sub(" ", _FIGURES.sub(" ", text)))) & VISUAL - heard)
    return found[0] if found else ""


def _thought(asked: Asked, rules: Rules, facts: Sequence[Fact]) -> Iterator[Fault]:
    least, most = rules.thinking_words
    count = len(asked.thinking.split())
    if count < least:
        yield Fault("thinking_short", f"{count} words where at least {least} are asked for", "thinking")
    if count > most:
        yield Fault("thinking_long", f"{count} words where at most {most} are allowed", "thinking")
    if asked.form == "choice" and asked.thinking and not mentions(asked.thinking, asked.answer):
        others = [option for option in asked.choices if mentions(asked.thinking, option)]
        if others:
            yield Fault("thinking_elsewhere", f"'{others[0]}' and not '{asked.answer}'", "thinking")
    groups = [group_of(name, loose=True) for name in asked.semantic_elements]
    if rules.elements != "any" and None in groups:
        found = f"'{list(asked.semantic_elements)[groups.index(None)]}' is none of the groups"
        yield Fault("elements", found, "semantic_elements")
    missing = [name for name in ELEMENT_GROUPS if name not in groups] if rules.elements == "nine" else []
    if missing and (missing != [ELEMENT_GROUPS[-1]] or REASONING.name not in groups):  # the questions' own ninth
        yield Fault("elements", f"'{missing[0]}' is missing", "semantic_elements")
    if rules.evidence:
        known = {fact.id for fact in facts}
        if not asked.evidence:
            yield Fault("evidence", "none is named", "evidence")
        if strange := [one for one in asked.evidence if one not in known]:
            yield Fault("evidence", f"'{strange[0]}' is no fact of this recording", "evidence")


# ------------------------------------------------------------------------------------------------ all of a corpus


def shuffled(asked: Asked, *seed: object) -> Asked:
    """The same question with its options in an order drawn by `seed`: over many questions each place is as likely.

    The answer is written as its option is.
    """
    if not asked.choices:
        return asked
    rng = seeded("options", *seed)
    choices = [asked.choices[int(place)] for place in rng.permutation(len(asked.choices))]
    answer = next((one for one in choices if normalise(one) == normalise(asked.answer)), asked.answer)
    return dataclasses.replace(asked, choices=choices, answer=answer)
